"""Pointer tables: what lets one launch of a Triton kernel walk over lists of tensors.

A kernel finds the addresses and sizes of the tensors in device memory, and a list of chunks of equal work:
program ``i`` takes chunk ``i``. What stays from step to step is uploaded once and kept under its own content
(every address, size and dtype), so a stale table cannot be met; what changes (gradients, numbers of the step)
goes up in one copy from pinned memory, which nobody waits for. Below the tables: the device functions that
the kernels over them share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..native import DTYPES, tensor
from ..optimizer import Common, Row

CHUNK = 8192  # elements that one program takes: small enough that the last programs of a launch end together
BLOCK = 1024  # elements at a time: 8 per thread, two vectors of 16 bytes from each stream
WARPS = 4
PER_STEP = 5  # numbers of a step: found, skip, momentum, grad_scale, max_norm
_CACHED = 64  # tables: a model has two or three
_SPARE = 2  # pinned buffers of each length for captures, which may not allocate any

# The model that launches are described for: elements, tensors, chunks, its name.
MODEL = (43_956_864, 160, 43_956_864 // CHUNK + 160, "ViT-S/16 and head, 44 M parameters")

T = TypeVar("T")


@dataclass(frozen=True)
class _Made:
    """When and on which stream the upload of a table began."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event

    @classmethod
    def now(cls, device: torch.device) -> _Made:
        stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
        event.record(stream)
        return cls(stream, event)

    def wait(self, table: Tensor) -> None:
        """Before another stream reads the table: it must be there, and stay until that stream has read it."""
        stream = torch.cuda.current_stream(table.device)
        if stream != self.stream:
            stream.wait_event(self.event)
            table.record_stream(stream)


_cache: dict[Hashable, tuple[Any, _Made | None]] = {}
_spare: dict[int, list[Tensor]] = {}
_captured: list[object] = []  # what a CUDA graph reads must live as long as the process


@dataclass(frozen=True)
class Layout:
    """How ``n`` tensors are dealt to programs.

    ``table`` holds the sizes [n], each tensor's first chunk and their total [n + 1], then of every chunk its
    tensor and its number in it [2, n_chunks].
    """

    n: int
    n_chunks: int
    table: Tensor  # int64


def layout(sizes: Sequence[int], device: torch.device) -> Layout:
    """The chunks of tensors of these sizes; an empty tensor has none."""

    def make() -> Layout:
        counts = [-(-size // CHUNK) for size in sizes]
        first = [0]
        for count in counts:
            first.append(first[-1] + count)
        tensors = [i for i, count in enumerate(counts) for _ in range(count)]
        numbers = [j for count in counts for j in range(count)]
        table = upload(_integers([*sizes, *first, *tensors, *numbers]), device)
        return Layout(len(counts), first[-1], table)

    return _cached(("layout", tuple(sizes)), device, make)


def constants(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers [columns, n] that stay the same for many steps."""
    values = tuple(value for column in columns for value in column)
    return _cached(values, device, lambda: upload(_integers(values), device))


def per_step(
    addresses: Sequence[int], numbers: Sequence[float | Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Addresses (int64) and numbers (fp64) of one step, by one copy; tensors among the numbers stay on the
    device."""
    live = [(i, x) for i, x in enumerate(numbers) if isinstance(x, Tensor) and x.device == device]
    kept = {i for i, _ in live}
    values = [0.0 if i in kept else float(x) for i, x in enumerate(numbers)]
    bits = tensor(values, dtype=torch.float64).view(torch.int64)
    even = [*addresses, *[0] * (len(addresses) % 2)]  # the numbers begin at 16 bytes, for any n
    block = upload(torch.cat([_integers(even), bits]), device)
    scalars = block[len(even) :].view(torch.float64)
    if live:
        torch._foreach_copy_([scalars[i] for i, _ in live], [x.detach() for _, x in live])
    return block[: len(addresses)], scalars


def address(x: Tensor | None) -> int:
    """0 only for None: an empty tensor, which has no memory, must not look missing."""
    return 0 if x is None else x.data_ptr() or 16


def _integers(values: Sequence[int]) -> Tensor:
    return tensor(values, dtype=torch.int64)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """``host`` (int64) on ``device``, in stream order; the host does not wait."""
    if device.type != "cuda":
        return host
    capturing = _capturing(device)
    spares = _spare.setdefault(len(host), [])
    if capturing and spares:
        pinned = spares.pop()
    else:
        pinned = _pinned(host)
        while not capturing and len(spares) < _SPARE:
            spares.append(_pinned(host))
    pinned.copy_(host)
    result = torch.empty_like(host, device=device)
    result.copy_(pinned, non_blocking=True)  # torch reuses the buffer only after the copy
    if capturing:
        _captured.append((pinned, result))  # each replay copies again
    return result


def _pinned(host: Tensor) -> Tensor:
    return torch.empty_like(host, pin_memory=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _cached(content: Hashable, device: torch.device, make: Callable[[], T]) -> T:
    capturing, key = _capturing(device), (device, content)
    known = _cache.pop(key, None)
    if known is None:
        found = make()
        made = _Made.now(device) if device.type == "cuda" and not capturing else None
    else:
        found, made = known
    if capturing:
        _captured.append(found)
    elif made is not None:
        made.wait(cast(Tensor, found.table if isinstance(found, Layout) else found))
    if known is not None or not capturing:  # what a capture uploads is there only from its first replay on
        _cache[key] = found, made  # at the end: the one used longest ago goes first
    if len(_cache) > _CACHED:
        del _cache[next(iter(_cache))]
    return found


@dataclass(frozen=True)
class Step:
    """What the kernels of an optimizer's step read and write besides the rows."""

    layout: Layout
    table: Tensor  # int64 [columns, n]: group, the given columns, then p, moments, teacher, copies, step
    grads: Tensor  # int64 [n]
    numbers: Tensor  # fp64: PER_STEP, then those of each group
    codes: Tensor  # int64 [n]: all gradients are fp32
    copy: int  # type of the 16-bit copies, 0 without any
    norms: Tensor  # fp32 [n]
    coefficients: Tensor  # fp32 [n, width]
    flags: Tensor  # bool [2]: found, frozen

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        common: Common,
        max_norm: float | Tensor,
        width: int,
        numbers_of: Callable[[Any], Sequence[float | Tensor]],
        columns: Sequence[Sequence[int]] = (),
        moments: int = 2,
    ) -> Step:
        device = rows[0].param.device
        groups = {id(row.group): row.group for row in rows}
        position = {key: i for i, key in enumerate(groups)}
        none = (None,) * moments
        tensors = zip(
            *((r.param, *(r.state or none), r.teacher, r.copy, r.teacher_copy, r.step) for r in rows),
            strict=True,
        )
        addresses = (list(map(address, column)) for column in tensors)
        numbers: list[float | Tensor] = [0.0, common.skip, common.momentum, common.grad_scale, max_norm]
        for group in groups.values():
            numbers += numbers_of(group)
        grads, scalars = per_step([address(row.grad) for row in rows], numbers, device)
        copies = (copy for row in rows for copy in (row.copy, row.teacher_copy))
        n = len(rows)
        return cls(
            layout([row.param.numel() for row in rows], device),
            constants([[position[id(r.group)] for r in rows], *columns, *addresses], device),
            grads,
            scalars,
            constants([[0] * n], device),
            next((DTYPES[copy.dtype] for copy in copies if copy is not None), 0),
            torch.empty(n, dtype=torch.float32, device=device),
            torch.empty(n * width, dtype=torch.float32, device=device),
            torch.empty(2, dtype=torch.bool, device=device),
        )


def given_squares(step: Step, norms: Tensor) -> tuple[Layout, Tensor]:
    """Unscaled norms fp64 [n] that the caller measured, as sums of squares of scaled gradients.

    Returns a layout with one chunk per tensor, whatever its size, and the sums [n]; the step is told if some
    norm is not finite."""
    step.numbers[0].copy_(~torch.isfinite(norms).all())
    return layout([1] * len(norms), norms.device), (norms * step.numbers[3]).square()


@triton.jit
def chunk_of(layout, i, n, n_chunks, CHUNK: tl.constexpr):
    """Tensor, first element and number of elements of chunk ``i``."""
    tensor = tl.load(layout + 2 * n + 1 + i)
    start = tl.load(layout + 2 * n + 1 + n_chunks + i) * CHUNK
    count = tl.minimum(tl.load(layout + tensor) - start, CHUNK).to(tl.int32)
    return tensor, start, count


@triton.jit
def pointer(at, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """An address out of a table says nothing of its alignment, without which elements are loaded singly."""
    result = at.to(tl.pointer_type(dtype))
    if ALIGNED:
        result = tl.multiple_of(result, 16)
    return result


@triton.jit
def whole_blocks(addresses, count, BLOCK: tl.constexpr):
    """Elements that full vectors may cover: none if some stream is not aligned to 16 bytes."""
    return tl.where((addresses & 15) == 0, count // BLOCK * BLOCK, 0)


@triton.jit
def load_block(at, code, valid, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """``BLOCK`` numbers of type ``code`` as fp32; the type costs no branch, only a masked-out load."""
    offs = tl.arange(0, BLOCK)
    full = tl.load(pointer(at, tl.float32, ALIGNED) + offs, mask=valid & (code == 0), other=0.0)
    # 4 neighbours per thread as in fp32, so that nothing moves between threads
    offs = tl.max_contiguous(offs, 4)
    bits = tl.load(pointer(at, tl.uint16, ALIGNED) + offs, mask=valid & (code != 0), other=0)
    brain = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)  # by integers: sm_70 knows no bf16
    half = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(code == 0, full, tl.where(code == 1, brain, half))


@triton.jit
def store_half(at, x, code, valid, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 rounded to nearest even, as bf16 (code 1) or fp16."""
    bits = x.to(tl.uint32, bitcast=True)
    brain = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    half = tl.where(code == 1, brain, x.to(tl.float16).to(tl.uint16, bitcast=True))
    offs = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    tl.store(pointer(at, tl.uint16, ALIGNED) + offs, half, mask=valid)


@triton.jit
def total_of(layout, partial, tensor, n, BLOCK: tl.constexpr):
    """Sum of a tensor's partial sums, one per chunk, in a fixed order."""
    offs = tl.arange(0, BLOCK)
    first, last = tl.load(layout + n + tensor), tl.load(layout + n + tensor + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(first, last, BLOCK):
        total += tl.load(partial + i + offs, mask=i + offs < last, other=0.0)
    return tl.sum(total)


@triton.jit
def clip(norm, max_norm):
    """``min(1, max_norm / (norm + 1e-6))``; 1 where max_norm is 0."""
    coefficient = max_norm / (norm + 1e-6)
    return tl.where((max_norm > 0.0) & (coefficient < 1.0), coefficient, 1.0)


@triton.jit
def correction(step, log2_beta):
    """``1 - beta^step`` in fp64: at beta = 0.999 the first step leaves fp32 four digits."""
    return 1.0 - tl.exp2(step.to(tl.float64) * log2_beta)


@triton.jit
def follow(
    p_at, p, t_at, t, copy_at, t_copy_at, has, keep, rest, valid,
    COPY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store new parameters, move their teacher, store the 16-bit copies of both; ``has`` says which exist."""
    trained, taught, copied, t_copied = has
    offs = tl.arange(0, BLOCK)
    tl.store(pointer(p_at, tl.float32, ALIGNED) + offs, p, mask=valid & trained)
    t = tl.where(rest == 0.0, t, keep * t + rest * p)  # a momentum of 1 changes no byte
    tl.store(pointer(t_at, tl.float32, ALIGNED) + offs, t, mask=valid & taught)
    if COPY != 0:
        store_half(copy_at, p, COPY, valid & copied, BLOCK, ALIGNED)
        store_half(t_copy_at, t, COPY, valid & t_copied, BLOCK, ALIGNED)
