"""Student and teacher in shards (FSDP2): every process keeps some rows of each parameter, of its gradient and
of its moments, and gathers whole parameters only while a model computes.

The parameters of a model form units, each gathered and reduced by one collective:

- the matrices of a block's linear layers, and those of the projection head's MLP, in the compute type;
- the prototypes, whose weight norm is computed from fp32, in fp32;
- the rest, a small part, in fp32: biases, norms, [CLS] token, position embeddings and patch projection.

So a matrix is rounded as autocast would round it, and nothing else is: forward and backward pass compute what
they compute without shards, to the bit. Gradients are averaged in fp32. With 16 bits a forward pass gathers 2
bytes for each parameter of the first kind and 4 for the others; under autocast alone it would be 4 for all.
The student stays gathered until its backward pass, and between the micro-batches of a step, so that it is
gathered once per step.
"""

from __future__ import annotations

import copy
import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastdino.methods.dino import DINO
from fastdino.models import Backbone, MultiCropModel, VisionTransformer

# Sharded teachers -> their backbones as plain modules without memory.
_plain_backbones: weakref.WeakKeyDictionary[nn.Module, Backbone] = weakref.WeakKeyDictionary()


def shard(method: DINO, mesh: tuple[int, int], *, device: torch.device, dtype: torch.dtype) -> None:
    """Deal the rows of student and teacher out to (replicas, shards) processes, in place and alike, so that
    the EMA needs no communication.

    ``dtype`` is the compute type; forward passes in 16 bits belong under its autocast. Parameters become
    DTensors: optimizers are made afterwards.
    """
    sizes, names = (mesh, ("replicate", "shard")) if mesh[0] > 1 else (mesh[1:], ("shard",))
    processes = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    plain = copy.deepcopy(method.teacher.backbone).to("meta")
    _shard_model(method.student, processes, dtype, gather_again=False)
    _shard_model(method.teacher, processes, dtype, gather_again=True)  # no backward pass waits for it
    _plain_backbones[method.teacher] = plain


def _shard_model(
    model: MultiCropModel, processes: DeviceMesh, dtype: torch.dtype, *, gather_again: bool
) -> None:
    assert isinstance(model.backbone, VisionTransformer)
    layers: list[nn.Module] = [*model.backbone.blocks, model.head.mlp]
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    matrices = {p for m in linear for p in m.parameters() if p.ndim == 2}
    prototypes = set(model.head.last_layer.parameters())
    rest = set(model.parameters()) - matrices - prototypes
    compute = None if dtype == torch.float32 else dtype
    # The whole model first: a block that came before it would take its norms and biases along.
    units: list[tuple[nn.Module, set[nn.Parameter], torch.dtype | None]] = [(model, rest, None)]
    units += [(layer, matrices, compute) for layer in layers]
    units += [(model.head.last_layer, prototypes, None)]
    for unit, members, kind in units:
        fully_shard(
            unit,
            mesh=processes,
            reshard_after_forward=gather_again,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            ignored_params=set(unit.parameters()) - members,
        )


def set_sync(student: nn.Module, last: bool) -> None:
    """Before each backward pass of a sharded student: is it the ``last`` one of the step? Only that one
    reduces the gradients, those of the passes before included, and lets go of the gathered parameters.
    """
    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(last)
    student.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters, where a forward pass left any: rows that change under them would not be
    seen by the next one.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Whole tensors under the names of ``module.state_dict()``, on the CPU of rank 0; {} elsewhere.

    ``module`` is a sharded model or a part of one. All processes take part.
    """
    state = {}
    for name, value in module.state_dict().items():  # FSDP hands out rows here, whatever is gathered
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            state[name] = whole.to("cpu", copy=True)
    return state


def gathered_backbone(teacher: MultiCropModel) -> Backbone | None:
    """The backbone of ``teacher`` as a plain module with its present weights: the very one if it is not
    sharded, else a copy on rank 0 and None elsewhere. All processes take part.
    """
    if teacher not in _plain_backbones:
        return teacher.backbone
    state = full_state(teacher.backbone)
    if not state:
        return None
    backbone = copy.deepcopy(_plain_backbones[teacher])
    backbone.to_empty(device=next(teacher.parameters()).device)
    backbone.load_state_dict(state)
    return backbone
