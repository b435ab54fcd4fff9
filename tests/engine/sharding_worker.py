"""What the processes of test_sharding.py run: every check asked for, one after another, on tiny sharded
models beside whole ones. Rank 0 notes which have passed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino.config import Config
from fastdino.engine import parallel, rows, sharding
from fastdino.engine.optim import Updater
from fastdino.methods.dino import DINO
from fastdino.models import MultiCropModel
from runs import place, redirect

K, IMAGES = 49, 4  # prototypes, whose rows do not divide evenly; images of a process
PLACE = parallel.device_of("auto")


class Scalars(NamedTuple):
    lr: float = 0.002
    weight_decay: float = 0.1
    momentum: float = 0.6


class Run:
    """A method and its updater, sharded over ``mesh`` or whole, always with the same weights. ``gains`` of
    the prototypes are trained; ``change`` happens before sharding.
    """

    def __init__(
        self,
        mesh: tuple[int, int] | None,
        *,
        dtype: torch.dtype = torch.float32,
        clip: float = 0.0,
        drop: float = 0.0,
        gains: bool = False,
        change: Callable[[DINO], None] = lambda method: None,
    ):
        config = Config()
        model = config.model
        model.arch, model.embed_dim, model.depth, model.num_heads, model.patch_size = "vit_tiny", 32, 2, 2, 8
        model.out_dim, model.head_hidden_dim, model.bottleneck_dim, model.drop_path_rate = K, 48, 16, drop
        model.norm_last_layer = not gains
        config.crops.global_crops_size, config.crops.local_crops_size = 32, 16
        config.optim.clip_grad = clip
        torch.manual_seed(0)
        self.method, self.dtype = DINO(config), dtype
        with torch.no_grad():  # weights that lie far from the student's
            for p in self.method.teacher.parameters():
                p.add_(0.02 * torch.randn_like(p))
        change(self.method.to(PLACE))
        if mesh is not None:
            sharding.shard(self.method, mesh, device=PLACE, dtype=dtype)
        self.updater = Updater(self.method.student, self.method.teacher, config.optim)

    def backward(self, crops: tuple[Tensor, Tensor], *, frozen: bool = False, last: bool = True) -> None:
        with torch.autocast(PLACE.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out = self.method(*crops, teacher_temp=0.04, freeze_last_layer=frozen)
        self.updater.set_sync(last)
        out.loss.backward()
        self.loss, self.batch_center = out.loss.detach(), out.statistics

    def step(self, *batches: tuple[Tensor, Tensor], frozen: bool = False, parts: int = 1) -> bool:
        """An update from ``batches``, on ``parts`` processes; whether a gradient was not finite."""
        self.updater.zero_grad()
        center = torch.zeros(K, device=PLACE)
        for i, crops in enumerate(batches):
            self.backward(crops, frozen=frozen, last=i + 1 == len(batches))
            center += self.batch_center / (len(batches) * parts)
        if parts > 1:
            dist.all_reduce(center)
        found = self.updater.step(Scalars(), grad_scale=float(len(batches)))
        self.method.update(center, found)
        return bool(found)

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(x) for name, x in self.method.state_dict().items()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor().clone() if hasattr(x, "full_tensor") else x.clone()


def crops(seed: int, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Two global and three local views of each image, view-major."""
    g = torch.Generator().manual_seed(seed)
    sizes = (2 * images, 3, 32, 32), (3 * images, 3, 16, 16)
    a, b = (torch.randn(size, generator=g).to(PLACE) for size in sizes)
    return a, b


def part_of(batch: tuple[Tensor, Tensor], i: int, n: int) -> tuple[Tensor, Tensor]:
    """The images of process ``i`` of ``n``."""
    a, b = (x.unflatten(0, (n_views, -1)).chunk(n, 1)[i].flatten(0, 1) for n_views, x in enumerate(batch, 2))
    return a, b


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not same(a[name], b[name])]
    assert not different, different


def same(x: Tensor, y: Tensor) -> bool:
    """Bitwise; on a GPU, where the order of sums may change from call to call, nearly."""
    return torch.equal(x, y) if PLACE.type == "cpu" else torch.allclose(x, y, rtol=1e-3, atol=1e-5)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        if name.endswith("qkv.bias"):  # the keys' gradient is 0 but for rounding, which Adam blows up
            x, y = (torch.cat([z[: len(z) // 3], z[2 * len(z) // 3 :]]) for z in (x, y))
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


class Collectives(TorchDispatchMode):
    """Counts them by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.gathered += "gather" in func.name()
            self.reduced += "reduce" in func.name()
        return func(*args, **(kwargs or {}))


def mesh() -> tuple[int, int]:
    size = dist.get_world_size()
    return (2, size // 2) if size > 2 else (1, size)


def the_same_batch_gives_the_same_bits() -> None:
    """Equal gradients average to themselves: shards, gathering in 16 bits and freezing change no bit."""
    for dtype in (torch.float32, torch.bfloat16):
        sharded, plain = (Run(m, dtype=dtype, drop=0.2) for m in (mesh(), None))
        for step in range(3):
            for run in (sharded, plain):
                torch.manual_seed(step)  # of the stochastic depth
                run.step(crops(step), crops(10 + step), frozen=step in (0, 2))
            assert same(sharded.loss, plain.loss)
        assert_equal(sharded.weights(), plain.weights())


def parts_of_a_batch_give_the_whole_update() -> None:
    """Clipping bites; two micro-batches; the last layer is frozen first. The order of the sums differs."""
    size, rank = dist.get_world_size(), dist.get_rank()
    sharded, plain = (Run(m, clip=0.05, gains=True) for m in (mesh(), None))
    before = plain.weights()
    for step in range(4):
        batches = [crops(2 * step + i, size * IMAGES) for i in (0, 1)]
        sharded.step(*(part_of(b, rank, size) for b in batches), frozen=step == 0, parts=size)
        plain.step(*batches, frozen=step == 0)
    assert_close(sharded.weights(), plain.weights(), 1e-5)
    moved = {name: (x - before[name]).abs().max() for name, x in plain.weights().items()}
    assert all(x > 1e-3 for x in moved.values()), moved


def what_is_gathered_in_16_bits() -> None:
    """Only what autocast would round. The shards, the gradients and their sums over processes are fp32."""
    (run, plain), seen = (Run(m, dtype=torch.bfloat16) for m in (mesh(), None)), {}

    def look(module: nn.Module, *_: object) -> None:
        seen.update({name: p.dtype for name, p in run.method.student.named_parameters()})

    run.method.student.head.last_layer.register_forward_hook(look)
    for each in (run, plain):
        each.backward(crops(dist.get_rank()))
    rounded = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    layers = [f"head.mlp.{i}" for i in (0, 2, 4)]
    for i in (0, 1):
        layers += [f"backbone.blocks.{i}.{x}" for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert rounded == {f"{layer}.weight" for layer in layers}, rounded
    for p, q in zip(run.updater.parameters, plain.updater.parameters, strict=True):
        assert p.dtype == torch.float32 and p.grad is not None and q.grad is not None
        assert same(whole(p.grad), parallel.sum_(q.grad) / dist.get_world_size())


def only_the_last_micro_batch_communicates() -> None:
    """But for the teacher, which is gathered by each."""
    run = Run(mesh())
    run.step(crops(0))
    units = len([m for m in run.method.student.modules() if isinstance(m, FSDPModule)])
    run.updater.zero_grad()
    counts = []
    for last in (False, False, True):
        with Collectives() as mode:
            run.backward(crops(1), last=last)
        counts.append((mode.gathered, mode.reduced))
        assert all((p.grad is None) is not last for p in run.updater.parameters)
    reductions = units * (1 if mesh()[0] == 1 else 2)
    assert counts == [(2 * units, 0), (units, 0), (units, reductions)], counts


def the_teacher_sees_its_average() -> None:
    """A forward pass that leaves parameters gathered would hide the update of the rows from the next one."""
    run, images = Run(mesh()), crops(0)[0]
    teacher = run.method.teacher

    def features() -> Tensor:
        with torch.no_grad():
            return teacher([images])[0].clone()

    def average() -> None:
        with torch.no_grad():
            for row in handles:
                row.mul_(0.5)

    handles = [rows.local(p) for p in teacher.parameters()]
    first = features()
    average()
    second = features()
    assert not same(first, second)
    assert isinstance(teacher, FSDPModule)
    teacher.set_reshard_after_forward(False)
    assert same(features(), second)
    average()
    assert same(features(), second)  # the trap
    sharding.reshard(teacher)
    third = features()
    assert not same(third, second)
    plain = Run(None)
    with torch.no_grad():
        for p in plain.method.teacher.parameters():
            p.mul_(0.25)
        assert same(plain.method.teacher([images])[0], third)
    teacher.set_reshard_after_forward(False)
    features()
    before = run.weights()
    run.step(crops(1))  # the updater lets go of what was gathered
    assert same(features(), as_whole(run)([images])[0])
    assert not torch.equal(run.weights()["teacher.backbone.cls_token"], before["teacher.backbone.cls_token"])


def as_whole(run: Run) -> MultiCropModel:
    """The teacher that the rows make up."""
    plain = Run(None).method
    plain.load_state_dict(run.weights())
    return plain.teacher


def rows_that_are_not_here() -> None:
    """The [CLS] token has one row, on one process; all of them see its gradient's norm and refuse its NaN."""
    run = Run(mesh(), clip=0.05)
    run.step(crops(0))
    names = [run.updater.names[p] for p in run.updater.parameters]
    position = names.index("backbone.cls_token")
    token = run.updater.parameters[position]
    here = rows.local(token).numel() > 0
    holders = parallel.sum_(torch.tensor(float(here), device=PLACE))
    assert holders == mesh()[0] < dist.get_world_size()
    for bad in (0.0, float("nan")):
        run.updater.zero_grad()
        run.backward(crops(1))
        assert token.grad is not None
        expected = torch.stack([whole(p.grad).norm() for p in run.updater.parameters if p.grad is not None])
        grads = [rows.local(p.grad) for p in run.updater.parameters if p.grad is not None]
        if here:
            grads[position].add_(bad)
        before = run.weights()
        optimizer = run.updater.optimizer
        with mock.patch.object(optimizer, "step", wraps=optimizer.step) as step:
            assert bool(run.updater.step(Scalars())) is (bad != 0)
        norms = step.call_args.kwargs["norms"]
        if bad:
            assert norms.isfinite().tolist() == [i != position for i in range(len(names))]
            assert_equal(run.weights(), before)
        else:
            torch.testing.assert_close(norms.float(), expected, rtol=1e-6, atol=0)
            assert (expected > 0.05).any()


def a_frozen_layer_has_no_state() -> None:
    """Optimizer state goes by name; a run that continues from it trains on as if it had not stopped."""
    through, stopped = Run(mesh()), Run(mesh())
    for run in (through, stopped):
        run.step(crops(0), frozen=True)
        run.step(crops(1), frozen=True)
    state = stopped.updater.state()
    assert state and not any("last_layer" in name for name in state)
    complete = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            complete[name] = value
            continue
        pieces: list = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, (value.start, value.local))
        distinct = dict(pieces) | {start: x for start, x in pieces if len(x)}
        complete[name] = torch.cat([distinct[start] for start in sorted(distinct)])
        assert len(complete[name]) == value.rows
    again = Run(mesh())
    for name, x in stopped.weights().items():
        rows.assign(again.method.state_dict()[name], x)
    again.updater.load_state(complete)
    for run in (through, again):
        run.step(crops(2), frozen=True)
        run.step(crops(3))
    assert_equal(again.weights(), through.weights())
    assert any("last_layer" in name for name in again.updater.state())


def whole_weights_come_and_go_unchanged() -> None:
    run, target = Run(mesh(), dtype=torch.bfloat16), Run(None).method.student
    run.backward(crops(0))
    with torch.no_grad(), torch.autocast(PLACE.type, dtype=torch.bfloat16):
        run.method.student([crops(0)[0]])  # stays gathered, in 16 bits
    state = sharding.full_state(run.method.student)
    assert (len(state) > 0) is (dist.get_rank() == 0)
    if state:
        assert all(torch.equal(state[name], x.cpu()) for name, x in target.state_dict().items())
    part = sharding.full_state(run.method.student.backbone)
    assert part.keys() == {x.removeprefix("backbone.") for x in state if x.startswith("backbone.")}
    new = {name: torch.randn_like(x) for name, x in target.state_dict().items()}
    for name, x in new.items():
        dist.broadcast(x, 0)
        rows.assign(run.method.student.state_dict()[name], x)
    state = sharding.full_state(run.method.student)
    assert all(torch.equal(x, new[name].cpu()) for name, x in state.items())
    target.load_state_dict(new)
    images = [crops(3)[0]]
    with torch.no_grad(), torch.autocast(PLACE.type, dtype=torch.bfloat16):
        assert same(run.method.student(images)[0], target(images)[0])


def a_plain_backbone_for_evaluation() -> None:
    run = Run(mesh())
    for step in range(2):
        run.step(crops(step))
    backbone, images = sharding.gathered_backbone(run.method.teacher), crops(9)[0]
    assert (backbone is None) is (dist.get_rank() > 0)
    expected = as_whole(run).backbone(images)
    if backbone is not None:
        assert not any(isinstance(m, FSDPModule) for m in backbone.modules())
        assert not any(p.requires_grad for p in backbone.parameters())
        assert backbone.get_last_selfattention(images).shape == (len(images), 2, 17, 17)
        with torch.no_grad():
            assert same(backbone(images), expected)
    whole_model = Run(None).method.teacher
    assert sharding.gathered_backbone(whole_model) is whole_model.backbone


def recomputed_blocks_are_the_same() -> None:
    plain = Run(None, drop=0.2)
    runs = [
        Run(
            mesh(),
            drop=0.2,
            change=lambda method, kind=kind: setattr(method.student.backbone, "checkpointing", kind),
        )
        for kind in ("selective", "full")
    ]
    for step in range(2):
        for run in (plain, *runs):
            torch.manual_seed(step)
            run.step(crops(step), crops(10 + step))
    for run in runs:
        assert_equal(run.weights(), plain.weights())


def compiled_blocks_are_the_same() -> None:
    """torch.compile takes every block whole, below FSDP."""

    def compiled(method: DINO) -> None:
        for model in (method.student, method.teacher):
            model.backbone.compile_blocks(backend="aot_eager")

    torch._dynamo.reset()
    runs = [Run(mesh(), change=change) for change in (compiled, lambda method: None)]
    for step in range(3):
        for run in runs:
            run.step(crops(step), crops(10 + step), frozen=step == 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_close(runs[0].weights(), runs[1].weights(), 1e-6)


def run_checks(names: list[str], noted: Path, log: Path, rank: int, processes: int, port: int) -> None:
    redirect(log, 1, 2)
    if processes == 1:  # on the GPU of a machine with one
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    place(rank, processes, port)
    torch.set_num_threads(1)
    world = parallel.start()
    if processes == 1:
        dist.init_process_group("nccl")
    for name in names:
        globals()[name]()
        dist.barrier()
        if world.main:
            with noted.open("a") as file:
                file.write(name + "\n")
    parallel.stop()
