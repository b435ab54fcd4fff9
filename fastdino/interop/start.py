"""A new run that begins with the weights of a backbone: what ``import`` makes of anything but an official
training file, which continues (``official.py``).

Student and teacher get the backbone. Head, center and queue are fresh, there is no optimizer state, and no
epoch has passed: a backbone alone does not hold them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdino.config import Config, ConfigError, config_to_dict, config_to_yaml, layered, validate
from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError
from fastdino.interop.official import differences
from fastdino.interop.source import Source, arguments, model_config, open_source
from fastdino.methods import build_method
from fastdino.models import VisionTransformer

HELP = "Begin a run from a backbone: fresh head, no optimizer state, epoch 0."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="flags of the run; the backbone's own and, of a ViT, --global_crops_size come from the weights",
    )
    parser.set_defaults(image_size=None)


def run(flags: argparse.Namespace) -> int:
    """Load and write; prints one line. Raises OSError or ValueError naming what is wrong."""
    print(start_run(open_source(flags), Path(flags.target), layered(None, flags.config)))
    return 0


def start_run(source: Source, output: Path, config: Config) -> str:
    """Make a run directory with ``config.yaml`` and a checkpoint of step 0; returns a line on what was made.

    Raises WeightsError or ConfigError if ``config`` leaves no place for the backbone.
    """
    root = output / "checkpoints"
    if checkpoint.checkpoints(root):
        raise WeightsError(f"{output}: already holds checkpoints; import into a new directory")
    config = _configuration(source, output, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = build_method(config)
    weights = source.tensors()
    for model in (method.student, method.teacher):
        if model is not None:
            problems = differences(model.backbone.state_dict(), weights)
            if problems:
                raise WeightsError(f"{source.path}: does not fit --arch {config.model.arch}: {problems}")
            model.backbone.load_state_dict(weights)
    path = checkpoint.save(root, 0, method.state_dict(), {}, _meta(config, source))
    (output / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return (
        f"{source.path} -> {path}: a new run that begins with this {source.name}, a fresh head and no "
        f"optimizer state; start it with train.py --config {output / 'config.yaml'} --data_path IMAGES"
    )


def _meta(config: Config, source: Source) -> dict[str, Any]:
    """What the trainer wants to know of a checkpoint, of one that no step has led to."""
    plain = config_to_dict(config)
    # Crops, batch and images are free; what the tensors made here fix is not.
    identity = {f"--{k}": v for group in ("model", "method") for k, v in plain[group].items()}
    del identity["--drop_path_rate"]
    if isinstance(source.backbone, VisionTransformer):
        identity["--global_crops_size"] = config.crops.global_crops_size
    return {
        "epoch": 0,
        "steps_per_epoch": 1,
        "config": plain,
        "identity": identity,
        "world_size": 1,
        "scaler": {"scale": 2.0**16, "good_steps": 0},
        "counters": {"bad_steps": 0, "bad_in_a_row": 0},
        "epoch_sums": {},
        "keep": True,
        "began_with": source.facts["fastdino.source"],
    }


def _configuration(source: Source, output: Path, config: Config) -> Config:
    """``config`` with the sizes of the backbone."""
    model = model_config(source.backbone)
    sizes = {
        k: getattr(model, k) for k in ("arch", "patch_size", "num_heads", "embed_dim", "depth", "in_chans")
    }
    config = replace(config, model=replace(config.model, **sizes))
    config = replace(config, run=replace(config.run, output_dir=str(output)))
    if isinstance(source.backbone, VisionTransformer):
        config = replace(config, crops=replace(config.crops, global_crops_size=source.image_size))
    try:
        validate(config, 1)
    except ConfigError as error:
        raise WeightsError(f"{source.path}: no run can begin with it: {error}") from error
    return config
