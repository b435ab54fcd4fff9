"""Evaluation of a frozen network: k-NN classification of features, and the way from image files to features.

python -m bench.evaluation [--parts knn features] [--official PATH] [--images FOLDER] [--workers 2] [--save]

k-NN: 50,000 bank and 10,000 test features of 384 numbers in 1000 clusters, k = 10, 20, 100, 200. The
official way is one pass for each k, in 100 chunks: product with the whole bank, topk, a one-hot table
[chunk, k, 1000] times the weights, a sort of all classes. It is written here in plain PyTorch, and --official
runs the function of the official repository itself. Both sides must count as many hits, but for three images
at most: votes in fp32 may tie where ours, in double, do not, and the official top-5 fills up with classes
that got no votes.

Features: JPEG files (500 x 375, made on the spot, or --images) through Resize(256), CenterCrop(224) and a
ViT-S/16. The official way is Pillow in the workers of a DataLoader and the network in fp32, plain eager code
or, with --official, the repository's. In fp32 the features must be equal up to 1e-5; ours then also runs in
the hardware's best 16-bit type. "pixels" is the same with the mean colour in place of the network: what the
files alone cost.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench import official
from bench.eager_step import vit_features
from bench.harness import Transcript, interleave, save, summarise
from bench.loader import make_images
from bench.machine import DTYPES, best, device, exact
from bench.providers import TOY, machine
from fastdino.config import Config, with_flags
from fastdino.data.manifest import build_manifest
from fastdino.evaluation.features import extract_features
from fastdino.evaluation.knn import knn_classify
from fastdino.models import build_backbone
from fastdino.models.attention import resolve_attention

KS = (10, 20, 100, 200)
Accuracies = dict[int, tuple[float, float]]


# ------------------------------------------------------------------------------------------------------- k-NN


def clustered(n: int, classes: int, width: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [n, width] around the centers of classes, and their classes."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = centers[labels] + spread * torch.randn(n, width, generator=generator)
    return nn.functional.normalize(features, dim=1), labels


@torch.no_grad()
def chunked(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, T: float) -> Any:
    """The official way for one k, 1000 classes: top-1 and top-5 accuracy in percent."""
    classes, chunk = 1000, max(1, len(queries) // 100)
    top1 = top5 = 0
    for some, truth in zip(queries.split(chunk), labels.split(chunk), strict=True):
        cosines, index = (some @ bank.T).topk(k, sorted=True)  # [c, k]
        table = torch.zeros(len(some), k, classes, device=bank.device)
        table.scatter_(2, bank_labels[index][:, :, None], 1)
        votes = (table * (cosines / T).exp()[:, :, None]).sum(1)  # [c, classes]
        right = votes.sort(1, descending=True).indices == truth[:, None]
        top1 += int(right[:, :1].sum())
        top5 += int(right[:, :5].sum())
    return 100 * top1 / len(labels), 100 * top5 / len(labels)


def official_classifier(path: Path) -> Callable[..., Any]:
    """knn_classifier of a checkout of facebookresearch/dino."""
    if not (path / "eval_knn.py").is_file():
        raise SystemExit(
            f"--official {path}: expected a checkout of facebookresearch/dino, found no eval_knn.py"
        )
    # eval_knn imports torchvision for the data set, which is not needed here and cannot be imported beside a
    # CPU build of torch; the checkout's module names are too common to stay.
    stand_in = ModuleType("torchvision")
    for name in ("datasets", "transforms", "models"):
        setattr(stand_in, name, ModuleType(name))
    stand_in.datasets.ImageFolder = object  # type: ignore[attr-defined]
    names = ("utils", "vision_transformer", "eval_knn", "torchvision")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules["torchvision"] = stand_in
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module("eval_knn").knn_classifier
    finally:
        sys.path.remove(str(path))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def measure_knn(args: argparse.Namespace, say: Transcript) -> list[dict[str, Any]]:
    n, m, width, classes = (2000, 300, 32, 20) if args.toy else (50_000, 10_000, 384, 1000)
    spread = 1.6 if args.toy else 3.0  # neither all nor none are classified right
    sets = [clustered(size, classes, width, spread, seed) for seed, size in ((1, n), (2, m))]
    data = [x.to(device()) for both in sets for x in both]

    def one_k_at_a_time(classifier: Callable[..., Any]) -> Accuracies:
        return {k: classifier(*data, k, 0.07) for k in KS}

    providers: dict[str, Callable[[], Accuracies]] = {}
    if args.official is not None:
        providers["official"] = partial(one_k_at_a_time, official_classifier(args.official))
    providers["chunked eager"] = partial(one_k_at_a_time, chunked)
    providers["fastdino"] = partial(knn_classify, *data, KS)
    found = {name: call() for name, call in providers.items()}
    say(f"k-NN: {n} x {m} features of {width} numbers, {classes} classes, k = {', '.join(map(str, KS))}")
    say("top-1, all sides: " + ", ".join(f"{top1:.2f}" for top1, _ in found["fastdino"].values()))
    same_hits(found, m)
    times = interleave(providers, rounds=100, warmup=0, seconds=args.seconds)
    return report("knn", times, {name: "fp32" for name in times}, m, "queries/s", say)


def same_hits(found: dict[str, Accuracies], queries: int) -> None:
    """SystemExit unless all sides count the same hits, but for three."""
    for name, accuracies in found.items():
        for k, (top1, top5) in accuracies.items():
            truth = found["fastdino"][k]
            off = max(abs(top1 - truth[0]), abs(top5 - truth[1])) * queries / 100
            if not off <= 3.01:
                raise SystemExit(f"k = {k}: {name} counts {off:.0f} other hits, nothing is timed")


# --------------------------------------------------------------------------------------------------- features


class OfficialImages(Dataset[Tensor]):
    """Each file through the official transforms: Resize(256, bicubic), CenterCrop, ToTensor, Normalize."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        shorter, (width, height) = round(self.size * 256 / 224), image.size
        scaled = [max(shorter, int(shorter * side / min(width, height))) for side in (width, height)]
        left, top = (round((side - self.size) / 2) for side in scaled)
        image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
        crop = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        return pixels.sub_(mean[:, None, None]).div_(std[:, None, None])


@torch.no_grad()
def through_a_dataloader(
    network: Callable[[Tensor], Tensor], paths: list[str], size: int, batch: int, workers: int
) -> Tensor:
    """The official way: features [n, D] on the CPU."""
    loader = DataLoader(
        OfficialImages(paths, size), batch, num_workers=workers, pin_memory=device().type == "cuda"
    )
    return torch.cat([network(images.to(device(), non_blocking=True)).cpu() for images in loader])


class MeanColor(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def measure_features(paths: list[str], args: argparse.Namespace, say: Transcript) -> list[dict[str, Any]]:
    flags = dict(arch="vit_small", patch_size=16) | (TOY if args.toy else {})
    config = with_flags(Config(), flags)
    size = config.crops.global_crops_size
    torch.manual_seed(0)
    vit = build_backbone(config.model, img_size=size).eval().to(device())
    rival: Callable[[Tensor], Tensor] = lambda images: vit_features(vit, images)  # noqa: E731
    name = "plain eager"
    if args.official is not None:
        theirs = official.backbone(official.load(args.official), config.model, size).eval()
        theirs.load_state_dict(vit.state_dict())
        rival, name = theirs.to(device()), "official"
    say(f"features: {len(paths)} files, {size} x {size} pixels, batch {args.batch}, {args.workers} workers")
    rows = []
    for what, network, other in (("pixels", MeanColor(), MeanColor()), ("vit_small/16", vit, rival)):
        common = dict(image_size=size, device=device(), batch_size=args.batch, num_threads=args.workers)
        providers: dict[str, Callable[[], Tensor]] = {
            f"{name}, Pillow": partial(through_a_dataloader, other, paths, size, args.batch, args.workers),
            "fastdino fp32": partial(extract_features, network, paths, **common),
        }
        with exact():
            error = difference({key: call() for key, call in providers.items()})
        say(f"{what}: features in fp32 differ by {error:.1e}")
        if what != "pixels" and best() != "fp32":
            dtype = DTYPES[best()]
            attention = resolve_attention(
                "auto", device=device(), dtype=dtype, head_dim=vit.embed_dim // vit.num_heads
            )
            assert attention == vit.attention
            providers[f"fastdino {best()}"] = partial(extract_features, network, paths, **common, dtype=dtype)
        times = interleave(providers, rounds=100, seconds=args.seconds)
        types = {key: best() if key.endswith(best()) else "fp32" for key in times}
        rows += report(what, times, types, len(paths), "img/s", say)
    return rows


def difference(found: dict[str, Tensor]) -> float:
    """Largest relative difference of the features; SystemExit if it is above 1e-5."""
    first, *rest = found.values()
    error = max(float((x - first).norm() / first.norm()) for x in rest)
    if not error <= 1e-5:
        raise SystemExit(f"features differ by {error:.1e}, nothing is timed")
    return error


# ----------------------------------------------------------------------------------------------------- output


def report(
    op: str, times: dict[str, list[float]], types: dict[str, str], items: int, unit: str, say: Transcript
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, figures in summarise(times, next(iter(times))).items():
        rate = items / figures["median_s"]
        rows.append({"op": op, "provider": name, "dtype": types[name], **figures, "per_second": rate})
        rows[-1]["rounds"] = len(times[name])
        spread = f"{figures['min_s']:7.3f}-{figures['max_s']:7.3f}"
        gain = f"{figures['speedup']:6.2f}x {figures['speedup_min']:6.2f}-{figures['speedup_max']:.2f}"
        say(f"{op:13} {name:22} {figures['median_s']:8.3f} s  {spread} {gain} {rate:9.1f} {unit}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("knn", "features"), default=["knn", "features"])
    parser.add_argument("--official", type=Path, metavar="PATH", help="checkout of facebookresearch/dino")
    parser.add_argument("--images", metavar="FOLDER", help="by default made on the spot")
    parser.add_argument("--count", type=int, default=256, help="images to make (default: 256)")
    parser.add_argument("--batch", type=int, help="images; 128 on a GPU, 32 on a CPU")
    parser.add_argument("--workers", type=int, default=2, help="processes there, threads here (default: 2)")
    parser.add_argument("--seconds", type=float, default=120, help="to spend on each comparison, about")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: checks this file; times mean nothing")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    args = parser.parse_args()
    say = Transcript()
    args.batch = args.batch or (128 if device().type == "cuda" else 32)
    say(f"evaluation, {machine()}")
    if args.official is None:
        say("official code: not measured (no --official PATH)")
    rows = measure_knn(args, say) if "knn" in args.parts else []
    if "features" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            if not args.images:
                make_images(Path(folder), 6 if args.toy else args.count)
            rows += measure_features(list(build_manifest(args.images or folder).paths), args, say)
    if args.save:
        print(save("evaluation", say, {"batch": args.batch, "workers": args.workers, "rows": rows}))


if __name__ == "__main__":
    main()
