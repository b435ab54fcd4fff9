"""Damaged and hostile images through the real decoders: none ends or holds up the process that reads it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data.decoding import Replacements, TooManyUnreadable
from fastdino.data.manifest import build_manifest
from reliability.audit import audit, quickest, quiet
from reliability.promises import cases_of, promise

LARGEST = 512 << 20
"""Bytes of memory that one image may take while it is decoded."""


def picture(kind: str, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    smooth.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind: str, count: int) -> bytes:
    """An animation, or a document of many pages."""
    first, *others = (Image.new("RGB", (16, 16), (i % 256, i // 256, 0)) for i in range(count))
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- mutants

CORPUS = [
    picture("JPEG"),
    picture("JPEG", progressive=True),
    picture("JPEG", mode="L"),
    picture("JPEG", mode="CMYK"),
    picture("JPEG", subsampling=0, exif=Image.Exif()),
    picture("PNG"),
    picture("PNG", mode="P"),
    picture("PNG", mode="RGBA"),
    picture("PNG", mode="LA"),
    picture("WEBP"),
    picture("WEBP", lossless=True),
    picture("BMP"),
    picture("PPM"),
    picture("PPM", mode="L"),
    picture("TIFF"),
    picture("TIFF", compression="tiff_lzw"),
    picture("TIFF", compression="tiff_deflate"),
    picture("TIFF", compression="jpeg"),
]
EXTREMES = (
    b"\0\0",
    b"\xff\xff",
    b"\x7f\xff",
    b"\x80\0",
    b"\0\1",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
)


def mutant(seed: int) -> bytes:
    """An image, damaged once to three times in one of eight ways."""
    rng = np.random.default_rng(seed)
    data = bytearray(CORPUS[int(rng.integers(len(CORPUS)))])
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data)))
        head = int(rng.integers(min(len(data), 128)))
        length = int(rng.integers(1, 65))
        kind = int(rng.integers(8))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
            data[head : head + len(extreme)] = extreme
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 20))
        elif kind == 5:
            data[at : at + length] = rng.bytes(length)
        elif kind == 6:
            data[at : at + length] = bytes(length)
        else:
            other = CORPUS[int(rng.integers(len(CORPUS)))]
            data[at:] = other[int(rng.integers(len(other))) :]
        data = data or bytearray(b"\xff")
    return bytes(data)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mutants")
    paths = [root / f"{seed:05}.jpg" for seed in range(cases_of(ci=1_000, nightly=20_000))]
    for seed, path in enumerate(paths):
        path.write_bytes(mutant(seed))
    for i, content in enumerate(CORPUS):
        (root / f"whole-{i}.png").write_bytes(content)
    return paths


def test_mutants_are_used_or_refused_by_name(mutants: list[Path]) -> None:
    outcomes = audit(
        [("inspect", str(path)) for path in mutants],
        warm=[("inspect", str(path)) for path in sorted(mutants[0].parent.glob("whole-*"))],
        timeout=3600,
    )
    with promise(17, "damaged image through the decoder") as cases:
        for path, outcome in zip(mutants, outcomes, strict=True):
            with cases.case(path.name):
                quiet(outcome, seconds=10.0, memory=LARGEST)
                assert not outcome.error, outcome.error
                height, width, reason = outcome.result
                assert bool(reason) == (height == width == 0)
    refused = sum(bool(outcome.result[2]) for outcome in outcomes)
    assert 0.1 < refused / len(outcomes) < 0.9  # the mutants are neither all alike nor all harmless


def test_substitution_is_the_same_for_every_reader(mutants: list[Path], tmp_path: Path) -> None:
    names, count = mutants[: cases_of(ci=256, nightly=4_096)], cases_of(ci=256, nightly=4_096)
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in names))

    def request(first: int, last: int, threads: int, batch: int = 16) -> tuple[str, str]:
        options = {"list": str(listing), "first": first, "last": last, "threads": threads, "batch": batch}
        return "batches", json.dumps(options)

    half = count // 2
    whole, again, begin, rest = audit(
        [request(0, count, 1), request(0, count, 3), request(0, half, 2), request(half, count, 2, batch=64)],
        timeout=3600,
    )
    with promise(17, "sample of a damaged list: same image for every reader, reason told") as cases:
        with cases.case("other threads"):
            assert not whole.error and again.result == whole.result
        parts = begin.result["used"] + rest.result["used"]
        reasons = whole.result["reasons"] | again.result["reasons"]
        for sample, (used, part) in enumerate(zip(whole.result["used"], parts, strict=True)):
            with cases.case(f"sample {sample}"):
                assert used == part and str(used) not in reasons
                assert (used == sample) == (str(sample) not in reasons)


def test_pixels_that_end_the_process_in_dali_do_not_reach_it(tmp_path: Path) -> None:
    """Correct files, of which one in a batch of 32 is enough."""
    odd = {f"tiff of {b} bits, format {f}": depth(b, f) for b in (16, 24, 32, 64) for f in (1, 2, 3)}
    odd |= {f"bmp of {bits} bits": bmp(8, 8, bits) for bits in (0, 2, 16, 64, 32767)}
    odd["bmp without width"] = bmp(0, 8)
    names = []
    for i in range(64):
        (tmp_path / f"good-{i}.jpg").write_bytes(picture("JPEG"))
        names.append(f"good-{i}.jpg")
    for i, (name, content) in enumerate(odd.items()):
        (tmp_path / name).write_bytes(content)
        names.insert(3 * i, name)
    (tmp_path / "list.txt").write_text("\n".join(names[:64]))
    options = {"list": str(tmp_path / "list.txt"), "first": 0, "last": 64, "threads": 2, "batch": 64}
    with promise(17, "pixels of a kind that DALI does not survive: refused before it") as cases:
        with cases.case("a batch with all of them"):
            (outcome,) = audit([("batches", json.dumps(options))])
            assert not outcome.error, outcome.error
        for name in odd:
            place = names.index(name)
            with cases.case(name):
                used, reason = outcome.result["used"][place], outcome.result["reasons"].get(str(place), "")
                assert used == place or " pixels" in reason or "not an image" in reason, reason


def test_too_many_damaged_images_stop_the_run_naming_them(tmp_path: Path) -> None:
    good, bad = picture("JPEG"), b"no image"
    with promise(17, "a tenth of the images damaged and one more: stop") as cases:
        for n, damaged in ((200, 20), (1000, 100)):
            for i in range(n):
                (tmp_path / f"{i:04}.jpg").write_bytes(bad if i < damaged + 1 else good)
            replacements = Replacements(build_manifest(tmp_path), tmp_path / "bad_files.txt")
            for i in range(damaged):  # from the last, so that each is replaced on its own
                replacements._note(i, "not an image")
            with cases.case(f"{damaged} of {n} go on"):
                assert replacements.resolve(np.arange(n)).tolist() == list(range(n))
            with cases.case(f"{damaged + 1} of {n} stop"):
                with pytest.raises(TooManyUnreadable, match=rf"{damaged + 1} of {n} images") as caught:
                    replacements.replace(damaged, "not an image")
                assert f"{tmp_path}/0000.jpg: not an image" in str(caught.value)
                lines = (tmp_path / "bad_files.txt").read_text().splitlines()
                assert len(lines) == damaged + 1 and lines[0] == f"{tmp_path}/0000.jpg: not an image"
                (tmp_path / "bad_files.txt").unlink()


# ---------------------------------------------------------------------------------------------- crafted files


def jpeg(width: int, height: int, scans: int = 0, **options: object) -> bytes:
    """A small JPEG that claims a size, with its last scan repeated."""
    data = bytearray(picture("JPEG", **options))
    at = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:])


def png(
    width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, color: int = 2, pixels: bytes = b""
) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def tiff(width: int, height: int, *tags: tuple[int, int, int, int], following: int = 0) -> bytes:
    all_tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64), *tags,
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(all_tags))
    begin = struct.pack("<2sHI", b"II", 42, 72) + bytes(64)
    return begin + struct.pack("<H", len(all_tags)) + entries + struct.pack("<I", following)


def depth(bits: int, kind: int) -> bytes:
    """A TIFF of 8 x 8 pixels of so many bits: whole numbers (1), with a sign (2) or floating (3)."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 8 * bits, 339: kind}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, v)
        for tag, v in tags.items()
    )
    begin = struct.pack("<2sHI", b"II", 42, 8 + 8 * bits) + bytes(8 * bits)
    return begin + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(width: int, height: int, bits: int = 24) -> bytes:
    data = picture("BMP")
    return data[:18] + struct.pack("<iiHH", width, height, 1, bits) + data[30:]


def webp(width: int, height: int) -> bytes:
    """Lossless, of one colour, which takes no pixels at all."""
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + struct.pack("<IBI", 20, 0x2F, bits) + bytes(15)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


ROWS = bytes(64 * (1 + 3 * 64))
ZEROS = zlib.compress(bytes(7 << 20), 9)


def refused_by_the_header() -> Iterator[tuple[str, bytes, str]]:
    """Name, content and a part of the reason."""
    claims: dict[str, Callable[[int, int], bytes]] = {
        "jpeg": jpeg, "png": png, "tiff": tiff, "bmp": bmp, "webp": webp,
        "ppm": lambda w, h: b"P6\n%d %d\n255\n" % (w, h) + bytes(64),
        "pgm": lambda w, h: b"P5\n%d %d\n65535\n" % (w, h) + bytes(64),
        "progressive": lambda w, h: jpeg(w, h, progressive=True),
        "png-16": lambda w, h: png(w, h, bits=16, color=6),
    }  # fmt: skip
    for kind, make in claims.items():
        limit = 16384 if kind == "webp" else 65000
        for width, height in ((limit, limit), (8193, 8192), (limit, 67_108_864 // limit + 1)):
            yield f"{kind}-{width}x{height}", make(width, height), "more than the limit of 67,108,864"
    for scans in (150, 1000, 10_000):
        for size in (64, 8000):
            yield f"{scans}-scans-{size}", jpeg(size, size, scans, progressive=True), "more than 100 scans"
    for name, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        chunks = [(name, head + ZEROS)] * 40
        yield f"40-{name.decode()}", png(64, 64, *chunks, pixels=ROWS), "compressed texts"
    yield "exif-of-17-MiB", png(64, 64, (b"eXIf", bytes(17 << 20)), pixels=ROWS), "16 MiB of metadata"
    yield "40000-chunks", png(64, 64, *[(b"tEXt", b"a\0b")] * 40_000, pixels=ROWS), "30,000 chunks"
    yield "pixels-of-200-MiB", png(64, 64, pixels=bytes(200 << 20)), "more than its 64 x 64 pixels"
    twice = np.random.default_rng(0).bytes(1_500_000) + bytes(24_000_000)
    yield "pixels-twice", png(2000, 2000, pixels=twice), "more than its 2000 x 2000 pixels"
    huge = bytearray(picture("PNG"))
    huge[huge.index(b"IDAT") - 4 : huge.index(b"IDAT")] = b"\x7f\xff\xff\xff"
    yield "chunk-of-2-GiB", bytes(huge), "a PNG chunk of 2,147,483,647 bytes, the file ends after"
    yield "jpeg2000", picture("JPEG2000"), "a jpeg2k image, expected one of jpeg png"
    for kind in ("GIF", "ICO", "TGA", "DDS", "PCX", "AVIF"):
        yield kind.lower(), picture(kind), "not an image"
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n", "not an image"
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>', "not an image"


def harmless() -> Iterator[tuple[str, bytes]]:
    """Decoded or refused, in either case at little cost."""
    yield "300-frames.webp", frames("WEBP", 300)
    yield "300-frames.png", frames("PNG", 300)
    yield "300-pages.tif", frames("TIFF", 300)
    yield "16-texts", png(64, 64, *[(b"tEXt", b"a\0b")] * 900, pixels=ROWS)
    yield "profile", png(64, 64, (b"iCCP", b"a\0\0" + ZEROS), pixels=ROWS)
    yield "itself.tif", tiff(8, 8, following=72)
    yield "tag-of-4-GiB", tiff(8, 8, (34675, 7, 0xFFFFFFF0, 8))
    yield "negative.bmp", bmp(64, -(2**31))
    yield "overflow.ppm", b"P6\n4294967297 4294967297\n255\n" + bytes(64)
    yield "digits.ppm", b"P6\n" + b"9" * 100_000 + b" 1\n255\n"
    yield "comment.ppm", b"P6\n#" + b"x" * (1 << 20) + b"\n8 8\n255\n" + bytes(192)
    yield "text.ppm", b"P3\n64 64\n255\n" + b"1 " * 100
    yield "empty-markers", picture("JPEG")[:2] + b"\xff\xfe\0\2" * 100_000 + picture("JPEG")[2:]
    yield "fill-bytes", picture("JPEG")[:2] + b"\xff" * 1_000_000 + picture("JPEG")[2:]
    yield "no-tables", picture("JPEG").replace(b"\xff\xdb", b"\xff\xfe").replace(b"\xff\xc4", b"\xff\xfe")
    yield "zero-sized", jpeg(0, 0)
    yield (
        "scans-in-metadata",
        picture("JPEG")[:2] + b"\xff\xe1\x40\x02" + b"\xff\xda" * 8192 + picture("JPEG")[2:],
    )
    yield "scans-behind-the-end", picture("JPEG") + b"\xff\xda" * 1000


def test_bombs_are_refused_by_their_headers(tmp_path: Path) -> None:
    files = list(refused_by_the_header())
    quiet_ones = list(harmless())
    for name, content, *_ in (*files, *quiet_ones):
        (tmp_path / name).write_bytes(content)
    warm = [tmp_path / f"warm-{i}" for i in range(len(CORPUS))]
    for path, content in zip(warm, CORPUS, strict=True):
        path.write_bytes(content)
    pieces = ("read_header", "read_picture", "inspect")
    questions = [(piece, str(tmp_path / name)) for name, *_ in files for piece in pieces[:2]]
    questions += [("inspect", str(tmp_path / name)) for name, _ in quiet_ones]
    outcomes = audit(3 * questions, warm=[(piece, str(path)) for path in warm for piece in pieces])
    outcomes = [quickest(outcomes[i :: len(questions)]) for i in range(len(questions))]
    with promise(18, "image bomb: refused from the header within 50 ms and 32 MiB") as cases:
        for (name, content, words), outcome in zip(files, outcomes[::2], strict=False):
            with cases.case(name):
                quiet(outcome, seconds=0.05, memory=(32 << 20) + 2 * len(content))
                assert words in outcome.result, f"expected {words!r} in {outcome.result!r}"
    with promise(18, "frames, pages and metadata that cost nothing") as cases:
        for (name, content), outcome in zip(quiet_ones, outcomes[2 * len(files) :], strict=True):
            with cases.case(name):
                quiet(outcome, seconds=0.25, memory=(32 << 20) + 2 * len(content))
                assert not outcome.error
    with promise(18, "the same bombs as pictures for the evaluation") as cases:
        for (name, content, _), outcome in zip(files, outcomes[1 : 2 * len(files) : 2], strict=True):
            with cases.case(name):
                quiet(outcome, seconds=0.5, memory=(32 << 20) + 2 * len(content))
                assert not outcome.error or "UnreadableImage" in outcome.error, outcome.error
