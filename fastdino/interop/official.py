"""Training checkpoints and released weights of the official DINO code and of EsViT's.

    python -m fastdino.interop.official export RUN_OR_CHECKPOINT out.pth
    python -m fastdino.interop.official import in.pth OUTPUT_DIR
    python -m fastdino.interop.official import in.pth OUTPUT_DIR --method esvit

A training file is a dictionary: ``student`` (every name behind ``module.``), ``teacher`` (bare names; behind
``module.`` too if there is batch norm), ``optimizer`` (two groups, parameters numbered in the order of the
groups), ``epoch`` (the next one), ``args``, ``dino_loss`` (``center`` [1, K]) and ``fp16_scaler`` when mixed
precision is on. EsViT's have ``head_dense`` and ``center_grid`` besides; they leave ``backbone.`` out of the
names of a Transformer and double it in those of a ResNet. Released backbones are bare state dictionaries. The
file does not say how many steps an epoch had, so an imported checkpoint is numbered by its epoch and training
continues at the beginning of that epoch.

With ``--method esvit`` a run that was trained on whole views alone, official or ours (a run directory or a
checkpoint instead of the file), goes on with EsViT's regions as EsViT's own staged runs do: a fresh dense
head, its center at zero, no optimizer state; weights, epoch and schedules continue.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.config import (
    ALIASES,
    Config,
    as_flags,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    convert,
    feature_width,
    with_flags,
)
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError, find_checkpoint, read_pickle, write_pickle
from fastdino.interop.official_optimizer import (
    decoded,
    encoded,
    numbered,
    optimizer_from_native,
    optimizer_to_native,
)
from fastdino.methods.esvit import dense_model
from fastdino.models import Backbone, MultiCropModel, ResNet, SwinTransformer, build_head, build_model
from fastdino.switches import has_dino_head, matches_regions, uses_predictor

_SCALER = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


@dataclass
class OfficialCheckpoint:
    """An official file with normalised names: ``backbone.*``, ``head.*`` and ``head_dense.*``, weight norm as
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
    center_grid: Tensor | None = None
    fp16_scaler: dict[str, Any] | None = None


def read_official(path: str | os.PathLike[str]) -> OfficialCheckpoint:
    """Read a training checkpoint or a bare backbone. Raises OSError or WeightsError, which name the file."""
    path = Path(path)
    return understood(read_pickle(path), path)


def read_training(source: str | os.PathLike[str]) -> OfficialCheckpoint:
    """The same of a file or of a run or checkpoint of ours, as it would be exported."""
    if not Path(source).is_dir():
        return read_official(source)
    found = find_checkpoint(source)
    return understood(from_native(*checkpoint.load(found)), found)


def understood(contents: Any, path: Path) -> OfficialCheckpoint:
    """What was read from ``path``, with normalised names. Raises WeightsError."""
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
        center_grid=loss.get("center_grid") if isinstance(loss, Mapping) else None,
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
        if name.startswith("backbone.backbone."):
            name = name.removeprefix("backbone.")
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
    config = _configuration(official)
    reference = _reference_model(config)
    assert official.args is not None and official.student is not None and official.teacher is not None
    expected = reference.state_dict()
    for key, state in (("student", official.student), ("teacher", official.teacher)):
        problems = differences(expected, state)
        if problems:
            raise WeightsError(f"{path}: {key} does not fit --arch {config.model.arch}: {problems}")
    model = {f"student.{name}": official.student[name] for name in expected}
    model |= {f"teacher.{name}": official.teacher[name] for name in expected}
    for name in _centers(config):
        center = getattr(official, name)
        if center is None or center.numel() != config.model.out_dim:
            got = "is missing" if center is None else f"has {center.numel()} entries"
            raise WeightsError(f"{path}: {name} {got}, --out_dim is {config.model.out_dim}")
        model[name] = center.reshape(-1)
    optimizer, groups = optimizer_to_native(official.optimizer, reference, path)
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
            "args": encoded(official.args, path),
            "param_groups": encoded(groups, path),
            "fp16_scaler": encoded(official.fp16_scaler, path),
        },
    }
    return model, optimizer, meta


def _configuration(official: OfficialCheckpoint) -> Config:
    """Flags of the run. Raises WeightsError if this is no training checkpoint, or not one of a run that
    exists here.
    """
    path = official.path
    absent = [
        name for name in ("student", "teacher", "args", "epoch", "center") if getattr(official, name) is None
    ]
    if absent:
        hint = "; `python -m fastdino.interop safetensors import` begins a run with a backbone alone"
        bare = official.student is None and official.args is None
        lacks = f"not a training checkpoint, it has no {', '.join(absent)}"
        raise WeightsError(f"{path}: {lacks}{hint if bare else ''}")
    assert official.args is not None and official.student is not None
    try:
        config = with_flags(Config(), _flags(official.args, official.student))
        _reference_model(config)
    except ValueError as error:
        raise WeightsError(f"{path}: its args are not those of a run that exists here: {error}") from error
    return config


def _flags(args: Mapping[str, Any], student: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our flags by the arguments of the run and, where those of EsViT do not tell, by its tensors."""
    if args.get("aug_opt", "dino_aug") != "dino_aug" or args.get("use_mixup"):
        raise ValueError(f"expected DINO's augmentation without mixup, got {args.get('aug_opt')}")
    known = as_flags(Config())
    flags = {k: v for k, v in args.items() if k in known}
    for name in ("local_crops_number", "local_crops_size"):
        value = flags.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 1:  # EsViT's, one for each size of crops
            flags[name] = value[0]
    if any(name.startswith("head_dense.") for name in student):
        flags["method"] = "esvit"
    table = student.get("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
    if flags.get("arch") in ALIASES and table is not None:
        size = flags["arch"].split("_")[1]
        flags["arch"] = f"swin_{size}_w{(math.isqrt(len(table)) + 1) // 2}"
        flags.setdefault("drop_path_rate", 0.1 if size == "tiny" else 0.2)
    return flags


def with_dense_head(
    official: OfficialCheckpoint, *, norm_last_layer: bool | None = None
) -> OfficialCheckpoint:
    """What EsViT goes on from after training on whole views alone: with a fresh dense head, the same in
    student and teacher, its center at zero, and without optimizer state. ``norm_last_layer`` changes that
    flag. Raises WeightsError if there is such a head already.
    """
    _configuration(official)
    assert official.args is not None and official.student is not None and official.teacher is not None
    if any(name.startswith("head_dense.") for name in official.student):
        raise WeightsError(f"{official.path}: has a dense head already; import it without --method")
    args = {**official.args, "method": "esvit", "use_dense_prediction": True}
    if norm_last_layer is not None:
        args["norm_last_layer"] = norm_last_layer
    config = _configuration(replace(official, args=args))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        head = build_head(config.model, feature_width(config.model))
    dense = {f"head_dense.{name}": value for name, value in head.state_dict().items()}
    optimizer = official.optimizer
    if optimizer is not None:
        numbers = numbered(_reference_model(config))[0]
        groups = zip(optimizer.get("param_groups", ()), numbers, strict=False)
        optimizer = {"state": {}, "param_groups": [{**group, "params": part} for group, part in groups]}
    return replace(
        official,
        student={**official.student, **dense},
        teacher={**official.teacher, **{name: value.clone() for name, value in dense.items()}},
        args=args,
        center_grid=torch.zeros(1, config.model.out_dim),
        optimizer=optimizer,
    )


def from_native(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The dictionary that the official code saves, from the three parts of our checkpoint."""
    config = config_from_dict(meta["config"])
    if config.model.arch.startswith("timm:"):
        raise WeightsError(f"the official code has no {config.model.arch}")
    if not has_dino_head(config) or uses_predictor(config):
        held = "DINO's and EsViT's students, teachers and centers"
        raise WeightsError(f"the official format holds {held}, nothing of others")
    reference = _reference_model(config)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in reference.modules())
    esvit = config.method.method == "esvit"
    bare = {name: _bare(name, reference.backbone, esvit) for name in reference.state_dict()}
    imported = meta.get("official")
    contents: dict[str, Any] = {
        "student": OrderedDict((f"module.{bare[name]}", model[f"student.{name}"]) for name in bare),
        "teacher": OrderedDict(
            (f"module.{bare[name]}" if batch_norm else bare[name], model[f"teacher.{name}"]) for name in bare
        ),
        "optimizer": optimizer_from_native(optimizer, meta, config, reference),
        "epoch": meta["epoch"],
        "args": argparse.Namespace(**(decoded(imported["args"]) if imported else as_flags(config))),
        "dino_loss": OrderedDict((name, model[name].reshape(1, -1)) for name in _centers(config)),
    }
    scaler = decoded(imported["fp16_scaler"]) if imported else (_SCALER if config.optim.use_fp16 else None)
    if scaler is not None:
        ours = meta["scaler"] or {"scale": 2.0**16, "good_steps": 0}  # none in a run that did not scale
        contents["fp16_scaler"] = {"scale": ours["scale"], **scaler, "_growth_tracker": ours["good_steps"]}
    return contents


def _reference_model(config: Config) -> MultiCropModel:
    """Names, shapes and gradient flags of a student, without memory for its weights."""
    build = dense_model if matches_regions(config) else build_model
    with torch.device("meta"):
        return build(config.model, img_size=config.crops.global_crops_size)


def _bare(name: str, backbone: Backbone, esvit: bool) -> str:
    """What a file calls a tensor: in EsViT, which alone has Swins, heads stand on the Transformer itself, and
    a ResNet is wrapped once more.
    """
    if isinstance(backbone, ResNet):
        return f"backbone.{name}" if esvit and name.startswith("backbone.") else name
    return name.removeprefix("backbone.") if esvit or isinstance(backbone, SwinTransformer) else name


def _centers(config: Config) -> tuple[str, ...]:
    return ("center", "center_grid") if matches_regions(config) else ("center",)


def _identity(config: Config) -> dict[str, Any]:
    """What a continued run must share with the imported one; its images and batch are not in the file."""
    plain = config_to_dict(config)
    shared = {f"--{k}": v for group in ("model", "method", "crops") for k, v in plain[group].items()}
    return {**shared, "--optimizer": config.optim.optimizer, "--seed": config.run.seed}


def export_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Write the official file of a checkpoint or of a run's newest one; returns a line about it."""
    found = find_checkpoint(source)
    model, optimizer, meta = checkpoint.load(found)
    if "began_with" in meta:
        raise WeightsError(f"{found}: a backbone that was imported and has not been trained since")
    write_pickle(target, from_native(model, optimizer, meta))
    note = ""
    if "official" not in meta and meta["step"] % meta["steps_per_epoch"]:
        note = f" (taken within epoch {meta['epoch']}, which the official code will start again)"
    return f"{found} -> {target}: continues at epoch {meta['epoch']}{note}"


def import_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    method: str | None = None,
    norm_last_layer: bool | None = None,
) -> str:
    """Make a run directory with checkpoint and ``config.yaml`` of a training file, or of a run of ours;
    returns a line on it. ``method`` "esvit" and ``norm_last_layer``: see :func:`with_dense_head`.
    """
    output = Path(output_dir)
    root = output / "checkpoints"
    if checkpoint.checkpoints(root):
        raise WeightsError(f"{output}: already holds checkpoints; import into a new directory")
    official = read_training(source)
    if method == "esvit":
        official = with_dense_head(official, norm_last_layer=norm_last_layer)
    model, optimizer, meta = to_native(official)
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
    take.add_argument("source", help="checkpoint.pth or a released full checkpoint; or a run directory")
    take.add_argument("target", help="directory of the new run")
    take.add_argument("--method", choices=("esvit",), help="go on with regions after views alone")
    take.add_argument("--norm_last_layer", help="true or false, with --method: another than before")
    options = parser.parse_args(None if argv is None else list(argv))
    try:
        if options.command == "export":
            print(export_checkpoint(options.source, options.target))
        else:
            norm = _optional_bool(parser, options)
            line = import_checkpoint(
                options.source, options.target, method=options.method, norm_last_layer=norm
            )
            print(line)
    except (OSError, WeightsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _optional_bool(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool | None:
    if options.norm_last_layer is None:
        return None
    if options.method is None:
        parser.error("--norm_last_layer: only with --method esvit, which drops the optimizer's state")
    try:
        return bool(convert(options.norm_last_layer, bool))
    except ValueError as error:
        parser.error(f"--norm_last_layer: {error}")


if __name__ == "__main__":
    sys.exit(main())
