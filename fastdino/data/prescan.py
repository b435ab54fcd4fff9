"""Look into every image once before training: drop those that cannot be decoded, and learn the sizes of the
rest.

The decoder is nvImageCodec on the CPU, the one DALI uses, so what passes here decodes later. Verdicts are
kept in `prescan.npz` by path, size and modification time (those of the shard for an image in a container): a
second run over the same files opens none of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastdino.data import headers, npz
from fastdino.data.manifest import Manifest, one_line, printable
from fastdino.data.progress import track
from fastdino.data.remote import is_url, known_as
from fastdino.data.samples import read, stamp
from fastdino.data.threads import threads

INSTALL_DALI = (
    "pip install 'fastdino[dali-cu13]' (no GPU, or driver 580 and later) or "
    "pip install 'fastdino[dali-cu12]' (older drivers, V100)"
)

CACHE_NAME, BAD_NAME = "prescan.npz", "bad_files.txt"
_CHUNK = 32  # files per task of a thread

log = logging.getLogger(__name__)
T = TypeVar("T")


class Verdict(NamedTuple):
    """What is known of one file."""

    height: int
    width: int
    reason: str
    """Why the file cannot be used; empty for a good image."""


def prescan(
    manifest: Manifest, cache_dir: str | os.PathLike[str], num_threads: int = 0, progress: bool = True
) -> Manifest:
    """Decode every image once and return the manifest of the good ones, with their sizes.

    Bad files are named in one warning (the first ten) and in `cache_dir`/bad_files.txt (all, with reasons).
    `num_threads` 0 takes all cores. `progress` draws a bar if standard error is a terminal.

    Raises ValueError if no image is left, ImportError if nvImageCodec is not installed.
    """
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stamps = [stamp(path) for path in manifest.paths]
    verdicts = _load_cache(folder / CACHE_NAME, manifest.paths, stamps)
    unknown = [i for i, verdict in enumerate(verdicts) if verdict is None]
    if unknown:
        try:
            for i, verdict in _scan(manifest.paths, unknown, num_threads, progress):
                verdicts[i] = verdict
        finally:  # an interrupted scan goes on where it stopped
            _save_cache(folder / CACHE_NAME, manifest.paths, stamps, verdicts)

    known = [verdict for verdict in verdicts if verdict is not None]
    bad = [(path, v.reason) for path, v in zip(manifest.paths, known, strict=True) if v.reason]
    _report(bad, len(manifest), folder / BAD_NAME)
    if len(bad) == len(manifest):
        raise ValueError(
            f"--data_path: none of the {len(manifest)} images of {printable(manifest.root)} can be used; "
            f"the first one: {line(*bad[0])}; all are listed in {printable(str(folder / BAD_NAME))}"
        )
    good = np.array([i for i, verdict in enumerate(known) if not verdict.reason], np.int64)
    sizes = np.array([(verdict.height, verdict.width) for verdict in known], np.int32)
    return Manifest(manifest.paths, manifest.labels, manifest.class_names, manifest.root, sizes).subset(good)


# -------------------------------------------------------------------------------------------------- one image


def inspect(path: str) -> Verdict:
    """Read and decode one image; never raises for what it holds."""
    return _decode(path)[0]


def decode(path: str) -> np.ndarray:
    """The image as training sees it before cropping: uint8 [height, width, 3], EXIF orientation ignored.

    Raises ValueError naming the file and what is wrong with it.
    """
    verdict, image = _decode(path)
    if verdict.reason:
        raise ValueError(line(path, verdict.reason))
    return np.asarray(image)


def decode_bytes(path: str) -> tuple[bytes, str, np.ndarray]:
    """The encoded image, why it cannot be used (empty if it can), and its pixels as `decode` gives them."""
    content, verdict, stream = _open(path)
    if not verdict.reason:
        verdict, image = _decode_stream(stream)
    return content, verdict.reason, np.asarray(image) if not verdict.reason else np.zeros((0, 0, 3), np.uint8)


def fetch(path: str) -> tuple[bytes, str]:
    """The encoded image, and why it cannot be used as far as its header tells: empty if nothing is wrong."""
    content, verdict, _ = _open(path)
    return content, verdict.reason


def header_sizes(paths: Sequence[str], num_threads: int = 0) -> np.ndarray:
    """Height and width of each image by its header alone: int32 [n, 2], zeros where there is none to read."""

    def size(path: str) -> tuple[int, int]:
        _, verdict, stream = _open(path)
        return (stream.height, stream.width) if not verdict.reason else (0, 0)

    sizes = [size for chunk in _map_chunks(size, paths, num_threads) for size in chunk]
    return np.array(sizes, np.int32).reshape(-1, 2)


def _open(path: str) -> tuple[bytes, Verdict, Any]:
    """Read an image and its header: its bytes, a verdict and, if that is good, the encoded image."""
    try:
        content = read(path)
    except OSError as error:
        return b"", Verdict(0, 0, f"cannot be read: {error.strerror or error}"), None
    if not content:
        return content, Verdict(0, 0, "empty file"), None
    try:
        stream = import_nvimgcodec().CodeStream(content)
        height, width = stream.height, stream.width
        kind = _kind(stream)
    except RuntimeError:
        reason = f"not an image, or cut short (the file starts with {content[:8]!r})"
        return content, Verdict(0, 0, reason), None
    if reason := headers.refusal(stream.codec_name, kind, height, width, content):
        return content, Verdict(0, 0, reason), None
    return content, Verdict(height, width, ""), stream


def _kind(stream: Any) -> str:
    """NumPy type of an encoded image's pixels; empty for one that NumPy does not have."""
    try:
        return str(stream.dtype)
    except TypeError:
        return ""


def _decode(path: str) -> tuple[Verdict, Any]:
    _, verdict, stream = _open(path)
    return (verdict, None) if verdict.reason else _decode_stream(stream)


def _decode_stream(stream: Any) -> tuple[Verdict, Any]:
    nvimgcodec = import_nvimgcodec()
    image = _decoder(nvimgcodec).decode(stream, params=_decode_params(nvimgcodec))
    if image is None:
        return Verdict(0, 0, f"damaged {stream.codec_name} image"), None
    return Verdict(image.height, image.width, ""), image


def import_nvimgcodec() -> Any:
    """The nvidia.nvimgcodec module; ImportError says how to install it."""
    # Its own complaints name no file; ours do. Read once, when the module is first imported.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        import nvidia.nvimgcodec as nvimgcodec
    except ImportError as error:
        raise ImportError(f"NVIDIA DALI decodes the images but is not installed: {INSTALL_DALI}") from error
    return nvimgcodec


_per_thread = threading.local()


def _decoder(nvimgcodec: Any) -> Any:
    # One single-threaded decoder per thread: on small images over twice as fast as one decoder given batches.
    if not hasattr(_per_thread, "decoder"):
        _per_thread.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            # Without this nothing decodes on a machine that has no GPU.
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )
    return _per_thread.decoder


def _decode_params(nvimgcodec: Any) -> Any:
    return nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.SRGB)


# ------------------------------------------------------------------------------------------------- all images


def _scan(
    paths: Sequence[str], indices: list[int], num_threads: int, progress: bool
) -> Iterator[tuple[int, Verdict]]:
    """Verdicts of the files at `indices`, as they come in."""
    position = 0
    chunks = _map_chunks(inspect, [paths[i] for i in indices], num_threads)
    for verdicts in track(chunks, len(indices), progress, "checking images", chunks=True):
        yield from zip(indices[position : position + len(verdicts)], verdicts, strict=True)
        position += len(verdicts)


def _map_chunks(function: Callable[[str], T], paths: Sequence[str], num_threads: int) -> Iterator[list[T]]:
    """`function` of every path, computed by threads, in order and in chunks."""
    import_nvimgcodec()  # a missing package is an error here, not in a thread
    chunks = [paths[k : k + _CHUNK] for k in range(0, len(paths), _CHUNK)]
    with threads(num_threads or os.cpu_count() or 1, "prescan") as pool:
        yield from pool.map(lambda chunk: [function(path) for path in chunk], chunks)


def _report(bad: list[tuple[str, str]], total: int, path: Path) -> None:
    if not bad:
        path.unlink(missing_ok=True)
        return
    path.write_text("".join(line(*entry) + "\n" for entry in bad), encoding="utf-8")
    first = "".join(f"\n  {line(*entry)}" for entry in bad[:10])
    log.warning(
        "%d of %d images cannot be used and are left out (all listed in %s):%s%s",
        len(bad), total, printable(str(path)), first, "\n  ..." if len(bad) > 10 else "",
    )  # fmt: skip


def line(path: str, reason: str) -> str:
    """A bad image as messages and lists name it."""
    return f"{printable(path)}: {one_line(reason)}"


# ------------------------------------------------------------------------------------------------------ cache


def _key(path: str) -> bytes:
    key = os.fsencode(known_as(path) if is_url(path) else os.path.abspath(path))
    return key.replace(b"\0", b"\\0")  # as only keys of an LMDB may have it


def _load_cache(path: Path, paths: Sequence[str], stamps: list[tuple[int, int]]) -> list[Verdict | None]:
    """The verdicts that still hold, None for files that are new or have changed."""
    try:
        cache = npz.load(path, ("paths", "stamps", "sizes", "reasons"))
        keys = cache["paths"].tobytes().split(b"\0")
        cached_stamps = cache["stamps"].reshape(-1, 2).tolist()
        sizes = cache["sizes"].reshape(-1, 2).tolist()
        reasons = cache["reasons"].tobytes().decode().split("\0")
    except FileNotFoundError:
        return [None] * len(paths)
    except ValueError as error:
        log.warning("cannot read %s (%s): all images are checked again", printable(str(path)), error)
        return [None] * len(paths)
    cached = dict(zip(keys, zip(cached_stamps, sizes, reasons, strict=False), strict=False))
    verdicts: list[Verdict | None] = []
    for name, now in zip(paths, stamps, strict=True):
        entry = cached.get(_key(name))
        if entry is not None and tuple(entry[0]) == now != (-1, -1):
            height, width = entry[1]
            verdicts.append(Verdict(height, width, entry[2]))
        else:
            verdicts.append(None)
    return verdicts


def _save_cache(
    path: Path, paths: Sequence[str], stamps: list[tuple[int, int]], verdicts: list[Verdict | None]
) -> None:
    known = [i for i, verdict in enumerate(verdicts) if verdict is not None]
    found = [verdict for verdict in verdicts if verdict is not None]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(
            file,
            paths=np.frombuffer(b"\0".join(_key(paths[i]) for i in known), np.uint8),
            stamps=np.array([stamps[i] for i in known], np.int64).reshape(-1, 2),
            sizes=np.array([verdict[:2] for verdict in found], np.int32).reshape(-1, 2),
            reasons=np.frombuffer("\0".join(verdict.reason for verdict in found).encode(), np.uint8),
        )
    os.replace(temporary, path)
