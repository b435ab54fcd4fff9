"""Training checkpoints and released weights of the official DINO code.

    python -m fastdino.interop.official export RUN_OR_CHECKPOINT out.pth
    python -m fastdino.interop.official import in.pth OUTPUT_DIR

A training file is a dictionary: ``student`` (every name behind ``module.``), ``teacher`` (bare names; behind
``module.`` too if there is batch norm), ``optimizer`` (two groups, parameters numbered in the order of the
groups), ``epoch`` (the next one), ``args``, ``dino_loss`` (``center`` [1, K]) and ``fp16_scaler`` when mixed
precision is on. Those of EsViT's Swins leave ``backbone.`` out of the names. Released backbones are bare
state dictionaries. The file does not say how many steps an epoch had, so an imported checkpoint is numbered
by its epoch and training continues at the beginning of that epoch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.config import Config, as_flags, config_from_dict, config_to_dict, config_to_yaml, with_flags
from fastdino.engine import checkpoint
from fastdino.engine.optim import parameter_groups
from fastdino.engine.schedules import Schedule
from fastdino.interop.files import WeightsError, find_checkpoint, read_pickle, write_pickle
from fastdino.models import MultiCropModel, SwinTransformer, build_model
from fastdino.switches import uses_predictor

# Our name of the optimizer state by the official one, where they differ (LARS).
_STATE_NAMES = {"mu": "momentum_buffer"}
_SCALER = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


@dataclass
class OfficialCheckpoint:
    """An official file with normalised names: ``backbone.*`` and ``head.*``, weight norm as
    ``weight_g``/``weight_v``.

    A released backbone is the ``teacher``, and everything else is None.
    """

    path: Path
    teacher: dict[str, Tensor] | None
    student: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    epoch: int | None = None
    args: dict[str, Any] | None = None
    center: Tensor | None = None
    fp16_scaler: dict[str, Any] | None = None


def read_official(path: str | os.PathLike[str]) -> OfficialCheckpoint:
    """Read a training checkpoint or a bare backbone. Raises OSError or WeightsError, which name the file."""
    path = Path(path)
    contents = read_pickle(path)
    if not isinstance(contents, Mapping) or not contents:
        raise WeightsError(f"{path}: expected a dictionary of weights, got {type(contents).__name__}")
    if not {"student", "teacher"} & contents.keys():
        return OfficialCheckpoint(path, teacher=_normalised(contents, path))
    loss = contents.get("dino_loss")
    args = contents.get("args")
    return OfficialCheckpoint(
        path,
        teacher=_normalised(contents["teacher"], path) if "teacher" in contents else None,
        student=_normalised(contents["student"], path) if "student" in contents else None,
        optimizer=contents.get("optimizer"),
        epoch=contents.get("epoch"),
        args=vars(args) if isinstance(args, argparse.Namespace) else args,
        center=loss.get("center") if isinstance(loss, Mapping) else None,
        fp16_scaler=contents.get("fp16_scaler"),
    )


def _normalised(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors by name, got {type(value).__name__} under {key!r}")
        name = key.removeprefix("module.").removeprefix("_orig_mod.")
        name = name.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
        name = name.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")
        if not name.startswith(("backbone.", "head.", "head_dense.")):
            name = f"backbone.{name}"
        if name in renamed:
            raise WeightsError(f"{path}: two tensors for {name} (the second is {key})")
        renamed[name] = value
    return renamed


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Missing, unexpected and differently shaped tensors in words; empty if ``found`` fits exactly."""
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "shapes": shapes,
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def to_native(official: OfficialCheckpoint) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """``(model, optimizer, meta)`` of our checkpoint format. Raises WeightsError naming what does not fit."""
    path = official.path
    absent = [
        name for name in ("student", "teacher", "args", "epoch", "center") if getattr(official, name) is None
    ]
    if absent:
        raise WeightsError(f"{path}: not a training checkpoint, it has no {', '.join(absent)}")
    assert official.args is not None and official.student is not None and official.teacher is not None
    assert official.center is not None and official.epoch is not None
    known = as_flags(Config())
    try:
        config = with_flags(Config(), {k: v for k, v in official.args.items() if k in known})
        reference = _reference_model(config)
    except ValueError as error:
        raise WeightsError(f"{path}: its args are not those of a run that exists here: {error}") from error
    expected = reference.state_dict()
    for key, state in (("student", official.student), ("teacher", official.teacher)):
        problems = differences(expected, state)
        if problems:
            raise WeightsError(f"{path}: {key} does not fit --arch {config.model.arch}: {problems}")
    if official.center.numel() != config.model.out_dim:
        raise WeightsError(
            f"{path}: center has {official.center.numel()} entries, --out_dim is {config.model.out_dim}"
        )
    model = {f"student.{name}": official.student[name] for name in expected}
    model |= {f"teacher.{name}": official.teacher[name] for name in expected}
    model["center"] = official.center.reshape(-1)
    optimizer, groups = _optimizer_to_native(official, reference)
    scaler = official.fp16_scaler or {}
    world_size = official.args.get("world_size", 1)
    meta = {
        "epoch": official.epoch,
        "config": config_to_dict(config),
        "identity": _identity(config),
        "world_size": world_size,
        "scaler": {"scale": scaler.get("scale", 2.0**16), "good_steps": scaler.get("_growth_tracker", 0)},
        "counters": {"bad_steps": 0, "bad_in_a_row": 0},
        "epoch_sums": {},
        "keep": True,
        # What our format has no place for, so that an export right after an import gives the same file.
        "official": {
            "args": _encoded(official.args, path),
            "param_groups": _encoded(groups, path),
            "fp16_scaler": _encoded(official.fp16_scaler, path),
        },
    }
    return model, optimizer, meta


def from_native(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The dictionary that the official code saves, from the three parts of our checkpoint."""
    config = config_from_dict(meta["config"])
    if (config.method.method, config.method.loss) != ("dino", "ce") or uses_predictor(config):
        raise WeightsError("the official format holds DINO's student, teacher and center, nothing of others")
    reference = _reference_model(config)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in reference.modules())
    swin = isinstance(reference.backbone, SwinTransformer)
    bare = {name: name.removeprefix("backbone.") if swin else name for name in reference.state_dict()}
    imported = meta.get("official")
    contents: dict[str, Any] = {
        "student": OrderedDict((f"module.{bare[name]}", model[f"student.{name}"]) for name in bare),
        "teacher": OrderedDict(
            (f"module.{bare[name]}" if batch_norm else bare[name], model[f"teacher.{name}"]) for name in bare
        ),
        "optimizer": _optimizer_from_native(optimizer, meta, config, reference),
        "epoch": meta["epoch"],
        "args": argparse.Namespace(**(_decoded(imported["args"]) if imported else as_flags(config))),
        "dino_loss": OrderedDict(center=model["center"].reshape(1, -1)),
    }
    scaler = _decoded(imported["fp16_scaler"]) if imported else (_SCALER if config.optim.use_fp16 else None)
    if scaler is not None:
        ours = meta["scaler"] or {"scale": 2.0**16, "good_steps": 0}  # none in a run that did not scale
        contents["fp16_scaler"] = {"scale": ours["scale"], **scaler, "_growth_tracker": ours["good_steps"]}
    return contents


def _reference_model(config: Config) -> MultiCropModel:
    """Names, shapes and gradient flags of a student, without memory for its weights."""
    with torch.device("meta"):
        return build_model(config.model, img_size=config.crops.global_crops_size)


def _identity(config: Config) -> dict[str, Any]:
    """What a continued run must share with the imported one; its images and batch are not in the file."""
    plain = config_to_dict(config)
    shared = {f"--{k}": v for group in ("model", "crops") for k, v in plain[group].items()}
    return {**shared, "--optimizer": config.optim.optimizer, "--seed": config.run.seed}


def _numbered(reference: MultiCropModel) -> tuple[list[list[int]], list[tuple[str, Tensor]]]:
    """Parameter numbers of the two groups, and name and parameter by number."""
    names = {parameter: name for name, parameter in reference.named_parameters()}
    groups = [group["params"] for group in parameter_groups(reference)]
    ordered = [(names[p], p) for group in groups for p in group]
    first = len(groups[0])
    return [list(range(first)), list(range(first, len(ordered)))], ordered


def _optimizer_to_native(
    official: OfficialCheckpoint, reference: MultiCropModel
) -> tuple[dict[str, Tensor], list[dict[str, Any]] | None]:
    """Flat optimizer state by parameter name, and the settings of the groups."""
    if official.optimizer is None:
        return {}, None
    numbers, ordered = _numbered(reference)
    try:
        found = [list(group["params"]) for group in official.optimizer["param_groups"]]
        entries = dict(official.optimizer["state"])
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{official.path}: optimizer is not the state of a torch optimizer ({error!r})"
        ) from error
    if found != numbers:
        sizes = " + ".join(str(len(group)) for group in found)
        expected = " + ".join(str(len(group)) for group in numbers)
        raise WeightsError(f"{official.path}: optimizer has {sizes} parameters, expected {expected}")
    flat: dict[str, Tensor] = {}
    for number, entry in entries.items():
        name, parameter = ordered[number]
        for key, value in entry.items():
            if value is None:  # SGD before its first step
                continue
            value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32)
            if value.ndim and value.shape != parameter.shape:
                raise WeightsError(
                    f"{official.path}: optimizer {key} of {name} has shape {list(value.shape)}, "
                    f"expected {list(parameter.shape)}"
                )
            flat[f"{_STATE_NAMES.get(key, key)}.{name}"] = value
    settings = [{k: v for k, v in g.items() if k != "params"} for g in official.optimizer["param_groups"]]
    return flat, settings


def _optimizer_from_native(
    flat: Mapping[str, Tensor], meta: Mapping[str, Any], config: Config, reference: MultiCropModel
) -> dict[str, Any]:
    numbers, ordered = _numbered(reference)
    lars = config.optim.optimizer == "lars"
    state: dict[int, dict[str, Tensor]] = {}
    for number, (name, _) in enumerate(ordered):
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer") if f"{k}.{name}" in flat]
        if keys:
            state[number] = {
                "mu" if lars and k == "momentum_buffer" else k: flat[f"{k}.{name}"] for k in keys
            }
    settings = (
        _decoded(meta["official"]["param_groups"])
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


def _encoded(value: Any, path: Path) -> Any:
    """As JSON, with tuples told apart from lists and the order of dictionaries kept."""
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v, path) for v in value]}
    if isinstance(value, list):
        return [_encoded(v, path) for v in value]
    if isinstance(value, Mapping):
        return {"dict": [[str(k), _encoded(v, path)] for k, v in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise WeightsError(
        f"{path}: expected numbers, text and lists in args and optimizer settings, got {value!r}"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(v) for v in value]
    if isinstance(value, Mapping):
        if "tuple" in value:
            return tuple(_decoded(v) for v in value["tuple"])
        return {k: _decoded(v) for k, v in value["dict"]}
    return value


def export_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Write the official file of a checkpoint or of a run's newest one; returns a line about it."""
    found = find_checkpoint(source)
    model, optimizer, meta = checkpoint.load(found)
    write_pickle(target, from_native(model, optimizer, meta))
    note = ""
    if "official" not in meta and meta["step"] % meta["steps_per_epoch"]:
        note = f" (taken within epoch {meta['epoch']}, which the official code will start again)"
    return f"{found} -> {target}: continues at epoch {meta['epoch']}{note}"


def import_checkpoint(source: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> str:
    """Make a run directory with checkpoint and ``config.yaml`` of a training file; returns a line on it."""
    output = Path(output_dir)
    root = output / "checkpoints"
    if checkpoint.checkpoints(root):
        raise WeightsError(f"{output}: already holds checkpoints; import into a new directory")
    model, optimizer, meta = to_native(read_official(source))
    config = config_from_dict(meta["config"])
    config = replace(config, run=replace(config.run, output_dir=str(output)))
    meta["config"] = config_to_dict(config)
    path = checkpoint.save(root, meta["epoch"], model, optimizer, meta)
    (output / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return f"{source} -> {path}: continue with train.py --config {output / 'config.yaml'} --data_path IMAGES"


def main(argv: Iterable[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.interop.official", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a checkpoint as a file of the official code")
    export.add_argument("source", help="checkpoint or run directory")
    export.add_argument("target", help="file to write")
    take = commands.add_parser("import", help="make a run directory of an official training file")
    take.add_argument("source", help="checkpoint.pth or a released full checkpoint")
    take.add_argument("target", help="directory of the new run")
    options = parser.parse_args(None if argv is None else list(argv))
    action = export_checkpoint if options.command == "export" else import_checkpoint
    try:
        print(action(options.source, options.target))
    except (OSError, WeightsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
