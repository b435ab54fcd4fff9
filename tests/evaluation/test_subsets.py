"""Parts of a training set: how many of each class, always the same ones, and lists of names."""

from __future__ import annotations

import numpy as np
import pytest

from fastdino.data.manifest import Manifest
from fastdino.evaluation.subsets import subset


def made_up(counts, order=1) -> Manifest:
    paths, labels = [], []
    for label, count in enumerate(counts):
        for i in range(count)[::order]:
            paths.append(f"/data/train/n{label:04}/n{label:04}_{i}.JPEG")
            labels.append(label)
    return Manifest(
        paths, np.array(labels, np.int64), [f"n{i:04}" for i in range(len(counts))], "/data/train"
    )


def test_sizes_are_those_of_lists_for_imagenet():
    """The same share of the whole, equal in every class within one, though classes have 732 to 1300."""
    counts = np.full(40, 1300)
    counts[::5] = np.linspace(732, 1299, 8)
    manifest = made_up(counts)
    for choice, share in (("1%", 0.01), ("10%", 0.1)):
        chosen = subset(manifest, choice)
        per_class = np.bincount(chosen.labels, minlength=40)
        assert len(chosen) == int(len(manifest) * share)
        assert per_class.max() - per_class.min() <= 1
        assert chosen.class_names == manifest.class_names


def test_choice_depends_on_names_alone_and_grows():
    manifest = made_up([50, 70, 60])
    few, many, all_of_it = (subset(manifest, choice) for choice in ("10%", "30%", "100%"))
    assert set(few.paths) < set(many.paths) < set(manifest.paths)
    assert all_of_it.paths == manifest.paths
    assert few.paths == sorted(few.paths, key=manifest.paths.index)
    assert set(subset(made_up([50, 70, 60], order=-1), "10%").paths) == set(few.paths)
    assert few.paths != [p for label in range(3) for p in manifest.paths if f"n{label:04}/" in p][: len(few)]
    # the choice of a release stays that of the next
    numbers = [path.rpartition("_")[2] for path in subset(made_up([30]), "10%").paths]
    assert numbers == ["10.JPEG", "15.JPEG", "25.JPEG"]


def test_small_classes_give_all_and_others_more():
    chosen = subset(made_up([2, 100, 98]), "50%")
    assert np.bincount(chosen.labels).tolist() == [2, 49, 49]
    assert np.bincount(subset(made_up([3, 3, 400]), "0.1%").labels).tolist() == [1, 1, 1]


def test_list_of_names(tmp_path):
    manifest = made_up([5, 5])
    names = tmp_path / "1percent.txt"
    names.write_bytes(b"n0001_2.JPEG\r\n\nn0000_4.JPEG\nn0001/n0001_0.JPEG\n")
    chosen = subset(manifest, str(names))
    assert [p.rpartition("/")[2] for p in chosen.paths] == ["n0000_4.JPEG", "n0001_0.JPEG", "n0001_2.JPEG"]
    assert chosen.labels.tolist() == [0, 1, 1]


def test_names_that_several_classes_have(tmp_path):
    manifest = Manifest(["a/1.jpg", "b/1.jpg"], np.array([0, 1]), ["a", "b"], "root")
    names = tmp_path / "names.txt"
    names.write_text("b/1.jpg\n")
    assert subset(manifest, str(names)).paths == ["b/1.jpg"]
    names.write_text("1.jpg\n")
    with pytest.raises(ValueError, match="1.jpg is the name of 2 images; expected class/name"):
        subset(manifest, str(names))


def test_errors_name_the_flag(tmp_path):
    manifest = made_up([5, 5])
    for choice in ("0%", "101%", "x%", "nan%"):
        with pytest.raises(ValueError, match=f"--subset {choice}"):
            subset(manifest, choice)
    with pytest.raises(FileNotFoundError, match="--subset: expected 1%, 10% or a file"):
        subset(manifest, str(tmp_path / "nowhere.txt"))
    names = tmp_path / "names.txt"
    names.write_text("\n")
    with pytest.raises(ValueError, match="--subset.*names no image"):
        subset(manifest, str(names))
    names.write_text("n0000_1.JPEG\nother.JPEG\n")
    with pytest.raises(ValueError, match="1 of 2 names.*other.JPEG"):
        subset(manifest, str(names))
    for choice in ("1%", str(names)):
        with pytest.raises(ValueError, match="--subset: needs labels"):
            subset(Manifest(["a.jpg"], None, [], "root"), choice)
