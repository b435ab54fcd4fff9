"""``python -m fastdino.evaluation knn``, after the official ``eval_knn.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdino.evaluation import command
from fastdino.evaluation.command import Result

if TYPE_CHECKING:
    from torch import Tensor

    from fastdino.data.manifest import Manifest
    from fastdino.engine.parallel import World

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
    parser.add_argument(
        "--subset",
        metavar="CHOICE",
        help="1%%, 10%%, or a file of image names, one per line (SimCLR's lists), to take from train/",
    )
    command.loading_arguments(parser)
    command.cuda_argument(parser, "classify")
    parser.add_argument(
        "--dump_features",
        metavar="DIR",
        help="save features and labels there, as the official code does; they are then no longer kept in "
        "memory, and a run that was killed continues where it was",
    )
    parser.add_argument(
        "--load_features", metavar="DIR", help="read them from there; needs neither weights nor images"
    )
    command.output_argument(parser)


def run(flags: argparse.Namespace) -> Result:
    from fastdino.evaluation.features import share
    from fastdino.evaluation.knn import knn_classify

    if flags.subset and flags.load_features:
        raise ValueError("--subset chooses images, but --load_features has none")
    world = command.world(flags)
    if flags.load_features:
        bank, queries, bank_labels, labels = _load(Path(flags.load_features))
        own = share(len(bank), flags.batch_size_per_gpu, world)
        bank = bank[own]
    else:
        bank, queries, bank_labels, labels = _extract(flags, world)
        own = share(len(bank_labels), flags.batch_size_per_gpu, world)
    result = knn_classify(
        bank,
        bank_labels[own],
        queries,
        labels,
        flags.nb_knn,
        flags.temperature,
        world.device if flags.use_cuda or world.size > 1 else "cpu",
        world=world,
    )
    lines = [
        f"{len(bank_labels)} images in the memory bank, {len(queries)} held-out images, "
        f"{len(bank_labels.unique())} classes"
    ]
    lines += [
        f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}" for k, (top1, top5) in result.items()
    ]
    figures = {f"top1_k{k}": top1 for k, (top1, _) in result.items()}
    figures |= {f"top5_k{k}": top5 for k, (_, top5) in result.items()}
    settings = {"image_size": flags.image_size, "temperature": flags.temperature}
    if not flags.load_features:
        settings["precision"] = command.precision_name(flags)
    if flags.subset:
        settings["subset"] = flags.subset
    return Result(figures, lines, settings)


def _extract(flags: argparse.Namespace, world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This process's part of the bank, all held-out features, the labels of the whole bank and of these."""
    import torch

    from fastdino.evaluation.features import share
    from fastdino.evaluation.knn import matching_labels
    from fastdino.evaluation.subsets import subset
    from fastdino.evaluation.training import splits

    train, test = splits(flags.data_path)
    if flags.subset:
        train = subset(train, flags.subset)
    labels = matching_labels(train, test)
    backbone = command.backbone(flags)
    dump = Path(flags.dump_features) if flags.dump_features else None

    def extract(manifest: Manifest, paths: Sequence[str], name: str, world: World | None) -> Tensor:
        file, text = dump and dump / f"{name}.pth", f"features of {manifest.root}"
        # divided by their lengths, as the official code saves them
        return command.extract(flags, backbone, paths, text, normalized=True, file=file, world=world)

    own = share(len(train), flags.batch_size_per_gpu, world)
    queries = extract(test, test.paths, "testfeat", world)
    if dump:
        bank = extract(train, train.paths, "trainfeat", world)[own]
    elif own.start < own.stop:
        bank = extract(train, [train.paths[i] for i in range(own.start, own.stop)], "", None)
    else:  # more processes than batches
        bank = queries[:0]
    if dump and world.main:
        for name, tensor in zip(("trainlabels", "testlabels"), labels, strict=True):
            torch.save(tensor, dump / f"{name}.pth")
    return bank, queries, *labels


def _load(folder: Path) -> list[Tensor]:
    """Features of bank and held-out images, then their labels."""
    from fastdino.evaluation.feature_file import load_mapped

    tensors = []
    for name in ("trainfeat", "testfeat", "trainlabels", "testlabels"):
        path = folder / f"{name}.pth"
        if not path.is_file():
            raise FileNotFoundError(f"--load_features: no such file: {path}")
        try:
            tensors.append(load_mapped(path))
        except ValueError as error:
            raise ValueError(f"--load_features: {error}") from error
    return tensors
