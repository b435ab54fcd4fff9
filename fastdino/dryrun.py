"""Size, cost and length of a run by arithmetic alone: nothing is built and torch is not imported.

Parameters are exact. FLOPs count matrix products, 2 per multiply-add, of one image's crops in student and
teacher. Memory is an estimate from the tensors that autograd keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdino import costs
from fastdino.config import (
    SWIN_PATCH,
    Config,
    ConfigError,
    ModelConfig,
    backbone_family,
    backbone_shape,
    feature_width,
    parse_mesh,
    split_batch,
)
from fastdino.switches import (
    has_dino_head,
    has_weight_norm,
    matches_regions,
    projector_widths,
    prototypes,
    queue_length,
    uses_predictor,
)

if TYPE_CHECKING:
    from rich.table import Table

# Bytes that one block keeps per token and channel for its backward pass, by --activation_checkpointing: the
# inputs of two norms (fp32 also under autocast), q, k and v, attention's output, the input of GELU.
_KEPT_16_BIT = {"none": 24.0, "selective": 16.0, "full": 4.0}
_KEPT_FP32 = {"none": 40.0, "selective": 24.0, "full": 4.0}
# What the loss holds, relative to the logits it never stores: measured with K = 65536 (kernels/README.md).
_LOSS_SHARE = 0.07
# Allocator and backward transients on top of what is kept: the ratio of the memory in Table 8 of the paper to
# such a count for the official code, the same from 0 to 10 local crops.
_TRANSIENTS = 1.16


@dataclass(frozen=True)
class Estimate:
    """Figures of a run; bytes are per process; ``images`` and what depends on it are None while unknown."""

    backbone_parameters: int
    head_parameters: int
    trainable_parameters: int  # of the student
    flops_per_image: float
    world_size: int
    global_batch: int
    micro_batch: int
    micro_batches: int
    images: int | None
    steps_per_epoch: int | None
    total_steps: int | None
    state_bytes: float
    activation_bytes: float
    loss_bytes: float

    @property
    def memory_bytes(self) -> float:
        """Estimated peak memory of one process."""
        return _TRANSIENTS * (self.state_bytes + self.activation_bytes + self.loss_bytes)

    @property
    def flops_of_run(self) -> float | None:
        """FLOPs of all processes over the whole run."""
        if self.total_steps is None:
            return None
        return self.flops_per_image * self.global_batch * self.total_steps


def estimate(config: Config, images: int | None, world_size: int = 1) -> Estimate:
    """Figures of ``config`` on ``images`` training images (None: unknown) and ``world_size`` processes.

    Raises ConfigError when the batch does not divide, and for backbones of timm, whose costs are not known.
    """
    if backbone_family(config.model.arch) == "timm":
        raise ConfigError("dry_run", f"expected a backbone of ours, got {config.model.arch}")
    global_batch, micro_batch, micro_batches = split_batch(config, world_size)
    steps_per_epoch = None if images is None else images // global_batch
    total_steps = None
    if steps_per_epoch is not None:
        total_steps = config.optim.epochs * steps_per_epoch
        if config.optim.max_steps is not None:
            total_steps = min(total_steps, config.optim.max_steps)
    backbone = backbone_parameters(config.model, config.crops.global_crops_size)
    head = _head(config)[0]
    last_layers = (1 + matches_regions(config)) * has_weight_norm(config)
    frozen = config.model.out_dim * last_layers if config.model.norm_last_layer else 0
    return Estimate(
        backbone_parameters=backbone,
        head_parameters=head,
        trainable_parameters=backbone + head - frozen,
        flops_per_image=flops_per_image(config),
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        images=images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        state_bytes=_state_bytes(config, backbone + head, world_size),
        activation_bytes=_activation_bytes(config, micro_batch),
        loss_bytes=_loss_bytes(config, micro_batch),
    )


def backbone_parameters(model: ModelConfig, image_size: int = 224) -> int:
    """Parameters of the backbone; the position embeddings of a ViT cover ``image_size`` pixels."""
    if backbone_family(model.arch) != "vit":
        return costs.parameters(model)
    width, depth, _ = backbone_shape(model)
    patch = model.in_chans * model.patch_size**2 * width + width
    positions = width + (_tokens(model, image_size)) * width  # class token, position embeddings
    return patch + positions + depth * (12 * width**2 + 13 * width) + 2 * width


def head_parameters(model: ModelConfig) -> int:
    """Parameters of the projection head, the gains of the last layer included."""
    products, width = _head_products(model)
    hidden = (model.head_layers - 1) * model.head_hidden_dim
    biases = hidden + model.bottleneck_dim
    norms = 2 * hidden if model.use_bn_in_head else 0
    return products + biases + norms + model.out_dim  # out_dim gains, or biases without a bottleneck


def flops_per_image(config: Config) -> float:
    """FLOPs of one image's training step: student forward and backward, teacher forward.

    The backward pass costs twice the forward pass, except that the images need no gradient.
    """
    crops = config.crops
    total = 0.0
    for size, student, teacher in (
        (crops.global_crops_size, 2, 2),
        (crops.local_crops_size, crops.local_crops_number, 0),
    ):
        patch, blocks = forward_flops(config.model, size)
        _, products, of_teacher = _head(config)
        rows = 1 + (_regions(config.model, size) if matches_regions(config) else 0)
        total += student * (2 * patch + 3 * (blocks + 2.0 * rows * products))
        if of_teacher is not None:
            total += teacher * (patch + blocks + 2.0 * rows * of_teacher)
    return total


def table(result: Estimate, config: Config) -> Table:
    """The estimate for a terminal."""
    from rich.table import Table

    crops, optim = config.crops, config.optim
    rows = Table(title="Dry run", show_header=False, title_justify="left")
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()

    rows.add_row("Backbone", f"{result.backbone_parameters:,} parameters ({_shape(config.model)})")
    width = f"embeddings of {projector_widths(config, 0)[-1]}"
    ends = f"{prototypes(config):,} prototypes" if prototypes(config) else width
    rows.add_row("Head", f"{result.head_parameters:,} parameters ({ends})")
    rows.add_row("Trained", f"{result.trainable_parameters:,} parameters of the student")
    views = [f"2 x {crops.global_crops_size}²{_note(config.model, crops.global_crops_size)}"]
    if crops.local_crops_number:
        note = _note(config.model, crops.local_crops_size)
        views.append(f"{crops.local_crops_number} x {crops.local_crops_size}²{note}")
    rows.add_row("Crops", " + ".join(views))
    cost = f"{result.flops_per_image / 1e9:,.1f} G"
    rows.add_row("FLOPs per image", f"{cost} (student forward and backward, teacher forward)")
    factors = f"{result.world_size} x {result.micro_batches} x {result.micro_batch}"
    rows.add_row("Batch", f"{result.global_batch:,} = {factors} (processes x micro-batches x images)")
    if result.images is None or result.steps_per_epoch is None or result.total_steps is None:
        rows.add_row("Steps", f"{optim.epochs} epochs; give --data_path to count the steps")
    else:
        rows.add_row("Images", f"{result.images:,}")
        rows.add_row(
            "Steps", f"{result.total_steps:,} ({optim.epochs} epochs of {result.steps_per_epoch:,} steps)"
        )
        rows.add_row("FLOPs of the run", f"{(result.flops_of_run or 0.0) / 1e15:,.2f} P")
    kind = "16 bit" if _half(config) else "fp32"
    rows.add_row(
        "Memory, estimated",
        f"{result.memory_bytes / 1e9:.2f} GB per process in {kind} (weights, gradients and optimizer "
        f"{result.state_bytes / 1e9:.2f}, activations {result.activation_bytes / 1e9:.2f}, "
        f"loss {result.loss_bytes / 1e9:.2f}, x {_TRANSIENTS} for transients)",
    )
    return rows


def _shape(model: ModelConfig) -> str:
    if backbone_family(model.arch) != "vit":
        return f"{model.arch}: features {feature_width(model)} wide"
    width, depth, heads = backbone_shape(model)
    return f"{model.arch}/{model.patch_size}: {depth} blocks, {width} wide, {heads} heads"


def _note(model: ModelConfig, size: int) -> str:
    return f" ({_tokens(model, size)} tokens each)" if backbone_family(model.arch) == "vit" else ""


def _tokens(model: ModelConfig, size: int) -> int:
    """Tokens of a square crop in a ViT, the class token included."""
    return (size // model.patch_size) ** 2 + 1


def _regions(model: ModelConfig, size: int) -> int:
    """Regions of a square crop: patches of a ViT, places of the last map of a Swin or ResNet."""
    family = backbone_family(model.arch)
    if family == "vit":
        return _tokens(model, size) - 1
    side = size // SWIN_PATCH if family == "swin" else (size + 3) // 4
    return math.ceil(side / 8) ** 2


def _head_products(model: ModelConfig) -> tuple[int, int]:
    """``(weights of all linear layers of the head, width in front of the last one)``."""
    width = feature_width(model)
    weights = 0
    for _ in range(model.head_layers - 1):
        weights += width * model.head_hidden_dim
        width = model.head_hidden_dim
    if model.bottleneck_dim:
        weights += width * model.bottleneck_dim
        width = model.bottleneck_dim
    return weights + width * model.out_dim, width


def _head(config: Config) -> tuple[int, int, int | None]:
    """``(parameters, multiply-adds per view or region)`` of the student's head or heads, and the latter of
    the teacher's: None without a teacher.
    """
    switches, model = config.method, config.model
    dino, width = switches.method in ("dino", "esvit"), feature_width(config.model)
    use_bn = model.use_bn_in_head if dino else True
    if has_dino_head(config):
        parameters, products = head_parameters(model), _head_products(model)[0]
        parameters *= 1 + matches_regions(config)
    else:
        widths = projector_widths(config, width)
        parameters, products = _mlp(widths, use_bn, last_bias=switches.method != "byol")
        products += widths[-1] * prototypes(config)
        parameters += widths[-1] * prototypes(config)
    teacher = None if switches.method == "swav" else products
    if uses_predictor(config):
        d = projector_widths(config, width)[-1]
        more = _mlp((d, switches.predictor_hidden_dim, d), use_bn, last_bias=switches.method != "byol")
        parameters, products = parameters + more[0], products + more[1]
    return parameters, products, teacher


def _mlp(widths: tuple[int, ...], use_bn: bool, *, last_bias: bool) -> tuple[int, int]:
    """``(parameters, multiply-adds)`` of an MLP with batch norm, if any, on its hidden layers."""
    products = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    hidden = sum(widths[1:-1])
    return products + hidden + 2 * hidden * use_bn + widths[-1] * last_bias, products


def forward_flops(model: ModelConfig, size: int) -> tuple[float, float]:
    """``(what sees the pixels, the rest)`` of one crop; per block of a ViT linear layers 24 N D^2, attention
    4 N^2 D.
    """
    if backbone_family(model.arch) != "vit":
        return costs.costs(model, size, 0.0)[:2]
    width, depth, _ = backbone_shape(model)
    tokens = _tokens(model, size)
    patch = 2.0 * (tokens - 1) * width * model.in_chans * model.patch_size**2
    return patch, depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)


def _half(config: Config) -> bool:
    return config.optim.use_fp16 and config.optim.precision != "fp32"


def _state_bytes(config: Config, parameters: int, world_size: int) -> float:
    """Student, teacher, gradients and optimizer in fp32, prototypes after their weight norm; for each
    parameter also 16-bit copies in both models and a bucket of the gradients, or of a sharded model what is
    gathered of the student.
    """
    own = 12 + (8 if config.optim.optimizer in ("adamw", "lamb") else 4)
    half = _half(config)
    mesh = parse_mesh(config.engine.mesh, world_size)
    per_parameter: float
    if mesh is None:
        per_parameter = own + (4 if half else 0) + (4 if world_size > 1 else 0)
    else:
        per_parameter = own / mesh[1] + (2 if half else 4)
    model = config.model
    last_layers = 2 * 4 * model.out_dim * model.bottleneck_dim if has_weight_norm(config) else 0
    last_layers *= 1 + matches_regions(config)
    queue = 4 * queue_length(config) * projector_widths(config, 0)[-1]
    return float(per_parameter * parameters + last_layers + queue)


def _activation_bytes(config: Config, batch: int) -> float:
    """Crops and what the backbone keeps for its backward pass."""
    crops = config.crops
    total = 0.0
    for number, size in ((2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)):
        total += number * (4.0 * config.model.in_chans * size**2 + _kept_bytes(config, size))
    return batch * total


def _kept_bytes(config: Config, size: int) -> float:
    """Of one crop: what blocks keep and the row statistics of attention, or the maps of a ResNet."""
    kept = (_KEPT_16_BIT if _half(config) else _KEPT_FP32)[config.engine.activation_checkpointing]
    if backbone_family(config.model.arch) != "vit":
        found = costs.costs(config.model, size, kept)
        return found.kept_elements * (2 if _half(config) else 4) + found.kept_bytes
    width, depth, heads = backbone_shape(config.model)
    return depth * _tokens(config.model, size) * (kept * width + 4.0 * heads)


def _loss_bytes(config: Config, batch: int) -> float:
    """A share of what the fp32 logits of all student and teacher views would take; all of them and as much
    again for targets and gradients where the loss needs logits.
    """
    crops = config.crops
    rows = batch * (2 + crops.local_crops_number + 2)
    if matches_regions(config):
        of_global, of_local = (
            _regions(config.model, size) for size in (crops.global_crops_size, crops.local_crops_size)
        )
        rows += batch * (4 * of_global + crops.local_crops_number * of_local)
    stored = (
        config.method.teacher_op != "center" or config.method.method == "swav" or not config.loss.teacher_temp
    )
    return (2.0 if stored else _LOSS_SHARE) * 4 * rows * prototypes(config)
