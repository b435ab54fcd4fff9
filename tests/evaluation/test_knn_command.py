"""``python -m fastdino.evaluation knn``: subsets, features on disk, precision."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation import features
from fastdino.evaluation.__main__ import main

LINE = ["knn", "--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--image_size", "32"]


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 2)):
        for name, color in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (color + rng.integers(-20, 20, (24, 24, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG")
    return tmp_path


def test_subset(dataset, capsys):
    line = [*LINE, "--data_path", str(dataset / "images"), "--nb_knn", "3"]
    assert main([*line, "--subset", "10%", "--output_dir", str(dataset / "out")]) == 0
    assert "4 images in the memory bank, 4 held-out images, 2 classes" in capsys.readouterr().out
    record = json.loads((dataset / "out" / "knn.json").read_text())
    assert record["settings"]["subset"] == "10%" and record["figures"] == {"top1_k3": 100.0, "top5_k3": 100.0}
    (dataset / "list.txt").write_text("dark_3.JPEG\nlight_7.JPEG\nlight_2.JPEG\n")
    assert main([*line, "--subset", str(dataset / "list.txt")]) == 0
    assert "3 images in the memory bank" in capsys.readouterr().out
    for words, message in (
        ([*line, "--subset", "some"], "--subset"),
        (["knn", "--load_features", str(dataset), "--subset", "1%"], "--subset"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_dumped_features_are_not_extracted_again(dataset, capsys, monkeypatch):
    dump = dataset / "dump"
    line = [*LINE, "--data_path", str(dataset / "images"), "--nb_knn", "3", "5"]
    assert main(line) == 0
    plain = capsys.readouterr().out
    line += ["--dump_features", str(dump)]
    assert main(line) == 0
    first = capsys.readouterr().out
    assert first == plain and "5-NN classifier result: Top1: 100.00, Top5: 100.00" in first
    bank = torch.load(dump / "trainfeat.pth", weights_only=True)
    assert bank.shape == (40, 192) and torch.allclose(bank.norm(dim=1), torch.ones(40))
    assert torch.load(dump / "trainlabels.pth", weights_only=True).tolist() == [0] * 20 + [1] * 20

    monkeypatch.setattr(features, "view", None)  # no image may be read now
    assert main(line) == 0 and capsys.readouterr().out == first
    assert main(["knn", "--load_features", str(dump), "--nb_knn", "3", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == first


def test_precision(dataset, monkeypatch):
    line = [*LINE, "--data_path", str(dataset / "images"), "--nb_knn", "3"]
    found = {}
    for precision in ("fp32", "bf16", "auto"):
        dump = dataset / precision
        words = [*line, "--precision", precision, "--dump_features", str(dump), "--output_dir", str(dump)]
        assert main(words) == 0
        found[precision] = torch.load(dump / "testfeat.pth", weights_only=True)
        said = json.loads((dump / "knn.json").read_text())["settings"]["precision"]
        assert precision == "auto" or said == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    difference = (found["fp32"] - found["bf16"]).abs().max()
    assert 0 < float(difference) < 0.02
    best = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    assert torch.equal(found["auto"], found[best])
