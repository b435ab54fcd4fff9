"""The report: what is measured, kept and measured again; failures on the page; names."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation.__main__ import main
from fastdino.models import VisionTransformer


@pytest.fixture
def data(tmp_path):
    """Two classes, which are too few for a map, and the weights of a small network."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (level + rng.integers(-20, 20, (24, 24, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    torch.manual_seed(0)
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    return tmp_path


@pytest.fixture
def line(data):
    words = ["report", "--weights", str(data / "net.pth"), "--patch_size", "8", "--device", "cpu"]
    words += ["--data_path", str(data / "data"), "--image_size", "32"]
    return [*words, "--output_dir", str(data / "out")]


def ran(capsys):
    """The protocols that the last report ran, in order, and what it printed at the end."""
    shown = capsys.readouterr()
    begun = [text.split()[2] for text in shown.err.splitlines() if text.startswith("-- ")]
    return begun, shown.out.splitlines()[-1]


def test_results_are_kept_and_failures_are_on_the_page(data, line, capsys):
    assert main([*line, "--protocols", "knn", "tsne", "pca"]) == 0
    begun, last = ran(capsys)
    assert begun == ["knn", "tsne", "pca"]
    assert last == f"2 results of 1 networks, 1 failed (the page says why): {data / 'out' / 'report.html'}"
    page = (data / "out" / "report.html").read_text()
    assert "not measured. --data_path: expected at least 3 classes with images, got 2" in page
    assert f"knn --weights {data / 'net.pth'} --patch_size 8 --device cpu --data_path {data / 'data'}" in page
    assert page.count("data:image/jpeg") == 1 and "top-1, k = 20" in page

    assert main([*line, "--protocols", "knn", "tsne", "pca"]) == 0
    assert ran(capsys)[0] == ["tsne"]  # the others are there
    assert main([*line, "--protocols", "knn", "pca", "--again"]) == 0
    assert ran(capsys)[0] == ["knn", "pca"]
    assert main([*line, "--protocols", "knn", "--image_size", "40"]) == 0
    assert ran(capsys)[0] == ["knn"]
    assert "Patch features" not in (data / "out" / "report.html").read_text()  # was not asked for


def test_newer_weights_and_damaged_results_are_measured_again(data, line, capsys):
    words = [*line, "--protocols", "knn"]
    assert main(words) == 0
    result = data / "out" / "net" / "knn.json"
    ran(capsys)
    os.utime(data / "net.pth", (result.stat().st_mtime + 5,) * 2)
    assert main(words) == 0
    assert ran(capsys)[0] == ["knn"]
    os.utime(data / "net.pth", (0, 0))
    assert main(words) == 0
    assert ran(capsys)[0] == []
    result.write_text(result.read_text()[:-20])
    assert main(words) == 0
    assert ran(capsys)[0] == ["knn"] and json.loads(result.read_text())["figures"]


def test_several_networks_and_a_run(data, line, capsys):
    run = data / "run"
    run.mkdir()
    rows = [{"step": i, "teacher_entropy": 2.0, "kl": 0.5} for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line[2:3] = [str(data / "net.pth"), str(run), str(data / "net.pth")]
    assert main([*line, "--protocols", "knn", "collapse"]) == 0
    begun, last = ran(capsys)
    assert begun == ["knn", "knn", "collapse", "knn"]
    assert last.startswith("3 results of 3 networks, 1 failed")  # the run has no checkpoint
    page = (data / "out" / "report.html").read_text()
    assert page.count("<b>100.0</b>") >= 2 and "net-3" in page and "Collapse" in page


def test_finetune_only_on_demand(data, line, capsys, monkeypatch):
    from fastdino.evaluation.commands import report

    asked = []
    monkeypatch.setattr(report, "_run", lambda words: asked.append(words[0]) or "not run")
    assert main(line) == 0
    assert asked == ["knn", "logistic", "linear", "tsne", "neighbours", "pca", "attention", "throughput"]
    assert main([*line, "--protocols", "finetune"]) == 0
    assert asked[-1] == "finetune"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--names", "a", "b"], "--names: expected 1 different names, got a b"),
        (["--names", "a/b"], "--names: expected names of folders, got a/b"),
        (["--names", "../a"], "--names"),
        (["--protocols", "davis", "knn"], "--protocols: the data do not allow davis"),
        (["--protocols", "collapse"], "--protocols: collapse needs run directories"),
    ],
)
def test_errors(data, line, words, message, capsys):
    assert main([*line, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (data / "out").exists()


def test_weights_and_equal_names(line, capsys):
    path = line[2]
    assert main([*line[:1], *line[3:]]) == 2
    assert "--weights is required" in capsys.readouterr().err
    assert main([*line[:2], path, path, *line[3:], "--names", "a", "a"]) == 2
    assert "--names: expected 2 different names" in capsys.readouterr().err
