"""Evaluation of any checkpoint: ``python -m fastdino.evaluation knn|attention|jaccard``.

Flags carry the names of the official ``eval_knn.py`` and ``visualize_attention.py``. Nothing heavy is
imported before the flags are understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdino.models.vit import VisionTransformer


def main(arguments: list[str] | None = None) -> int:
    """Run one evaluation; the exit code is 0, or 2 after a one-line message about a flag or a file."""
    flags = _parser().parse_args(arguments)
    try:
        flags.run(flags)
    except (OSError, ValueError) as error:
        print(f"python -m fastdino.evaluation {flags.protocol}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.evaluation",
        description="Evaluate a backbone without training anything on top of it.",
    )
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        protocol = protocols.add_parser(name, help=text, description=text)
        protocol.set_defaults(run=run)
        weights = protocol.add_argument_group("backbone")
        weights.add_argument(
            "--weights",
            "--pretrained_weights",
            metavar="PATH",
            help="run directory, checkpoint directory or official .pth file; 'random' is untrained",
        )
        weights.add_argument(
            "--arch", help="architecture, where the file does not say it (vit_tiny, vit_small, vit_base)"
        )
        weights.add_argument(
            "--patch_size", type=_positive, help="patch side in pixels, where the file does not say it"
        )
        weights.add_argument(
            "--checkpoint_key", default="teacher", help="network inside the checkpoint (default: teacher)"
        )
        weights.add_argument(
            "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: CUDA where there is"
        )
        for ignored in ("--dist_url", "--local_rank", "--local-rank"):
            weights.add_argument(ignored, help=argparse.SUPPRESS)
        return protocol

    knn = add(
        "knn",
        _knn,
        "Weighted k-nearest-neighbour classification of the images in val/, with train/ as memory bank.",
    )
    knn.add_argument(
        "--data_path", metavar="DIR", help="folder with train/ and val/ (or test/), each of class folders"
    )
    knn.add_argument(
        "--nb_knn",
        type=_positive,
        nargs="+",
        default=[10, 20, 100, 200],
        help="neighbours (default: 10 20 100 200)",
    )
    knn.add_argument(
        "--temperature", type=float, default=0.07, help="temperature of the votes (default: 0.07)"
    )
    knn.add_argument(
        "--image_size", type=_positive, default=224, help="side of the center crop in pixels (default: 224)"
    )
    knn.add_argument(
        "--batch_size_per_gpu", type=_positive, default=128, help="images per forward pass (default: 128)"
    )
    knn.add_argument("--num_workers", type=int, default=0, help="decoding threads (default: one per core)")
    knn.add_argument(
        "--use_cuda",
        type=_boolean,
        default=True,
        help="classify on the GPU where there is one (default: true)",
    )
    knn.add_argument(
        "--dump_features", metavar="DIR", help="save features and labels there, as the official code does"
    )
    knn.add_argument(
        "--load_features", metavar="DIR", help="read them from there; needs neither weights nor images"
    )

    attention = add(
        "attention", _attention, "Write the attention of every head of the last block as PNG files."
    )
    attention.add_argument(
        "--data_path",
        "--image_path",
        metavar="PATH",
        required=True,
        help="one image, or a folder of images (recursive)",
    )
    attention.add_argument(
        "--image_size",
        type=_positive,
        nargs="+",
        default=[480, 480],
        help="height and width in pixels (default: 480 480)",
    )
    attention.add_argument(
        "--threshold",
        type=_share,
        help="also show the fewest patches that hold this share of the attention, e.g. 0.6",
    )
    attention.add_argument(
        "--output_dir", metavar="DIR", default=".", help="where the PNG files go (default: .)"
    )

    overlap = add(
        "jaccard", _jaccard, "Overlap (intersection over union) of attention masks and ground-truth masks."
    )
    overlap.add_argument("--data_path", metavar="DIR", required=True, help="folder of images (recursive)")
    overlap.add_argument(
        "--mask_path",
        metavar="DIR",
        required=True,
        help="folder of mask PNGs with the same relative names: 0 background, 255 void",
    )
    overlap.add_argument("--image_size", type=_positive, default=480, help="side in pixels (default: 480)")
    overlap.add_argument(
        "--threshold", type=_share, default=0.6, help="share of the attention a mask holds (default: 0.6)"
    )
    return parser


def _knn(flags: argparse.Namespace) -> None:
    import torch

    from fastdino.data.manifest import build_manifest
    from fastdino.evaluation.features import extract_features
    from fastdino.evaluation.knn import knn_classify, matching_labels

    names = ("trainfeat", "testfeat", "trainlabels", "testlabels")
    if flags.load_features:
        tensors = [_load_tensor(Path(flags.load_features, f"{name}.pth")) for name in names]
    else:
        if not flags.data_path:
            raise ValueError("--data_path is required (a folder with train/ and val/)")
        root = Path(flags.data_path)
        held_out = root / "val" if (root / "val").is_dir() or not (root / "test").is_dir() else root / "test"
        train, test = build_manifest(root / "train"), build_manifest(held_out)
        labels = matching_labels(train, test)
        backbone, device = _backbone(flags)
        tensors = []
        for manifest in (train, test):
            with _progress(f"features of {manifest.root}") as progress:
                tensors.append(
                    extract_features(
                        backbone,
                        manifest.paths,
                        image_size=flags.image_size,
                        device=device,
                        batch_size=flags.batch_size_per_gpu,
                        num_threads=flags.num_workers,
                        progress=progress,
                    )
                )
        tensors += labels
        if flags.dump_features:
            folder = Path(flags.dump_features)
            folder.mkdir(parents=True, exist_ok=True)
            for name, tensor in zip(names, tensors, strict=True):
                if name.endswith("feat"):  # the official code saves normalised features
                    tensor = torch.nn.functional.normalize(tensor, dim=1)
                torch.save(tensor, folder / f"{name}.pth")
    bank, queries, bank_labels, query_labels = tensors
    result = knn_classify(
        bank,
        bank_labels,
        queries,
        query_labels,
        flags.nb_knn,
        flags.temperature,
        _device(flags) if flags.use_cuda else torch.device("cpu"),
    )
    print(
        f"{len(bank)} images in the memory bank, {len(queries)} held-out images, "
        f"{len(bank_labels.unique())} classes"
    )
    for k, (top1, top5) in result.items():
        print(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}")


def _attention(flags: argparse.Namespace) -> None:
    from fastdino.data.manifest import printable
    from fastdino.evaluation.attention import write_attention
    from fastdino.evaluation.features import UnreadableImage, list_images

    if len(flags.image_size) > 2:
        raise ValueError(f"--image_size: expected one or two numbers, got {len(flags.image_size)}")
    size = (flags.image_size[0], flags.image_size[-1])
    root, paths = list_images(flags.data_path)
    backbone, device = _backbone(flags)
    output = Path(flags.output_dir)
    files, unreadable = [], []
    with _progress("attention maps") as progress:
        for done, path in enumerate(paths, 1):
            # the suffix stays in the folder's name: cat.jpg and cat.png are two images
            inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
            folder = output if len(paths) == 1 else output / inside
            try:
                files += write_attention(
                    backbone, path, folder, image_size=size, threshold=flags.threshold, device=device
                )
            except UnreadableImage as error:
                unreadable.append(str(error))
            progress(done, len(paths))
    if not files:
        raise ValueError(f"--data_path: none of {len(paths)} can be used: {printable(unreadable[0])}")
    for message in unreadable:
        print(f"left out: {printable(message)}", file=sys.stderr)
    print(f"{len(paths) - len(unreadable)} images, {len(files)} files, in {output}")


def _jaccard(flags: argparse.Namespace) -> None:
    from fastdino.evaluation.jaccard import jaccard, pair_masks

    images, masks = pair_masks(flags.data_path, flags.mask_path)
    backbone, device = _backbone(flags)
    with _progress("attention masks") as progress:
        result = jaccard(
            backbone,
            images,
            masks,
            image_size=flags.image_size,
            threshold=flags.threshold,
            device=device,
            progress=progress,
        )
    counted = sum(score is not None for score in result.per_image)
    print(
        f"Jaccard of attention masks: {result.mean:.2f} "
        f"(best head per object, {counted} images, {flags.threshold:g} of the mass)"
    )


def _device(flags: argparse.Namespace) -> Any:
    import torch

    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use")
    if flags.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(flags.device)


def _backbone(flags: argparse.Namespace) -> tuple[VisionTransformer, Any]:
    """The network of --weights on its device."""
    device = _device(flags)
    if not flags.weights:
        raise ValueError(
            "--weights is required (run directory, checkpoint directory, official .pth file, or 'random')"
        )
    if flags.weights == "random":
        import torch

        from fastdino.config import ModelConfig
        from fastdino.models import build_backbone

        torch.manual_seed(0)
        backbone = build_backbone(
            ModelConfig(arch=flags.arch or "vit_small", patch_size=flags.patch_size or 16)
        )
    else:
        from fastdino.engine.checkpoint import CheckpointError
        from fastdino.interop.weights import load_backbone

        try:
            backbone = load_backbone(
                flags.weights, arch=flags.arch, patch_size=flags.patch_size, key=flags.checkpoint_key
            )
        except CheckpointError as error:
            raise ValueError(f"--weights: {error}") from error
    return backbone.to(device).eval(), device


def _load_tensor(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--load_features: no such file: {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"--load_features: {path} does not hold a tensor: {error}") from error


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")
    return value


def _boolean(text: str) -> bool:
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text}")


if __name__ == "__main__":
    sys.exit(main())
