"""Pack a data set into WebDataset shards: ``python -m fastdino.data.pack SOURCE OUTPUT``.

SOURCE is anything ``--data_path`` takes. OUTPUT gets plain tar files that any WebDataset reader takes,
``shard-000000.tar`` with members ``00000000.jpg`` and ``00000000.cls``, numbered as in the source, and beside
them ``classes.txt`` (class names, if the source has labels), ``index.npz`` (where the images lie),
``left_out.txt`` (images that cannot be decoded, if any) and ``pack.json`` (what has been done).

Encoded images are copied as they are; with ``--max_side`` larger ones are shrunk and stored as JPEG. The same
source and arguments give the same bytes, whatever the number of workers and interruptions: a shard appears
under its name when it is complete, and a run that was stopped goes on after the last complete one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastdino.data import containers, indexing, runlist
from fastdino.data.manifest import Manifest, build_manifest
from fastdino.data.prescan import decode_bytes, line
from fastdino.data.progress import track
from fastdino.data.samples import Shard
from fastdino.data.threads import threads

STATE, LEFT_OUT = "pack.json", "left_out.txt"
_KINDS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif"))
_AHEAD = 4  # images per worker that may wait for their turn


class Packed(NamedTuple):
    """One image ready to be written."""

    content: bytes
    ending: str
    reason: str
    """Why it is left out; empty for a good image."""


def pack(
    source: str,
    output: Path,
    *,
    shard_size: int = 1 << 30,
    max_side: int | None = None,
    quality: int = 90,
    num_workers: int = 0,
    progress: bool = True,
) -> Manifest:
    """Write the shards and return the manifest of what was written.

    `shard_size` in bytes: a shard ends with the image that reaches it. `max_side` in pixels, `quality` of the
    JPEG that images shrunk to it become. Raises ValueError for an output folder that holds something else or
    was begun with other arguments, and where no image is left.
    """
    manifest = build_manifest(source, progress)
    arguments = {
        "images": len(manifest),
        "source": hashlib.sha256(
            "\0".join(runlist.names(manifest)).encode("utf-8", "surrogateescape")
        ).hexdigest(),
        "shard_size": shard_size,
        "max_side": max_side,
        "quality": quality if max_side else None,
    }
    state = _open(output, arguments)
    done = state["shards"][-1]["end"] if state["shards"] else 0
    images = _prepared(manifest, done, max_side, quality, num_workers)
    bar = track(images, len(manifest) - done, progress, "packing images")
    shard = _Shard(output, len(state["shards"]))
    left_out = []
    try:
        for sample, image in enumerate(bar, start=done):
            if image.reason:
                left_out.append(line(manifest.paths[sample], image.reason))
            else:
                shard.add(sample, image, None if manifest.labels is None else int(manifest.labels[sample]))
            last = sample + 1 == len(manifest)
            if shard.size >= shard_size or (last and (shard.size or left_out)):
                if shard.size:
                    shard.finish()
                state["shards"].append({"name": shard.name if shard.size else None, "end": sample + 1})
                state["left_out"] += left_out
                left_out = []
                _write(output / STATE, json.dumps(state, indent=1) + "\n")
                shard = _Shard(output, len(state["shards"]))
    finally:
        images.close()
        shard.discard()
    return _complete(manifest, output, state)


def _complete(manifest: Manifest, output: Path, state: dict[str, Any]) -> Manifest:
    """The files beside the shards."""
    names = [shard["name"] for shard in state["shards"] if shard["name"]]
    if state["left_out"]:
        _write(output / LEFT_OUT, "".join(entry + "\n" for entry in state["left_out"]))
    if not names:
        raise ValueError(
            f"none of the {len(manifest)} images can be used; all are listed in {output / LEFT_OUT}"
        )
    if manifest.labels is not None:
        text = "".join(f"{name}\n" for name in manifest.class_names)
        _write(output / containers.CLASSES_NAME, text)
    shards = []
    for name in names:
        status = os.stat(output / name)
        shards.append(Shard(str(output / name), "tar", status.st_size, str(status.st_mtime_ns)))
    indexing.save({shard: indexing.index_shard(shard) for shard in shards}, output / indexing.INDEX_NAME)
    return build_manifest(output, progress=False)


def _open(output: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What has been done in `output` so far, created if it is missing."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / STATE
    if not file.exists():
        there = [name for name in os.listdir(output) if not name.endswith(".tmp")]
        if there:
            raise ValueError(
                f"OUTPUT {output}: expected an empty folder or one that this command began, found {there[0]}"
            )
        state: dict[str, Any] = {"arguments": arguments, "shards": [], "left_out": []}
        _write(file, json.dumps(state, indent=1) + "\n")
        return state
    state = json.loads(file.read_text("utf-8"))
    different = [
        f"{key}: begun with {state['arguments'].get(key)!r}, now {value!r}"
        for key, value in arguments.items()
        if state["arguments"].get(key) != value
    ]
    if different:
        raise ValueError(
            f"OUTPUT {output} was begun with other arguments or another source; finish it with the same, or "
            "choose another folder.\n  " + "\n  ".join(different)
        )
    for shard in state["shards"]:
        if shard["name"] and not (output / shard["name"]).exists():
            raise ValueError(
                f"OUTPUT {output}: {shard['name']} was finished and is missing; choose another folder"
            )
    return state


# ----------------------------------------------------------------------------------------------------- images


def _prepared(
    manifest: Manifest, first: int, max_side: int | None, quality: int, num_workers: int
) -> Generator[Packed, None, None]:
    """The images from number `first` on, in order, prepared by threads a few images ahead."""
    workers = num_workers or len(os.sched_getaffinity(0))
    waiting: deque[Future[Packed]] = deque()
    with threads(workers, "pack") as pool:
        for sample in range(first, len(manifest)):
            waiting.append(pool.submit(prepare, manifest.paths[sample], max_side, quality))
            if len(waiting) > workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(path: str, max_side: int | None, quality: int) -> Packed:
    """Read and decode one image; shrink it, bicubic, if its longer side exceeds `max_side` pixels."""
    content, reason, pixels = decode_bytes(path)
    if reason:
        return Packed(b"", "", reason)
    height, width = pixels.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return Packed(content, _ending(content), "")
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return Packed(buffer.getvalue(), "jpg", "")


def _ending(content: bytes) -> str:
    if content[:4] == b"RIFF":
        return "webp"
    if content[:1] == b"P":
        return "ppm"
    return next((ending for magic, ending in _KINDS if content.startswith(magic)), "img")


# ----------------------------------------------------------------------------------------------------- shards


class _Shard:
    """A tar file under a temporary name."""

    def __init__(self, output: Path, number: int) -> None:
        self.name = f"shard-{number:06d}.tar"
        self.size = 0
        self._path = output / self.name
        self._temporary = output / f"{self.name}.tmp"
        self._tar: tarfile.TarFile | None = None

    def add(self, sample: int, image: Packed, label: int | None) -> None:
        if self._tar is None:
            self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        members = [(image.ending, image.content)]
        if label is not None:
            members.append(("cls", b"%d" % label))
        for ending, content in members:
            header = tarfile.TarInfo(f"{sample:08d}.{ending}")
            header.size = len(content)
            self._tar.addfile(header, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]
        self.size = self._tar.offset

    def finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._temporary.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)


# ----------------------------------------------------------------------------------------------- command line


def size(text: str) -> int:
    """Bytes in a text such as 1G, 500M or 65536 (powers of 1024)."""
    match = re.fullmatch(r"(\d+)([KMGT]?)i?B?", text.strip(), re.I)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 1G or 500M, got {text!r}")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def main(words: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.data.pack", description="Pack a data set into WebDataset tar shards."
    )
    parser.add_argument("source", metavar="SOURCE", help="anything --data_path takes")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder of the shards")
    parser.add_argument("--shard_size", type=size, default=1 << 30, help="bytes of a shard (default: 1G)")
    parser.add_argument("--max_side", type=int, help="shrink larger images to this longer side, in pixels")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of those (default: 90)")
    parser.add_argument("--num_workers", type=int, default=0, help="threads (default: one per core)")
    flags = parser.parse_args(words)
    if flags.max_side is not None and flags.max_side < 1:
        parser.error(f"--max_side: expected at least 1 pixel, got {flags.max_side}")
    if not 1 <= flags.quality <= 95:
        parser.error(f"--quality: expected 1 to 95, got {flags.quality}")
    if flags.num_workers < 0:
        parser.error(f"--num_workers: expected at least 0, got {flags.num_workers}")
    try:
        manifest = pack(
            flags.source,
            flags.output,
            shard_size=flags.shard_size,
            max_side=flags.max_side,
            quality=flags.quality,
            num_workers=flags.num_workers,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {str(error).replace('--data_path', 'SOURCE', 1)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "the same command goes on after the last finished shard"
        print(f"\n{parser.prog}: stopped; {goes_on}", file=sys.stderr)
        return 130
    left_out = flags.output / LEFT_OUT
    also = f"; others could not be decoded, see {left_out}" if left_out.exists() else ""
    print(f"{len(manifest)} images in {flags.output}{also}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
