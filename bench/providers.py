"""The training steps that the benchmarks compare: the official code's, plain eager PyTorch's and ours, built
from the same seed, on the same tensors.

A provider is described by a few words, so that a fresh process can build it too, in which its memory is
measured alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import official
from bench.eager_step import EagerStep
from bench.harness import Transcript, interleave, synchronize
from bench.machine import DTYPES, best, device, exact, half
from fastdino.config import Config, backbone_shape, with_flags
from fastdino.data.loader import Crops
from fastdino.dryrun import flops_per_image
from fastdino.engine.build import build, keep_freed_memory
from fastdino.engine.optim import Updater
from fastdino.engine.schedules import Hyper
from fastdino.engine.step import TrainStep
from fastdino.methods.dino import DINO
from fastdino.models.attention import resolve_attention

HYPER = Hyper(lr=2e-5, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, freeze_last_layer=False)
TOY = dict(
    arch="vit_tiny",
    embed_dim=32,
    depth=2,
    num_heads=2,
    patch_size=8,
    out_dim=256,
    head_hidden_dim=32,
    bottleneck_dim=16,
    global_crops_size=32,
    local_crops_size=16,
)


@dataclass(frozen=True)
class Problem:
    """A network and its crops. ``toy`` replaces all sizes but batch and number of local crops by tiny ones.

    Stochastic depth is off: with it the sides would not compute the same.
    """

    batch: int
    local: int = 8
    arch: str = "vit_small"
    patch_size: int = 16
    out_dim: int = 65536
    toy: bool = False

    def config(self, flags: Mapping[str, Any]) -> Config:
        own = dict(arch=self.arch, patch_size=self.patch_size, out_dim=self.out_dim)
        own |= dict(local_crops_number=self.local, batch_size_per_gpu=self.batch, drop_path_rate=0.0)
        return with_flags(Config(), own | (TOY if self.toy else {}) | dict(flags))

    def crops(self) -> Crops:
        sizes, place = self.config({}).crops, device()
        generator = torch.Generator(place).manual_seed(1)
        number = {sizes.global_crops_size: 2 * self.batch, sizes.local_crops_size: self.local * self.batch}
        images = [torch.randn(n, 3, s, s, device=place, generator=generator) for s, n in number.items() if n]
        return Crops(images[0], images[1] if self.local else None, torch.arange(self.batch))

    def flops(self) -> float:
        """FLOP of one step."""
        return flops_per_image(self.config({})) * self.batch

    def __str__(self) -> str:
        name = "toy" if self.toy else f"{self.arch}/{self.patch_size}, 2x224+{self.local}x96"
        return f"{name}, batch {self.batch}, K {self.config({}).model.out_dim}"


@dataclass(frozen=True)
class Provider:
    """``side`` is official, eager, train_step (ours without what `fastdino.engine.build` adds) or fastdino;
    ``options`` are `EagerStep`'s, and ``keep`` of train_step: that its process keeps the memory it frees;
    ``flags`` are those of the configuration.
    """

    side: str
    dtype: str = "fp32"
    options: Mapping[str, bool] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)

    def start(self, problem: Problem, checkout: Path | None) -> Callable[[Crops], float]:
        """Builds it. Called with crops it makes a step and returns the loss, for which it waits."""
        config, dtype = problem.config({"precision": self.dtype, **self.flags}), DTYPES[self.dtype]
        if self.side == "fastdino":
            return EngineStep(build(config).step)
        torch.manual_seed(config.run.seed)
        method = DINO(config)
        if self.side == "official":
            assert checkout is not None
            code = official.load(checkout)
            return official.OfficialStep(code, config, method, HYPER, device(), use_fp16=self.dtype == "fp16")
        method.to(device())
        width, _, heads = backbone_shape(config.model)
        attention = resolve_attention(
            config.engine.attention, device=device(), dtype=dtype, head_dim=width // heads
        )
        for model in (method.student, method.teacher):
            model.backbone.set_attention(attention)
        if self.side == "train_step":
            if self.options.get("keep"):
                keep_freed_memory()
            return EngineStep(
                TrainStep(method, Updater(method.student, method.teacher, config.optim), dtype=dtype)
            )
        return EagerStep(method, HYPER, clip=config.optim.clip_grad, dtype=dtype, **self.options)


class EngineStep:
    """Our step, which need not wait: ``run`` makes several."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step

    def __call__(self, crops: Crops) -> float:
        return self.step.run(iter([crops]), HYPER).loss

    def run(self, crops: Crops, steps: int) -> None:
        for _ in range(steps):
            self.step.enqueue(iter([crops]), HYPER)
            self.step.ring.take()


def steps(step: Callable[[Crops], float], crops: Crops, number: int) -> Callable[[], None]:
    """``number`` steps as one call, in which the host waits where the step itself does."""

    def call() -> None:
        if isinstance(step, EngineStep):
            step.run(crops, number)
        else:
            for _ in range(number):
                step(crops)

    return call


def standard(checkout: Path | None) -> dict[str, Provider]:
    """Who takes part in a comparison of whole steps; the last one is ours.

    The official code runs as its defaults have it: fp16 on a GPU, while a CPU can only run it in fp32.
    """
    found = {}
    if checkout is not None:
        dtype = "fp16" if device().type == "cuda" else "fp32"
        found[f"official {dtype}"] = Provider("official", dtype)
    found[f"eager {best()}"] = Provider("eager", best())
    fast = {"cuda_graph": True} if device().type == "cuda" else {}
    found[f"fastdino {best()}"] = Provider("fastdino", best(), flags=fast)
    return found


def gate(problem: Problem, providers: Mapping[str, Provider], checkout: Path | None) -> str:
    """All sides compute the same loss and the same update in fp32, in a batch of 2; SystemExit otherwise.

    AdamW's first step moves a weight by lr * sign(gradient): where a gradient is rounding noise, two results
    may differ by 2 lr. The keys' part of a qkv bias has no gradient but rounding noise.
    """
    small = Problem(**asdict(problem) | {"batch": 2})
    crops, said = small.crops(), []
    plain = dict(compile="off", cuda_graph=False)

    def first_step(provider: Provider) -> tuple[float, dict[str, Tensor]]:
        step = provider.start(small, checkout)
        with exact():
            loss = step(crops)
        student = step.step.method.student if isinstance(step, EngineStep) else step.student  # type: ignore[attr-defined]
        return loss, {n: p.detach() for n, p in student.named_parameters() if not n.endswith("qkv.bias")}

    loss, weights = first_step(Provider("fastdino", flags=plain))
    done = []
    for name, provider in providers.items():
        alike = Provider(provider.side, "fp32", provider.options, {**provider.flags, **plain})
        if provider.side == "fastdino" or alike in done:
            continue
        done.append(alike)
        other_loss, other_weights = first_step(alike)
        error = abs(other_loss - loss) / abs(loss)
        moved = max(float((other_weights[n] - w).abs().max()) for n, w in weights.items())
        said.append(f"{name} {other_loss:.6f} (weights {moved:.0e})")
        if not (error <= 1e-4 and moved <= 2.1 * HYPER.lr):
            raise SystemExit(f"loss {loss:.6f}, but {said[-1]}: the steps disagree, nothing is timed")
    return f"correctness, fp32, batch 2: loss {loss:.6f}; {', '.join(said)}"


# --------------------------------------------------------------------------------------------------- memory


def memory() -> dict[str, int]:
    """Resident bytes of this process and their largest number so far (Linux)."""
    # Not ru_maxrss: a process inherits that one from its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": 1024 * int(kib["VmRSS"]), "peak": 1024 * int(kib["VmHWM"])}


def living_bytes() -> int:
    """Bytes of all tensors there are, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    # Not by address: what torch.compile leaves behind has none.
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def load_libraries() -> None:
    """What PyTorch loads on first use, which is no part of a step: the products' library, its compiler."""
    layer = torch.nn.Linear(64, 64)
    for dtype in [torch.float32] + [d for d in [half()] if d is not None]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            layer(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def alone(
    provider: Provider, problem: Problem, checkout: Path | None
) -> tuple[Callable[[Crops], float], float, dict[str, int]]:
    """The provider after two steps, the first one's loss, and what these, its network and its crops add to
    the memory of this process: the peak, and the tensors that are there between steps.
    """
    load_libraries()
    before, tensors = memory()["now"], living_bytes()
    step, crops = provider.start(problem, checkout), problem.crops()
    loss = step(crops)
    step(crops)
    found = {"peak_bytes": max(1, memory()["peak"] - before), "tensor_bytes": living_bytes() - tensors}
    return step, loss, found


class Process:
    """A provider in a process of its own, after two steps; called, it makes another and returns the loss.

    There its memory is its alone, and how it is managed (`fastdino.engine.build.keep_freed_memory`) concerns
    nobody else. ``crops`` are those of the problem. Between turns (:meth:`turn`) it rests without the memory
    that it does not hold, or a machine would have to have that of all sides at once.
    """

    def __init__(self, provider: Provider, problem: Problem, checkout: Path | None) -> None:
        self.name = provider.side
        words = {
            "provider": asdict(provider),
            "problem": asdict(problem),
            "checkout": None if checkout is None else str(checkout),
        }
        command = [sys.executable, "-c", "from bench import providers; providers.child()", json.dumps(words)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self.close = weakref.finalize(self, _end, self.process)
        first = self._answer()
        self.loss: float = first["loss"]
        self.memory: dict[str, int] = first["memory"]

    def __call__(self, crops: Crops) -> float:
        return self._ask("step")["loss"]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside of it the process has its memory back, by a first step."""
        self._ask("step")
        yield
        self._ask("rest")

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and is said to have
            print(word, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with exit code {self.process.wait()}")
        return json.loads(line)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def child() -> None:
    """What the process of :class:`Process` does: what it reads, line by line."""
    words = json.loads(sys.argv[1])
    checkout = None if words["checkout"] is None else Path(words["checkout"])
    answers, sys.stdout = sys.stdout, sys.stderr  # of what the official code prints
    problem = Problem(**words["problem"])
    step, loss, found = alone(Provider(**words["provider"]), problem, checkout)
    crops = problem.crops()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    answer: dict[str, Any] = {"loss": loss, "memory": found}
    for word in itertools.chain(["rest"], map(str.strip, sys.stdin)):
        if word == "step":
            answer = {"loss": step(crops)}
        elif trim is not None:
            trim(0)
        print(json.dumps(answer), file=answers, flush=True)


@dataclass
class Side:
    """A provider that is ready to be timed; ``memory`` is :func:`alone`'s, ``loss`` the first step's."""

    step: Callable[[Crops], float]
    memory: dict[str, int]
    loss: float


def start(provider: Provider, problem: Problem, crops: Crops, checkout: Path | None) -> Side:
    """Builds it and makes the first steps, in which kernels are compiled and graphs recorded.

    On a CPU in a process of its own, see :class:`Process`. On a GPU its memory is measured here: the peak
    over these steps, of what is allocated besides what others hold, and the crops.
    """
    if device().type == "cpu":
        if problem.toy:  # its figures mean nothing, and processes take long to start
            step, loss, found = alone(provider, problem, checkout)
            return Side(step, found, loss)
        process = Process(provider, problem, checkout)
        return Side(process, process.memory, process.loss)
    gc.collect()
    torch.cuda.empty_cache()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = provider.start(problem, checkout)
    loss = step(crops)
    for _ in range(4):
        step(crops)
    inputs = sum(x.nbytes for x in (crops.global_, crops.local) if x is not None)
    peak, tensors = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    found = {"peak_bytes": peak - before + inputs, "tensor_bytes": tensors - before + inputs}
    return Side(step, found, loss)


def timed(sides: Mapping[str, Side], crops: Crops, seconds: float) -> dict[str, list[float]]:
    """Seconds per step of every side, by turns, within about ``seconds``."""
    number = 5 if device().type == "cuda" else 1  # steps per turn: the host may run ahead
    calls = {name: steps(side.step, crops, number) for name, side in sides.items()}

    def turn(name: str) -> AbstractContextManager[None]:
        step = sides[name].step
        return step.turn() if isinstance(step, Process) else nullcontext()

    times = interleave(calls, rounds=15, warmup=0, seconds=seconds, turn=turn)
    return {name: [t / number for t in values] for name, values in times.items()}


# ------------------------------------------------------------------------------------------------- commands


def add_arguments(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, help="images; 64 on a GPU, 8 on a CPU")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--official", type=Path, metavar="PATH", help="checkout of facebookresearch/dino")
    parser.add_argument("--seconds", type=float, default=seconds, help="to spend on timing, about, per row")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: checks this file; times mean nothing")
    parser.add_argument("--save", action="store_true", help="write bench/results/")


def problems(args: argparse.Namespace, locals_: Iterable[int], say: Transcript) -> list[Problem]:
    """One for each number of local crops; says so where the batch is not the paper's."""
    batch = args.batch or (4 if args.toy else 64 if device().type == "cuda" else 8)
    if batch != 64:
        why = "as chosen" if args.batch else "a toy" if args.toy else "on a CPU"
        say(f"batch {batch} ({why}); the paper's is 64 per GPU")
    return [Problem(batch, n, args.arch, args.patch_size, args.out_dim, args.toy) for n in locals_]


def machine() -> str:
    return f"{torch.get_num_threads()} threads" if device().type == "cpu" else torch.cuda.get_device_name()
