"""Layouts are recognised, and the flags that a report uses are those of the paper."""

from __future__ import annotations

import pytest
from PIL import Image

from fastdino.evaluation.paper import paper_figure
from fastdino.evaluation.plan import curves, find_voc, held_out_folder, plan


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
    return root


def keys(*roots):
    return {task.key for task in plan(roots)} - {"throughput"}


ANY = {"neighbours", "pca", "attention"}
SPLIT = {"knn", "logistic", "linear", "finetune", "tsne"}


@pytest.mark.parametrize("name", ["val", "test"])
def test_classes(tmp_path, name):
    assert keys(folders(tmp_path, name)) == ANY
    assert keys(folders(tmp_path, "train")) == ANY | SPLIT
    assert keys(folders(tmp_path, f"masks/{name}")) == ANY | SPLIT | {"jaccard"}
    of = {task.key: task.words for task in plan([tmp_path], image_size=96)}
    assert of["knn"] == ("--data_path", str(tmp_path), "--image_size", "96")
    assert "cached" in of["linear"] and "96" in of["linear"]
    assert of["tsne"][1] == of["pca"][1] == of["jaccard"][1] == str(tmp_path / name)
    assert of["throughput"] == ("--image_size", "96")


def test_val_goes_before_test(tmp_path):
    assert held_out_folder(tmp_path) is None
    assert held_out_folder(folders(tmp_path, "test")) == tmp_path / "test"
    assert held_out_folder(folders(tmp_path, "val")) == tmp_path / "val"


def test_benchmarks(tmp_path):
    folders(tmp_path, "roxford5k", "rparis6k")
    for name in ("roxford5k", "rparis6k"):
        (tmp_path / name / f"gnd_{name}.pkl").touch()
    tasks = {task.key: task for task in plan([tmp_path])}
    assert set(tasks) == {"retrieval.roxford5k", "retrieval.rparis6k", "throughput"}
    assert tasks["retrieval.rparis6k"].protocol == "retrieval"
    assert tasks["retrieval.rparis6k"].words[-4:] == ("--imsize", "512", "--multiscale", "true")
    assert "--imsize" not in tasks["retrieval.roxford5k"].words

    copydays = folders(tmp_path / "copydays", "original", "strong", "distractors")
    words = next(task.words for task in plan([copydays]) if task.key == "copydetection")
    assert words[2:] == ("--blocks", "strong", "--distractors_path", str(copydays / "distractors"))

    davis = folders(tmp_path / "DAVIS", "ImageSets/2017", "JPEGImages/480p", "Annotations/480p")
    assert keys(davis) == {"davis"}


def test_voc(tmp_path):
    voc = folders(tmp_path / "VOCdevkit" / "VOC2012", "JPEGImages")
    assert find_voc(tmp_path) == find_voc(tmp_path / "VOCdevkit") == find_voc(voc) == voc
    folders(voc, "SegmentationClass")
    for root in (tmp_path, tmp_path / "VOCdevkit", voc):
        assert keys(root) == {"jaccard"}


def test_any_images(tmp_path):
    folders(tmp_path, "a")
    with pytest.raises(ValueError, match="(?s)nothing to evaluate on in .*roxford5k/gnd_roxford5k.pkl"):
        plan([tmp_path])
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    assert keys(tmp_path) == ANY
    with pytest.raises(ValueError, match="no such folder"):
        plan([tmp_path / "b"])


def test_the_first_folder_of_several_counts(tmp_path):
    one, two = folders(tmp_path / "one", "val"), folders(tmp_path / "two", "val", "train")
    of = {task.key: task.words for task in plan([one, two])}
    assert of["pca"][1] == str(one / "val") and of["knn"][1] == str(two)


def test_curves_are_of_runs(tmp_path):
    assert curves(str(tmp_path)) == curves("random") == []
    (tmp_path / "metrics.jsonl").touch()
    (task,) = curves(str(tmp_path))
    assert task.key == "collapse" and task.words == ("--runs", str(tmp_path))


@pytest.mark.parametrize(
    "protocol, figure, network, settings, expected",
    [
        ("knn", "top1_k20", "vit_small/16", {}, (74.5, "Table 2")),
        ("knn", "top1_k20", "vit_small/16", {"subset": "1%"}, (61.3, "Table 10")),
        ("knn", "top1_k20", "vit_small/16", {"subset": "list.txt"}, None),
        ("knn", "top1_k10", "vit_small/16", {}, None),
        ("knn", "top1_k20", "swin_tiny_w7", {}, (75.7, "EsViT")),
        ("logistic", "top1", "resnet50", {"subset": "10%"}, (67.8, "Table 10")),
        ("retrieval", "mAP_hard", "vit_small/16", {"dataset": "rparis6k"}, (34.4, "Table 3")),
        ("retrieval", "mAP_hard", "vit_small/16", {"dataset": "mine"}, None),
        ("jaccard", "jaccard_60", "vit_small/8", {"dataset": "voc12"}, (44.7, "Figure 4")),
        ("jaccard", "jaccard_60", "vit_small/8", {}, None),
        ("copydetection", "mAP", "vit_base/8", {}, (85.5, "Table 4")),
        ("davis", "JF", None, {}, None),
    ],
)
def test_figures_of_the_paper(protocol, figure, network, settings, expected):
    assert paper_figure(protocol, figure, network, settings) == expected
