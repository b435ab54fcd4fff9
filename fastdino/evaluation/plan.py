"""Which protocols some data allow, recognised by their layout, and the flags that run each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LAYOUTS = """\
  train/<class>/*.jpg, val/<class>/*.jpg    knn logistic linear finetune tsne neighbours
  images below val/, or any images          attention pca neighbours
  masks/val/<class>/*.png beside val/       jaccard
  VOC2012/JPEGImages, VOC2012/Segmentation* jaccard
  roxford5k/gnd_roxford5k.pkl, rparis6k/... retrieval
  original/, strong/ (Copydays)             copydetection; distractors/, whitening/ beside them are used
  ImageSets/2017/val.txt, JPEGImages/480p   davis"""

BY_REQUEST = ("finetune",)
"""Protocols that run only when they are named: they train the whole network."""

RATES = ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1")  # of the linear probe, tried in one pass


_RETRIEVAL = {
    "roxford5k": (),
    "rparis6k": ("--imsize", "512", "--multiscale", "true"),
}
"""The paper's settings."""


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


def held_out_folder(root: str | Path) -> Path | None:
    """The folder of held-out images below ``root``: ``val``, or ``test`` where there is none of that name."""
    return next((path for name in ("val", "test") if (path := Path(root) / name).is_dir()), None)


def find_voc(data_path: str | Path) -> Path | None:
    """The folder VOC2012, which ``data_path`` is or holds, also inside VOCdevkit; None for other data."""
    root = Path(data_path)
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), None)


def _of(root: Path, size: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Key and flags of every task on one folder."""
    if not root.is_dir():
        raise ValueError(f"--data_path: no such folder: {root}")
    found: list[tuple[str, tuple[str, ...]]] = []
    data = ("--data_path", str(root))
    held_out = held_out_folder(root)
    if held_out is not None:
        if (root / "train").is_dir():
            found += [(name, (*data, *size)) for name in ("knn", "logistic", "finetune")]
            found += [("linear", (*data, *size, "--features", "cached", "--lr", *RATES))]
            found += [("tsne", ("--data_path", str(held_out), *size))]
        found += _pictures(held_out, size)
        masks = root / "masks" / held_out.name
        if masks.is_dir():
            found += [("jaccard", ("--data_path", str(held_out), "--mask_path", str(masks), *size))]
    voc = find_voc(root)
    if voc is not None and (voc / "SegmentationClass").is_dir():
        found += [("jaccard", ("--data_path", str(voc), *size))]
    for name, settings in _RETRIEVAL.items():
        if (root / name / f"gnd_{name}.pkl").is_file():
            found += [(f"retrieval.{name}", (*data, "--dataset", name, *settings))]
    if (root / "original").is_dir() and (root / "strong").is_dir():
        others = [name for name in ("distractors", "whitening") if (root / name).is_dir()]
        flags = [word for name in others for word in (f"--{name}_path", str(root / name))]
        found += [("copydetection", (*data, "--blocks", "strong", *flags))]
    if (root / "ImageSets" / "2017").is_dir():
        found += [("davis", data)]
    return found or (_pictures(root, size) if _has_images(root) else [])


def _pictures(folder: Path, size: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """What any images allow."""
    images = ("--data_path", str(folder), *size)
    few = ("--num_images", "4", "--threshold", "0.6")
    return [("neighbours", images), ("pca", images), ("attention", (*images, *few))]


def _has_images(root: Path) -> bool:
    from fastdino.data.manifest import build_manifest

    try:
        build_manifest(root)
    except ValueError:
        return False
    return True
