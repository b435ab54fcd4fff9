"""The whole configuration of a run: nested dataclasses whose fields are the command-line flags.

Field names, types and defaults are those of the official ``main_dino.py`` wherever it has the flag. Groups
become the sections of ``--help``. Below the dataclasses: conversion to and from flags, YAML and nested
dictionaries, then validation. This module imports nothing heavier than the standard library.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastdino import presets
from fastdino.data.remote import scrubbed
from fastdino.presets import PRESETS


@dataclass
class ModelConfig:
    """Backbone and projection head."""

    arch: str = "vit_small"
    """vit_tiny, vit_small, vit_base; resnet50 (_w2, _w4, _w5); swin_tiny_w7 (small, base; w14); timm:NAME."""
    patch_size: int = 16
    """Side of a square patch of a ViT in pixels; smaller is better and slower."""
    num_heads: int | None = None
    """Attention heads of a ViT; none keeps the architecture's own."""
    embed_dim: int | None = None
    """Width of a ViT; none keeps the architecture's own."""
    depth: int | None = None
    """Blocks of a ViT; none keeps the architecture's own."""
    in_chans: int = 3
    """Input channels."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student; a ResNet has none."""
    out_dim: int = 65536
    """K, the number of prototypes (head output)."""
    norm_last_layer: bool = True
    """Freeze the gain (weight_g) of the last layer at 1."""
    use_bn_in_head: bool = False
    """Batch normalisation in the projection head."""
    head_layers: int = 3
    """Linear layers before the last one, 1 to 4."""
    head_hidden_dim: int = 2048
    """Hidden width of the projection head."""
    bottleneck_dim: int = 256
    """Width of the l2-normalised bottleneck; 0 for a head without bottleneck."""
    head_act: Literal["gelu", "relu"] = "gelu"
    """Activation in the projection head."""


@dataclass
class LossConfig:
    """Teacher and loss."""

    momentum_teacher: float = 0.996
    """Base EMA momentum of the teacher, raised to 1 by a cosine schedule; 0.9995 is advised at batch 256."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature at the start."""
    teacher_temp: float = 0.04
    """Teacher temperature after the warm-up; 0 picks one prototype; the student's switches sharpening off."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of linear teacher-temperature warm-up."""
    student_temp: float = 0.1
    """Student temperature."""
    center_momentum: float = 0.9
    """EMA momentum of the center; 1 keeps it at zero: no centering."""


@dataclass
class MethodConfig:
    """Method: DINO with the switches of its ablations, or one it is compared with."""

    method: Literal["dino", "esvit", "byol", "mocov2", "swav"] = "dino"
    """dino; esvit; byol, mocov2, swav as the DINO paper compares them, whose student is what is evaluated."""
    use_dense_prediction: bool | None = None
    """Of esvit: match regions besides whole views; none: yes. Without, esvit is dino."""
    loss: Literal["ce", "mse", "infonce"] = "ce"
    """Of dino: cross-entropy over prototypes; 2 - 2 cos, or contrast with a queue, of bottleneck features."""
    teacher: Literal["ema", "copy", "prev_iter", "prev_epoch"] = "ema"
    """Average of students, the student itself, as it was a step ago, or at the end of the last epoch."""
    teacher_op: Literal["center", "softmax_batch", "sinkhorn"] = "center"
    """What keeps dino's targets from collapsing; the others take no center (softmax_batch: 1 iteration)."""
    sk_joint: bool = False
    """Sinkhorn over both global views together instead of one after the other."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn-Knopp."""
    predictor: Literal["auto", "on", "off"] = "auto"
    """Student-only MLP behind the bottleneck; auto: byol alone."""
    predictor_hidden_dim: int = 4096
    """Hidden width of the predictor."""
    hidden_mlp: int | None = None
    """Hidden width of byol's, mocov2's or swav's projector; none: 4096, 2048 or 2048."""
    feat_dim: int | None = None
    """Width of the embeddings of byol, mocov2 or swav; none: 256, 256 or 128."""
    nmb_prototypes: int = 3000
    """Prototypes of swav."""
    epsilon: float = 0.05
    """Temperature of swav's codes (its other one, like mocov2's, is --student_temp)."""
    queue_length: int | None = None
    """Embeddings kept of earlier batches, of all processes; none: 65536 for contrast, 0 for swav."""
    epoch_queue_starts: int = 15
    """Epoch from which swav fills its queue."""


@dataclass
class OptimConfig:
    """Optimisation."""

    use_fp16: bool = True
    """Official switch: false forces fp32, true leaves the choice to --precision."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type; auto takes bf16 where the hardware has it, fp16 on V100, else fp32."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end (cosine schedule)."""
    clip_grad: float = 3.0
    """Largest norm of each parameter tensor's gradient; 0 switches clipping off."""
    batch_size_per_gpu: int = 64
    """Images per process and forward pass."""
    batch_size: int | None = None
    """Global batch, by gradient accumulation if need be; none: processes x batch_size_per_gpu."""
    epochs: int = 100
    """Epochs of training."""
    max_steps: int | None = None
    """Stop after this many optimizer steps (the schedules still span --epochs)."""
    freeze_last_layer: int = 1
    """Epochs during which the last layer is not trained."""
    lr: float = 0.0005
    """Learning rate after warm-up for a batch of 256; scaled by global batch / 256."""
    warmup_epochs: int = 10
    """Epochs of linear learning-rate warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end (not scaled)."""
    optimizer: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    """Update rule of the student; sgd and lars have momentum 0.9, lamb is for large batches."""
    max_bad_steps: int = 10
    """NaN or infinite steps in a row before the run stops; such steps change nothing."""


@dataclass
class CropConfig:
    """Multi-crop augmentation."""

    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Area range of the two global crops, relative to the image."""
    local_crops_number: int = 8
    """Local crops per image; 0 switches multi-crop off."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Area range of the local crops, relative to the image."""
    global_crops_size: int = 224
    """Side of the global crops in pixels."""
    local_crops_size: int = 96
    """Side of the local crops in pixels."""


@dataclass
class DataConfig:
    """Data."""

    data_path: str = "/path/to/imagenet/train/"
    """Class folders, flat folder, list of paths, or shards (tar, TFRecord, .rec, LMDB; {000..099}, URLs)."""
    num_workers: int = 10
    """Data threads per process."""
    prescan: Literal["auto", "on", "off"] = "auto"
    """Decode every image once beforehand and drop bad ones (cached); auto: up to 200,000 on disks."""
    cache_decoded: Literal["auto", "on", "off"] = "auto"
    """Keep decoded images in memory, the GPU's if it crops; auto: up to 2 GiB and a quarter of the free."""
    augment_on: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are decoded and cropped; auto: on the GPU if there is one that DALI can use."""


@dataclass
class EngineConfig:
    """Speed, memory and scale; none of it changes what is computed."""

    attention: Literal["auto", "sdpa", "xformers", "varlen", "math"] = "auto"
    """Attention kernels: PyTorch's per crop size, xformers or PyTorch's over all crops, explicit products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on a GPU."""
    cuda_graph: bool = False
    """Record the step once, replay it with one launch; for small models, whose launches cost most."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, the wide MLP activations, or blocks."""
    mesh: str = "replicate"
    """Processes: replicate the model, shard it over all (FSDP2), or RxS: R replicas of S shards each."""


@dataclass
class EvalConfig:
    """Evaluation during training and in the report."""

    eval_every: int = 0
    """Epochs between k-NN evaluations of the teacher; 0 evaluates at the end, if --eval_data_path."""
    eval_data_path: str | None = None
    """Held-out class folders; the memory bank is the training set, or train/ beside val/ inside it."""
    nb_knn: tuple[int, ...] = (10, 20)
    """Numbers of neighbours."""
    eval_bank_size: int = 20000
    """Largest number of memory-bank images used during training."""
    eval_image_size: int | None = None
    """Side of the evaluation images; none takes global_crops_size."""


@dataclass
class RunConfig:
    """Run, output and hardware."""

    output_dir: str = "."
    """Where logs, checkpoints and the report go."""
    saveckp_freq: int = 20
    """Epochs between checkpoints that are kept; 0 keeps the newest alone."""
    save_every: int = 0
    """Steps between resume points; 0 saves at the end of each epoch."""
    resume: str = "auto"
    """auto: continue from the newest valid checkpoint of output_dir; none: start afresh; or a path."""
    overwrite: bool = False
    """Allow foreign files in output_dir, and --resume none over a run (its checkpoints are set aside)."""
    allow_changes: tuple[str, ...] = ()
    """Flags that may differ from the checkpoint's, such as lr epochs, whatever comes of it."""
    seed: int = 0
    """Seed of weights, data order, crops and stochastic depth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a GPU."""
    logger: tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...] = ("none",)
    """Mirrors of metrics.jsonl, one or several; W&B is offline unless WANDB_MODE is set. Also --log."""
    log_every: int = 10
    """Steps between log lines."""
    report: bool = True
    """Write report.html at the end and after every evaluation."""
    hang_timeout: float = 300.0
    """Seconds without progress in a step or save after which all processes stop; 0 waits for ever."""
    verify_every: int = 0
    """Steps between those computed twice and compared bit by bit, which finds failing hardware; 0: none."""
    dist_url: str = "env://"
    """Accepted for compatibility; torchrun's environment is used."""
    local_rank: int = 0
    """Accepted for compatibility; ignored."""


@dataclass
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


class ConfigError(ValueError):
    """A flag with an impossible value: one line with the flag, what was expected and what came.

    ``flag`` is the name without dashes.
    """

    def __init__(self, flag: str, message: str):
        self.flag = flag
        super().__init__(f"--{flag}: {message}")


# Width, depth and heads of the ViTs (Table 1 of the DINO paper; deit_* are the official code's aliases).
ARCHITECTURES: dict[str, tuple[int, int, int]] = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "deit_tiny": (192, 12, 3),
    "deit_small": (384, 12, 6),
}
SWIN_PATCH = 4  # side of a Swin's patch in pixels
# Channels of the first stage of the ResNets; the last one has 32 times as many.
RESNETS: dict[str, int] = {"resnet50": 64, "resnet50_w2": 128, "resnet50_w4": 256, "resnet50_w5": 320}
_SWIN_SIZES = {"tiny": (96, (2, 2, 6, 2)), "small": (96, (2, 2, 18, 2)), "base": (128, (2, 2, 18, 2))}
# Width of the first stage, blocks of the four stages, side of a window; the last stage is 8 times as wide.
SWINS: dict[str, tuple[int, tuple[int, ...], int]] = {
    f"swin_{size}_w{window}": (width, depths, window)
    for size, (width, depths) in _SWIN_SIZES.items()
    for window in (7, 14)
}
# EsViT's --arch, whose window is set in a file, and the names of those files.
ALIASES: dict[str, str] = {f"swin_{size}": f"swin_{size}_w7" for size in _SWIN_SIZES} | {
    f"swin_{size}_patch4_window{window}_224": f"swin_{size}_w{window}"
    for size in _SWIN_SIZES
    for window in (7, 14)
}


# -- flags, dictionaries, YAML ----------------------------------------------------------------------------


def preset(name: str) -> dict[str, Any]:
    """Flags of the preset ``name`` (hyphens and underscores are alike); ConfigError suggests the nearest."""
    key = name.replace("_", "-")
    if key not in PRESETS:
        hint = _nearest(key, PRESETS) or "; see --list_presets"
        raise ConfigError("preset", f"unknown name {name!r}{hint}")
    default = as_flags(Config())
    return {name: value for name, value in presets.flags(key).items() if value != default[name]}


@cache
def _flags() -> dict[str, tuple[str, Any]]:
    """Flag name -> (section, type)."""
    return {
        name: (section.name, kind)
        for section in dataclasses.fields(Config)
        for name, kind in get_type_hints(get_type_hints(Config)[section.name]).items()
    }


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def as_flags(config: Config) -> dict[str, Any]:
    """All values of ``config`` by flag name."""
    return {name: getattr(getattr(config, section), name) for name, (section, _) in _flags().items()}


def with_flags(config: Config, values: Mapping[str, Any], where: str = "") -> Config:
    """A copy of ``config`` with ``values`` (flag name, hyphens allowed -> value) converted and set.

    Raises ConfigError for an unknown flag (naming the nearest) or a value of another type; ``where`` says in
    which file.
    """
    sections: dict[str, dict[str, Any]] = {}
    for spelled, value in values.items():
        name = str(spelled).replace("-", "_")
        name = "logger" if name == "log" else name
        if name not in _flags():
            raise ConfigError(name, f"unknown flag{where}{_nearest(name, _flags())}")
        section, kind = _flags()[name]
        try:
            sections.setdefault(section, {})[name] = convert(value, kind)
        except ValueError as error:
            raise ConfigError(name, f"{error}{where}") from None
    changed = {name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()}
    return dataclasses.replace(config, **changed)


def convert(value: Any, kind: Any) -> Any:
    """``value``, a word of a command line or an object from YAML, JSON or Python, as type ``kind`` of a flag.

    Raises ValueError saying what was expected and what came.
    """
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return convert(value, choices[0])
    if origin is tuple:
        return _convert_tuple(value, choices)
    if origin is Literal:
        if isinstance(value, bool) and "on" in choices:  # YAML reads a bare on or off as a boolean
            value = "on" if value else "off"
        if value in choices:
            return value
        raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}")
    if kind is bool:
        known = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
        if str(value).lower() in known:
            return known[str(value).lower()]
        raise ValueError(f"expected true or false, got {value!r}")
    if kind is str:
        if isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
        raise ValueError(f"expected text, got {value!r}")
    try:
        number = kind(value)
        if not isinstance(value, bool) and (isinstance(value, str) or number == value):
            return number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"expected {'an integer' if kind is int else 'a number'}, got {value!r}")


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if kinds[-1] is Ellipsis:
        words = words if isinstance(words, (list, tuple)) else [words]
        return tuple(convert(word, kinds[0]) for word in words)
    if not isinstance(words, (list, tuple)) or len(words) != len(kinds):
        raise ValueError(f"expected {len(kinds)} numbers, got {value!r}")
    return tuple(convert(word, kind) for word, kind in zip(words, kinds, strict=True))


def _flatten(nested: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flags of a dictionary that may group them by section (--loss and --method are named like one)."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        section = name in {section.name for section in dataclasses.fields(Config)}
        if section and (isinstance(value, Mapping) or name not in _flags()):
            if not isinstance(value, Mapping):
                raise ConfigError(name, f"expected the flags of this section{where}, got {value!r}")
        new = value if section and isinstance(value, Mapping) else {name: value}
        if twice := flat.keys() & new.keys():
            raise ConfigError(str(min(twice, key=str)), f"expected one value{where}, got two")
        flat.update(new)
    return flat


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionary of plain values, as stored in a checkpoint: without the passwords in URLs."""
    return scrubbed(dataclasses.asdict(config))


def config_from_dict(nested: Mapping[str, Any]) -> Config:
    """Inverse of :func:`config_to_dict`, also through JSON; missing flags take their defaults."""
    where = " in the stored configuration"
    return with_flags(Config(), _flatten(nested, where), where)


def config_to_yaml(config: Config) -> str:
    """Every flag as YAML, one comment per section; ``--config`` reads it back to the same configuration."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Tuples on one line, [0.4, 1.0], instead of one value per line."""

    def on_one_line(dumper: yaml.SafeDumper, value: tuple[Any, ...]) -> yaml.Node:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)

    Dumper.add_representer(tuple, on_one_line)
    parts = []
    for section, values in config_to_dict(config).items():
        body = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
        parts.append(f"# {section}\n{body}")
    return "\n".join(parts)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Flags of a YAML file, flat or grouped by section, ``preset`` among them; ConfigError names the file."""
    import yaml

    from fastdino import strict_yaml

    try:
        content = strict_yaml.read(path)
    except OSError as error:
        raise ConfigError("config", f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError("config", f"{path}: expected lines 'flag: value', got {type(content).__name__}")
    return _flatten(content, f" in {path}")


def layered(preset_name: str | None, yaml_path: str | os.PathLike[str] | None) -> Config:
    """Defaults, then the preset (of the YAML file when ``preset_name`` is None), then the YAML file."""
    from_file = read_yaml(yaml_path) if yaml_path is not None else {}
    named = from_file.pop("preset", None)
    chosen = preset_name if preset_name is not None else named
    config = with_flags(Config(), preset(str(chosen))) if chosen is not None else Config()
    return with_flags(config, from_file, f" in {yaml_path}")


def config_from_flags(**flags: Any) -> Config:
    """Configuration of keyword flags, ``preset`` and ``config`` (a YAML file) included, validated."""
    base = layered(flags.pop("preset", None), flags.pop("config", None))
    config = with_flags(base, flags)
    validate(config)
    return config


def parse_mesh(text: str, world_size: int) -> tuple[int, int] | None:
    """``--mesh`` as (replicas, shards of each), whose product is the number of processes; None for
    ``replicate``, and in a single process, which has nothing to shard. Raises ConfigError.
    """
    if text == "replicate":
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if text != "shard" and found is None:
        raise ConfigError("mesh", f"expected replicate, shard or RxS such as 2x4, got {text!r}")
    replicas, shards = (int(found[1]), int(found[2])) if found else (1, world_size)
    if replicas * shards != world_size:
        raise ConfigError("mesh", f"expected R x S = {world_size}, the number of processes, got {text}")
    return (replicas, shards) if world_size > 1 else None


# -- validation -------------------------------------------------------------------------------------------


def launched_processes() -> int:
    """Number of processes that torchrun started (its WORLD_SIZE), else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def split_batch(config: Config, world_size: int) -> tuple[int, int, int]:
    """``(global batch, micro-batch per process, micro-batches per step)``; ConfigError if none fits."""
    per_process = config.optim.batch_size_per_gpu
    total = config.optim.batch_size or per_process * world_size
    if total % world_size:
        raise ConfigError("batch_size", f"expected a multiple of the {world_size} processes, got {total}")
    share = total // world_size
    micro = min(per_process, share)
    if share % micro:
        fitting = max(size for size in range(1, micro + 1) if share % size == 0)
        raise ConfigError(
            "batch_size",
            f"expected a multiple of {world_size} x --batch_size_per_gpu {per_process}, got {total}; "
            f"--batch_size_per_gpu {fitting} fits",
        )
    return total, micro, share // micro


def validate(config: Config, world_size: int | None = None) -> None:
    """Raises ConfigError, naming the first bad flag, unless a run of ``world_size`` processes can start."""
    from fastdino.validation import validate_method  # which imports this module

    _validate_model(config)
    _validate_ranges(config)
    crops = config.crops
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(crops, name)
        if not 0.0 < low <= high <= 1.0:
            raise ConfigError(name, f"expected two numbers with 0 < min <= max <= 1, got {low:g} {high:g}")
    sizes = {"global_crops_size": crops.global_crops_size}
    if crops.local_crops_number:
        sizes["local_crops_size"] = crops.local_crops_size
    for name, size in sizes.items():
        if backbone_family(config.model.arch) == "swin" and size < SWIN_PATCH:
            raise ConfigError(name, f"expected at least one patch of {SWIN_PATCH} pixels, got {size}")
        if backbone_family(config.model.arch) == "vit" and config.model.patch_size > size:
            raise ConfigError(
                "patch_size", f"expected at most --{name} ({size} pixels), got {config.model.patch_size}"
            )
    if backbone_family(config.model.arch) == "timm":
        from fastdino.models.timm_model import check_timm

        check_timm(config.model.arch, crops.global_crops_size, config.model.drop_path_rate, sizes)
    optim = config.optim
    if optim.warmup_epochs > optim.epochs:
        raise ConfigError(
            "warmup_epochs",
            f"expected at most --epochs {optim.epochs}, got {optim.warmup_epochs}; "
            f"--warmup_epochs {optim.epochs // 10} is usual",
        )
    if not optim.use_fp16 and optim.precision in ("bf16", "fp16"):
        raise ConfigError("precision", f"expected fp32 or auto with --use_fp16 false, got {optim.precision}")
    _validate_loggers(config.run.logger)
    for name in config.run.allow_changes:
        if name not in _flags():
            hint = _nearest(name, _flags())
            raise ConfigError("allow_changes", f"expected names of flags, got {name!r}{hint}")
    processes = launched_processes() if world_size is None else world_size
    split_batch(config, processes)
    validate_method(config, processes)
    if parse_mesh(config.engine.mesh, processes) is not None:
        _validate_sharded(config)


def _validate_loggers(names: tuple[str, ...]) -> None:
    if not names or ("none" in names and set(names) != {"none"}):
        got = " ".join(names) or "nothing"
        raise ConfigError("logger", f"expected none, or some of the others, got {got}")
    for name in names:
        spec = None if name == "none" else importlib.util.find_spec(name)
        if name != "none" and (spec is None or spec.origin is None):  # a folder of that name is no package
            raise ConfigError("logger", f"{name} is not installed (pip install {name})")


def _validate_model(config: Config) -> None:
    model = config.model
    family = backbone_family(model.arch)
    if model.in_chans != 3:
        raise ConfigError("in_chans", f"expected 3 (images are decoded to RGB), got {model.in_chans}")
    if not 1 <= model.head_layers <= 4:
        raise ConfigError("head_layers", f"expected 1 to 4, got {model.head_layers}")
    for name in ("num_heads", "embed_dim", "depth"):
        value = getattr(model, name)
        if value is not None and value < 1:
            raise ConfigError(name, f"expected a positive integer, got {value}")
    if family != "vit":
        _validate_fixed_backbone(config, family)
        return
    width, _, heads = backbone_shape(model)
    if width % heads:
        blamed = "num_heads" if model.num_heads is not None else "embed_dim"
        raise ConfigError(blamed, f"expected a width that the heads divide, got {heads} heads, width {width}")


def _validate_fixed_backbone(config: Config, family: str) -> None:
    """Flags that only a ViT, or only some of the others, have; defaults mean nothing elsewhere and pass."""
    model, engine, given = config.model, config.engine, f"with --arch {config.model.arch}"
    for name in ("patch_size", "num_heads", "embed_dim", "depth"):
        value = getattr(model, name)
        fixed = {getattr(ModelConfig, name), SWIN_PATCH if (family, name) == ("swin", "patch_size") else None}
        if value not in fixed:
            raise ConfigError(name, f"expected none {given}, whose sizes are fixed, got {value}")
    attention = ("auto", "sdpa") if family == "swin" else ("auto",)
    if engine.attention not in attention:
        raise ConfigError("attention", f"expected {' or '.join(attention)} {given}, got {engine.attention}")
    if engine.compile == "on":
        raise ConfigError("compile", f"expected auto or off {given}, got on: its blocks are not compiled")
    if family == "resnet" and engine.activation_checkpointing != "none":
        got = f"got {engine.activation_checkpointing}: batch norm would count every batch twice"
        raise ConfigError("activation_checkpointing", f"expected none {given}, {got}")
    if family == "timm" and engine.activation_checkpointing != "none":
        got = f"got {engine.activation_checkpointing}: its blocks are timm's"
        raise ConfigError("activation_checkpointing", f"expected none {given}, {got}")
    if family == "timm" and config.method.method == "esvit":
        raise ConfigError("method", f"expected another than esvit {given}, which gives no regions")
    if family == "resnet" and model.drop_path_rate not in (0.0, ModelConfig.drop_path_rate):
        got = f"got {model.drop_path_rate:g}: it has no stochastic depth"
        raise ConfigError("drop_path_rate", f"expected 0 {given}, {got}")


def _validate_sharded(config: Config) -> None:
    """What sharded models cannot do."""
    mesh = f"with --mesh {config.engine.mesh}"
    if backbone_family(config.model.arch) != "vit":
        raise ConfigError("arch", f"expected a ViT {mesh}, got {config.model.arch}")
    if config.engine.cuda_graph:
        raise ConfigError("cuda_graph", f"expected false {mesh}: FSDP's steps are not recorded")
    if config.optim.optimizer in ("lars", "lamb"):
        got = f"got {config.optim.optimizer}, whose trust ratios need norms of whole tensors"
        raise ConfigError("optimizer", f"expected adamw or sgd {mesh}, {got}")
    if config.model.use_bn_in_head:
        raise ConfigError("use_bn_in_head", f"expected false {mesh}, got true")
    if config.model.bottleneck_dim == 0:
        raise ConfigError("bottleneck_dim", f"expected a bottleneck {mesh}, got 0")


def backbone_family(arch: str) -> str:
    """``vit``, ``resnet``, ``swin``, or ``timm`` for ``timm:NAME``; ConfigError with the nearest name for
    what is none of them.
    """
    arch = ALIASES.get(arch, arch)
    if arch.startswith("timm:"):
        return "timm"
    families: dict[str, Mapping[str, Any]] = {"vit": ARCHITECTURES, "resnet": RESNETS, "swin": SWINS}
    for family, members in families.items():
        if arch in members:
            return family
    known = [name for members in families.values() for name in members]
    raise ConfigError("arch", f"expected one of {', '.join(known)}, got {arch!r}{_nearest(arch, known)}")


def feature_width(model: ModelConfig) -> int:
    """Width of the features that the backbone gives to the head."""
    arch = ALIASES.get(model.arch, model.arch)
    if arch in RESNETS:
        return 32 * RESNETS[arch]
    return 8 * SWINS[arch][0] if arch in SWINS else backbone_shape(model)[0]


def backbone_shape(model: ModelConfig) -> tuple[int, int, int]:
    """``(width, depth, heads)`` of a ViT, overrides included."""
    width, depth, heads = ARCHITECTURES[model.arch]
    return model.embed_dim or width, model.depth or depth, model.num_heads or heads


_POSITIVE_INTEGERS = (
    "patch_size out_dim head_hidden_dim batch_size_per_gpu batch_size epochs max_steps max_bad_steps "
    "global_crops_size local_crops_size eval_bank_size eval_image_size log_every sinkhorn_iterations "
    "predictor_hidden_dim hidden_mlp feat_dim nmb_prototypes"
).split()
_NOT_NEGATIVE = (
    "bottleneck_dim warmup_teacher_temp_epochs weight_decay weight_decay_end clip_grad freeze_last_layer "
    "lr warmup_epochs min_lr local_crops_number num_workers eval_every saveckp_freq save_every seed "
    "teacher_temp warmup_teacher_temp epoch_queue_starts hang_timeout verify_every"
).split()
_POSITIVE = ("student_temp", "epsilon")
_FRACTIONS = ("momentum_teacher", "center_momentum")


def _validate_ranges(config: Config) -> None:
    flags = as_flags(config)
    rules: list[tuple[tuple[str, ...] | list[str], str, Callable[[Any], bool]]] = [
        (_POSITIVE_INTEGERS, "a positive integer", lambda value: value is None or value >= 1),
        (_NOT_NEGATIVE, "a number >= 0", lambda value: 0 <= value < math.inf),
        (_POSITIVE, "a number > 0", lambda value: 0 < value < math.inf),
        (_FRACTIONS, "a number from 0 to 1", lambda value: 0 <= value <= 1),
        (("drop_path_rate",), "a number >= 0 and < 1", lambda value: 0 <= value < 1),
        (("nb_knn",), "positive integers", lambda value: len(value) > 0 and min(value) >= 1),
        (("data_path", "output_dir"), "a path", lambda value: value != ""),
    ]
    for names, expected, holds in rules:
        for name in names:
            if not holds(flags[name]):
                raise ConfigError(name, f"expected {expected}, got {flags[name]!r}")
