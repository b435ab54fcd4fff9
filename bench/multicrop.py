"""The multi-crop finish against Pillow, operation by operation and as a whole, one thread each.

python -m bench.multicrop [--images FOLDER] [--rounds 15] [--save]

Both get the same decoded images and the same parameters (the official distribution); first their crops are
compared, which must be equal bit for bit. Then they take turns. The first table is all crops of every image
(2 x 224 + 8 x 96) with everything that they draw, on a GPU also by its kernels. In the others each row
applies one operation to every crop besides the first row's crop, resize and normalise; the last columns are
what that operation costs alone.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastdino_kernels import csrc
from fastdino_kernels.multicrop import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    JITTER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    multicrop,
)
from PIL import Image
from torch import Tensor

from bench.harness import Transcript, interleave, save, summarise, table
from bench.official_crops import apply, view_sizes
from fastdino.config import CropConfig
from fastdino.data.augment import crop_parameters

# An operation and the columns that it needs; without their columns these do nothing.
OPERATIONS = {
    "flip": {FLIP: 1.0},
    "gray": {GRAY: 1.0},
    "blur": {SIGMA: 1.3},
    "jitter": {JITTER: 1.0, BRIGHTNESS: 1.2, CONTRAST: 0.8, SATURATION: 1.1, HUE: 0.05},
}


def pictures(folder: Path | None, count: int = 16) -> list[Image.Image]:
    if folder is not None:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
        return [Image.open(path).convert("RGB") for path in paths[:count]]
    noise = np.random.default_rng(0).integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
    return [Image.fromarray(n).resize((500, 375), Image.Resampling.BICUBIC) for n in noise]


class Case:
    """Crops of the given views of all pictures, by Pillow and by us."""

    def __init__(
        self,
        images: list[Image.Image],
        rows: np.ndarray,
        sizes: list[int],
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.images, self.rows, self.sizes = images, np.ascontiguousarray(rows), sizes
        self.decoded = [torch.from_numpy(np.array(image)).to(device) for image in images]
        self.out = [torch.empty(len(images), 3, size, size, dtype=dtype, device=device) for size in sizes]

    def pillow(self) -> list[Tensor]:
        return [
            torch.stack(
                [apply(image, row[v], size) for image, row in zip(self.images, self.rows, strict=True)]
            )
            for v, size in enumerate(self.sizes)
        ]

    def fastdino(self) -> list[Tensor]:
        multicrop(self.decoded, self.rows, out=self.out, num_threads=1)
        return self.out

    def compare(self) -> None:
        for theirs, ours in zip(self.pillow(), self.fastdino(), strict=True):
            if not torch.equal(theirs.to(ours.dtype), ours.cpu()):
                raise SystemExit("multicrop: the crops differ from Pillow's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images; without it, 500 x 375 smooth noise")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    if csrc.library() is None:
        raise SystemExit("multicrop: the C++ kernels are not built: make build")
    say = Transcript()
    torch.set_num_threads(1)

    images, crops = pictures(args.images), CropConfig()
    heights_widths = np.array([(image.height, image.width) for image in images])
    rows = crop_parameters(0, 0, np.arange(len(images)), heights_widths, crops)
    sizes = view_sizes(crops)
    whole = Case(images, rows, sizes, torch.float32)
    sides = {"fastdino": whole, "fastdino, bfloat16": Case(images, rows, sizes, torch.bfloat16)}
    if torch.cuda.is_available():
        sides["fastdino, GPU"] = Case(images, rows, sizes, torch.float32, "cuda")
        sides["fastdino, GPU, bfloat16"] = Case(images, rows, sizes, torch.bfloat16, "cuda")
    for case in sides.values():
        case.compare()
    providers = {"Pillow": whole.pillow} | {name: case.fastdino for name, case in sides.items()}
    summary = {"all": summarise(interleave(providers, rounds=args.rounds), "Pillow")}
    say(f"all crops of {len(images)} images")
    say(table(summary["all"], dict.fromkeys(providers, len(images))))
    if not torch.cuda.is_available():
        say("fastdino, GPU: not measured, there is no GPU")

    plain = rows.copy()
    plain[..., [FLIP, JITTER, GRAY, SIGMA, SOLARIZE]] = 0
    for size in sorted(set(sizes), reverse=True):
        views = [v for v, s in enumerate(sizes) if s == size]
        make = partial(Case, images, sizes=[size] * len(views), dtype=torch.float32)
        cases = {"resize": make(plain[:, views])}
        for name, columns in OPERATIONS.items():
            more = plain[:, views].copy()
            for column, value in columns.items():
                more[..., column] = value
            cases[name] = make(more)
        calls = {}
        for name, case in cases.items():
            case.compare()
            calls[name, "Pillow"], calls[name, "fastdino"] = case.pillow, case.fastdino
        times = interleave(calls, rounds=args.rounds)  # type: ignore[arg-type]
        micro = {key: statistics.median(v) / len(images) / len(views) * 1e6 for key, v in times.items()}
        say(f"\n{f'size {size}, us per crop':28} {'Pillow':>9} {'fastdino':>9} {'speed-up':>9}   alone")
        for name in cases:
            theirs, ours = micro[name, "Pillow"], micro[name, "fastdino"]
            line = f"{name:28} {theirs:9.1f} {ours:9.1f} {theirs / ours:8.1f}x"
            if name != "resize":
                line += (
                    f"   {theirs - micro['resize', 'Pillow']:7.1f} {ours - micro['resize', 'fastdino']:7.1f}"
                )
            say(line)
        summary[str(size)] = {
            f"{name}, {side}": {"median_us": value} for (name, side), value in micro.items()
        }
    if args.save:
        print(save("multicrop", say, summary))


if __name__ == "__main__":
    main()
