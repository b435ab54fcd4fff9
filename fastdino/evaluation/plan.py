"""Which protocols some data allow, recognised by their layout, and the flags that run each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAYOUTS = """\
  train/<class>/*.jpg, val/<class>/*.jpg    knn logistic linear finetune tsne neighbours
  images below val/, or any images          attention pca
  masks/val/<class>/*.png beside them       jaccard
  VOC2012/JPEGImages, VOC2012/Segmentation* jaccard
  roxford5k/gnd_roxford5k.pkl, rparis6k/... retrieval
  original/, strong/ (Copydays)             copydetection
  ImageSets/2017/val.txt, JPEGImages/480p   davis"""

BY_REQUEST = ("finetune",)
"""Protocols that run only when they are named: they train the whole network."""

RATES = ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1")  # of the linear probe, tried in one pass


@dataclass(frozen=True)
class Task:
    """One protocol on one data set."""

    key: str
    """Name of the result without ``.json``: protocol, or protocol.dataset."""
    words: tuple[str, ...]
    """Flags besides those of the network."""

    @property
    def protocol(self) -> str:
        return self.key.partition(".")[0]


def plan(roots: Sequence[Path], image_size: int | None = None) -> list[Task]:
    """The tasks that the folders ``roots`` allow, throughput always; a task found twice is done on the first.
    The curves of a run are a task of its own, `curves`.

    ``image_size`` replaces the default side of all protocols on images. Raises ValueError naming a folder
    that holds nothing of a known layout.
    """
    size = () if image_size is None else ("--image_size", str(image_size))
    tasks: dict[str, Task] = {}
    for root in roots:
        found = [Task(key, words) for key, words in _of(root, size)]
        if not found:
            raise ValueError(f"--data_path: nothing to evaluate on in {root}; known layouts:\n{LAYOUTS}")
        for task in found:
            tasks.setdefault(task.key, task)
    tasks.setdefault("throughput", Task("throughput", size))
    return list(tasks.values())


def curves(weights: str) -> list[Task]:
    """The entropy and KL of the run that the weights are of, where they are of one."""
    logged = (Path(weights) / "metrics.jsonl").is_file()
    return [Task("collapse", ("--runs", weights))] if logged else []


def _of(root: Path, size: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    if not root.is_dir():
        raise ValueError(f"--data_path: no such folder: {root}")
    found: list[tuple[str, tuple[str, ...]]] = []
    data = ("--data_path", str(root), *size)
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if held_out is not None and (root / "train").is_dir():
        found += [(name, data) for name in ("knn", "logistic")]
        found += [("linear", (*data, "--features", "cached", "--lr", *RATES)), ("finetune", data)]
        found += [("tsne", ("--data_path", str(held_out), *size))]
    if held_out is not None:
        images = ("--data_path", str(held_out), *size)
        found += [("neighbours", images), ("pca", images), ("attention", (*images, "--num_images", "4", "--threshold", "0.6"))]
        masks = root / "masks" / held_out.name
        if masks.is_dir():
            found += [("jaccard", ("--data_path", str(held_out), "--mask_path", str(masks), *size))]
    for voc in filter(_voc, (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")):
        found += [("jaccard", ("--data_path", str(voc), *size))]
    for name in ("roxford5k", "rparis6k"):
        if (root / name / f"gnd_{name}.pkl").is_file():
            found += [(f"retrieval.{name}", ("--data_path", str(root), "--dataset", name))]
    if (root / "original").is_dir() and (root / "strong").is_dir():
        found += [("copydetection", ("--data_path", str(root)))]
    if (root / "ImageSets" / "2017").is_dir():
        found += [("davis", ("--data_path", str(root)))]
    return found


def _voc(path: Path) -> bool:
    return (path / "JPEGImages").is_dir() and (path / "SegmentationClass").is_dir()
