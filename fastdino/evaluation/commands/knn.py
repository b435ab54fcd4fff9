"""``python -m fastdino.evaluation knn``, after the official ``eval_knn.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

HELP = "Weighted k-nearest-neighbour classification of the images in val/, with train/ as memory bank."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.backbone_arguments(parser)
    parser.add_argument(
        "--data_path", metavar="DIR", help="folder with train/ and val/ (or test/), each of class folders"
    )
    parser.add_argument(
        "--nb_knn",
        type=command.positive,
        nargs="+",
        default=[10, 20, 100, 200],
        help="neighbours (default: 10 20 100 200)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="temperature of the votes (default: 0.07)"
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        default=224,
        help="side of the center crop in pixels (default: 224)",
    )
    command.loading_arguments(parser)
    parser.add_argument(
        "--use_cuda",
        type=command.boolean,
        default=True,
        help="classify on the GPU where there is one (default: true)",
    )
    parser.add_argument(
        "--dump_features", metavar="DIR", help="save features and labels there, as the official code does"
    )
    parser.add_argument(
        "--load_features", metavar="DIR", help="read them from there; needs neither weights nor images"
    )
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
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
        backbone = command.backbone(flags)
        tensors = []
        for manifest in (train, test):
            with command.progress(f"features of {manifest.root}") as progress:
                tensors.append(
                    extract_features(
                        backbone,
                        manifest.paths,
                        image_size=flags.image_size,
                        device=command.device(flags),
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
        command.device(flags) if flags.use_cuda else torch.device("cpu"),
    )
    lines = [
        f"{len(bank)} images in the memory bank, {len(queries)} held-out images, "
        f"{len(bank_labels.unique())} classes"
    ]
    lines += [
        f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}" for k, (top1, top5) in result.items()
    ]
    figures = {f"top1_k{k}": top1 for k, (top1, _) in result.items()}
    figures |= {f"top5_k{k}": top5 for k, (_, top5) in result.items()}
    return Result(figures, lines, {"image_size": flags.image_size, "temperature": flags.temperature})


def _load_tensor(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--load_features: no such file: {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"--load_features: {path} does not hold a tensor: {error}") from error
