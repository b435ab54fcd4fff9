"""From a configuration to a step that can train: the model, its speed options, its place on the processes."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdino.config import Config, ConfigError, backbone_family, backbone_shape, parse_mesh
from fastdino.engine import parallel, rows
from fastdino.engine.checkpoint import Piece
from fastdino.engine.graph import GraphStep
from fastdino.engine.optim import Updater
from fastdino.engine.step import TrainStep
from fastdino.methods import DINO, Method, build_method
from fastdino.models import Backbone, ResNet, TimmBackbone, VisionTransformer
from fastdino.models.attention import describe_attention, resolve_attention
from fastdino.models.batch_norm import synchronise_batch_norm
from fastdino.models.linear import attach_low_precision


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type GEMMs run in: ``--precision``, or what the hardware is best at."""
    return hardware_dtype(config.optim.precision, device) if config.optim.use_fp16 else torch.float32


def hardware_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The type called ``choice``, fp32, bf16 or fp16; for auto the fastest one that ``device`` multiplies."""
    if choice != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@dataclass
class Engine:
    """What trains: ``step`` moves the weights of ``method`` through ``updater``."""

    method: Method
    updater: Updater
    step: TrainStep
    dtype: torch.dtype
    attention: str
    """Name of the attention kernels that run, for people."""

    def state(self) -> dict[str, Tensor | Piece]:
        """Weights of student and teacher, buffers, center and queue by name; of a sharded model the rows of
        this process.
        """
        return {name: rows.piece(value, value) for name, value in self.method.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take whole tensors under the names of :meth:`state`. Raises ValueError naming one that is missing,
        unknown or of another shape; nothing has changed then.
        """
        mine = self.method.state_dict()
        for name in mine.keys() | state.keys():
            expected = tuple(mine[name].shape) if name in mine else "no such tensor"
            got = tuple(state[name].shape) if name in state else "none"
            if expected != got:
                raise ValueError(f"model state {name}: expected {expected}, got {got}")
        for name, value in mine.items():
            rows.assign(value, state[name])
        self.updater.refresh_copies()

    def evaluated_backbone(self) -> Backbone | None:
        """The backbone to evaluate, the teacher's or the student's by the method, as a plain module: on rank
        0 if it must be gathered, which all processes have to take part in.
        """
        if not self.updater.sharded:
            return getattr(self.method, self.method.evaluated).backbone
        from fastdino.engine import sharding

        assert isinstance(self.method, DINO)
        return sharding.gathered_backbone(self.method.teacher)


def build(config: Config, world: parallel.World | None = None, *, accumulate: int = 1) -> Engine:
    """Model, optimizer and step on this process, all seeded by ``--seed``.

    Raises ConfigError naming the flag that this machine or the number of processes cannot serve.
    """
    world = world or parallel.World(0, 1, parallel.device_of(config.run.device))
    device, engine = world.device, config.engine
    if device.type == "cpu":
        keep_freed_memory()
    dtype = compute_dtype(config, device)
    attention = _attention(config, device, dtype)
    mesh = parse_mesh(engine.mesh, world.size)
    _check(config, world)

    torch.manual_seed(config.run.seed)
    method = build_method(config).to(device)
    if world.size > 1:  # batch statistics over all processes, as officially
        synchronise_batch_norm(method)
    if not isinstance(method.student.backbone, (ResNet, TimmBackbone)):
        method.student.backbone.checkpointing = engine.activation_checkpointing
    by_itself = device.type == "cuda" and attention != "xformers"  # whose masks cannot be traced
    compiled = engine.compile == "on" or (engine.compile == "auto" and by_itself)
    copies: dict[nn.Parameter, Tensor] = {}
    for model in (method.student, method.teacher):
        if model is None:
            continue
        if mesh is None and dtype != torch.float32:
            copies |= attach_low_precision(model, dtype)
        if isinstance(model.backbone, VisionTransformer):
            model.backbone.set_attention(attention)
            if compiled:
                model.backbone.compile_blocks()
    if mesh is not None:
        from fastdino.engine import sharding  # imports the FSDP of torch, which takes a second

        assert isinstance(method, DINO)
        sharding.shard(method, mesh, device=device, dtype=dtype)

    lagging = config.method.teacher == "prev_iter"
    updater = Updater(method.student, method.teacher, config.optim, copies=copies, lagging=lagging)
    replicated = world.size > 1 and mesh is None
    reducer = parallel.GradientBuckets(updater.parameters) if replicated else None
    kind = GraphStep if engine.cuda_graph else TrainStep
    step = kind(method, updater, dtype=dtype, accumulate=accumulate, reducer=reducer)
    vit = isinstance(method.student.backbone, VisionTransformer)
    described = describe_attention(attention, device=device, dtype=dtype) if vit else attention
    return Engine(method, updater, step, dtype, described)


def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it allocates next, instead of returning it to the system.

    Every step on a CPU frees and allocates the same large tensors. By default glibc asks the system for each
    of them anew, which then clears its pages one by one at their first touch.
    """
    trim_threshold, mmap_max = -1, -4  # of <malloc.h>
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(mmap_max, 0)  # large blocks come from the heap as well,
        mallopt(trim_threshold, -1)  # which never shrinks


def _attention(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that computes a ViT's attention; a Swin leaves the choice to PyTorch, others have none of
    ours.
    """
    if backbone_family(config.model.arch) != "vit":
        return "sdpa" if backbone_family(config.model.arch) == "swin" else "none"
    width, _, heads = backbone_shape(config.model)
    return resolve_attention(config.engine.attention, device=device, dtype=dtype, head_dim=width // heads)


def _check(config: Config, world: parallel.World) -> None:
    """Refuse what this device cannot do."""
    if world.device.type == "cuda":
        if config.run.verify_every:
            raise ConfigError(
                "verify_every", "expected 0: that a GPU computes a step twice with the same bits is not shown"
            )
        return
    if config.engine.cuda_graph:
        raise ConfigError("cuda_graph", "expected false: this run has no CUDA device")
