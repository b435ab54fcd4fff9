"""Optimizer state of official training files: two groups, parameters numbered in the order of the groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino.config import Config
from fastdino.engine.optim import parameter_groups
from fastdino.engine.schedules import Schedule
from fastdino.interop.files import WeightsError
from fastdino.models import MultiCropModel

# Our name of the optimizer state by the official one, where they differ (LARS).
_STATE_NAMES = {"mu": "momentum_buffer"}


def numbered(reference: MultiCropModel) -> tuple[list[list[int]], list[tuple[str, Tensor]]]:
    """Parameter numbers of the two groups, and name and parameter by number."""
    names = {parameter: name for name, parameter in reference.named_parameters()}
    groups = [group["params"] for group in parameter_groups(reference)]
    ordered = [(names[p], p) for group in groups for p in group]
    first = len(groups[0])
    return [list(range(first)), list(range(first, len(ordered)))], ordered


def optimizer_to_native(
    state: Mapping[str, Any] | None, reference: MultiCropModel, path: Path
) -> tuple[dict[str, Tensor], list[dict[str, Any]] | None]:
    """Flat optimizer state by parameter name, and the settings of the groups."""
    if state is None:
        return {}, None
    numbers, ordered = numbered(reference)
    try:
        found = [list(group["params"]) for group in state["param_groups"]]
        entries = dict(state["state"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: optimizer is not the state of a torch optimizer ({error!r})") from error
    if found != numbers:
        sizes = " + ".join(str(len(group)) for group in found)
        expected = " + ".join(str(len(group)) for group in numbers)
        raise WeightsError(f"{path}: optimizer has {sizes} parameters, expected {expected}")
    flat: dict[str, Tensor] = {}
    for number, entry in entries.items():
        name, parameter = ordered[number]
        for key, value in entry.items():
            if value is None:  # SGD before its first step
                continue
            value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32)
            if value.ndim and value.shape != parameter.shape:
                raise WeightsError(
                    f"{path}: optimizer {key} of {name} has shape {list(value.shape)}, "
                    f"expected {list(parameter.shape)}"
                )
            flat[f"{_STATE_NAMES.get(key, key)}.{name}"] = value
    settings = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    return flat, settings


def optimizer_from_native(
    flat: Mapping[str, Tensor], meta: Mapping[str, Any], config: Config, reference: MultiCropModel
) -> dict[str, Any]:
    numbers, ordered = numbered(reference)
    lars = config.optim.optimizer == "lars"
    state: dict[int, dict[str, Tensor]] = {}
    for number, (name, _) in enumerate(ordered):
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer") if f"{k}.{name}" in flat]
        if keys:
            state[number] = {
                "mu" if lars and k == "momentum_buffer" else k: flat[f"{k}.{name}"] for k in keys
            }
    settings = (
        decoded(meta["official"]["param_groups"])
        if "official" in meta
        else _settings(meta, config, reference)
    )
    groups = [{**s, "params": n} for s, n in zip(settings, numbers, strict=True)] if settings else []
    return {"state": state, "param_groups": groups}


def _settings(meta: Mapping[str, Any], config: Config, reference: MultiCropModel) -> list[dict[str, Any]]:
    """Settings of the two groups as the running torch writes them, at the last step that was taken."""
    hyper = Schedule(config, meta["steps_per_epoch"], meta["identity"]["global batch"])(
        max(meta["step"] - 1, 0)
    )
    groups = parameter_groups(reference)
    if config.optim.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.state_dict()["param_groups"]]
    if config.optim.optimizer == "lars":
        filters = {"weight_decay_filter": None, "lars_adaptation_filter": None}
        settings = [
            {"weight_decay": s["weight_decay"], "momentum": 0.9, "eta": 0.001, **filters} for s in settings
        ]
    if config.optim.optimizer == "lamb":  # not one of the official script's, which cannot continue from it
        settings = [{"weight_decay": s["weight_decay"], "betas": (0.9, 0.999), "eps": 1e-6} for s in settings]
    settings[0]["weight_decay"] = hyper.weight_decay
    return [{**s, "lr": hyper.lr} for s in settings]


def encoded(value: Any, path: Path) -> Any:
    """As JSON, with tuples told apart from lists and the order of dictionaries kept."""
    if isinstance(value, tuple):
        return {"tuple": [encoded(v, path) for v in value]}
    if isinstance(value, list):
        return [encoded(v, path) for v in value]
    if isinstance(value, Mapping):
        return {"dict": [[str(k), encoded(v, path)] for k, v in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise WeightsError(
        f"{path}: expected numbers, text and lists in args and optimizer settings, got {value!r}"
    )


def decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [decoded(v) for v in value]
    if isinstance(value, Mapping):
        if "tuple" in value:
            return tuple(decoded(v) for v in value["tuple"])
        return {k: decoded(v) for k, v in value["dict"]}
    return value
