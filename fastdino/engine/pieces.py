"""The tensor files of a checkpoint: whole tensors, or the rows of larger ones that one process holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors.torch import save as _tensors_to_bytes

# Key of a safetensors header under which the pieces of the file are listed as JSON: {name: [start, rows]}.
_PIECES = "pieces"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another format; the message names the file and what is wrong."""


class NotFiniteError(CheckpointError):
    """A state was not saved because there is NaN or infinity in it: the next run would start from that."""


@dataclass(frozen=True)
class Piece:
    """One process's rows ``start`` to ``start + len(local)`` of a tensor that has ``rows`` rows in all.

    ``local`` [n, ...] is cut along the first dimension; n may be 0 and differ between processes. Raises
    ValueError for a tensor without dimensions and for rows outside the whole.
    """

    local: torch.Tensor
    start: int
    rows: int

    def __post_init__(self) -> None:
        if self.local.ndim == 0:
            raise ValueError("local: expected a tensor with rows, got one without dimensions")
        last = self.rows - len(self.local)
        if not 0 <= self.start <= last:
            raise ValueError(
                f"start: expected 0 to {last} for {len(self.local)} of {self.rows} rows, got {self.start}"
            )


State = Mapping[str, torch.Tensor | Piece]


class Span(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor of ``shape``; a tensor without dimensions counts as one row."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str


def is_sharded(*states: State) -> bool:
    return any(isinstance(value, Piece) for state in states for value in state.values())


def nbytes(*states: State) -> int:
    """Bytes of all tensors in ``states``."""
    return sum(_tensor(value).nbytes for state in states for value in state.values())


def check_finite(**states: State) -> None:
    """Raise NotFiniteError naming the first tensor with NaN or infinity in it."""
    for kind, state in states.items():
        for name, value in state.items():
            tensor = _tensor(value)
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise NotFiniteError(f"{name} ({kind}): {bad} of {tensor.numel()} values are not finite")


class HostCopies:
    """Copies of states in host memory, which the next copies use again (pinned for CUDA tensors)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, **states: State) -> dict[str, State]:
        """The states with every tensor copied; when this returns, the originals may change."""
        copies: dict[str, State] = {kind: self._copy(kind, state) for kind, state in states.items()}
        if any(_tensor(value).is_cuda for state in states.values() for value in state.values()):
            copied = torch.cuda.Event()
            copied.record()
            copied.synchronize()
        return copies

    def _copy(self, kind: str, state: State) -> dict[str, torch.Tensor | Piece]:
        copies: dict[str, torch.Tensor | Piece] = {}
        for name, value in state.items():
            source = _tensor(value)
            buffer = self._buffers.get((kind, name))
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[kind, name] = buffer
            buffer.copy_(source, non_blocking=source.is_cuda)
            copies[name] = replace(value, local=buffer) if isinstance(value, Piece) else buffer
        return copies


def _tensor(value: torch.Tensor | Piece) -> torch.Tensor:
    return (value.local if isinstance(value, Piece) else value).detach()


def own(state: State, rank: int) -> dict[str, torch.Tensor | Piece]:
    """What process ``rank`` writes: its pieces, and on rank 0 the tensors that every process holds whole."""
    return {name: value for name, value in state.items() if rank == 0 or isinstance(value, Piece)}


def to_bytes(state: State) -> bytes:
    """The safetensors file of ``state``."""
    tensors: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[int]] = {}
    for name, value in state.items():
        if isinstance(value, Piece):
            pieces[name] = [value.start, value.rows]
        tensors[name] = _tensor(value).cpu().contiguous()
    return _tensors_to_bytes(tensors, {_PIECES: json.dumps(pieces, sort_keys=True)} if pieces else None)


def read_spans(path: Path, file: BinaryIO) -> dict[str, Span]:
    """Which rows of which tensors the safetensors ``file`` at ``path`` holds, from its header alone (JSON
    after its length in 8 bytes). Raises CheckpointError if that is not to be read.
    """
    try:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        pieces = json.loads(header.pop("__metadata__", {}).get(_PIECES, "{}"))
        spans = {}
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            held = shape[0] if shape else 1
            start, rows = pieces.get(name, (0, held))
            spans[name] = Span(start, start + held, (rows, *shape[1:]) if shape else (), entry["dtype"])
        return spans
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a file of tensors ({error!r})") from error


def kind_of(name: str) -> str:
    """``model`` or ``optimizer`` if that is the name of a tensor file, else nothing."""
    stem, _, suffix = name.partition(".")
    return stem.partition("-")[0] if suffix == "safetensors" else ""


def check_tiling(files: Mapping[Path, Mapping[str, Span]]) -> None:
    """Raise CheckpointError, naming file and tensor, unless the rows in ``files`` make up every tensor
    exactly: no gap, no overlap, one shape and one type.
    """
    held: dict[tuple[str, str], list[tuple[Span, Path]]] = {}
    for path, spans in files.items():
        for name, span in spans.items():
            held.setdefault((kind_of(path.name), name), []).append((span, path))
    for (_, name), parts in held.items():
        whole, filled = parts[0][0], 0
        for span, path in sorted(parts):
            if (span.shape, span.dtype) != (whole.shape, whole.dtype):
                raise CheckpointError(
                    f"{path}: {name} is {span.dtype} {list(span.shape)}, in another file it is "
                    f"{whole.dtype} {list(whole.shape)}"
                )
            if span.start == span.stop:
                continue
            if span.start != filled:
                problem = "a gap" if span.start > filled else "an overlap"
                raise CheckpointError(
                    f"{path}: {name} has {problem}: its rows {span.start} to {span.stop} follow row {filled}"
                )
            filled = span.stop
        rows = whole.shape[0] if whole.shape else 1
        if filled != rows:
            raise CheckpointError(f"{parts[-1][1]}: {name} has a gap: rows {filled} to {rows} are in no file")


def check_files(paths: Iterable[Path], opened: Callable[[Path], BinaryIO]) -> None:
    """``check_tiling`` of the tensor files among ``paths``, from their headers alone. Raises OSError, too."""
    held = {}
    for path in paths:
        if kind_of(path.name):
            with opened(path) as file:
                held[path] = read_spans(path, file)
    check_tiling(held)
