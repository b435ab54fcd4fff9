"""Nearest images in the right order, queries found by index and path, the sheet on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation import neighbours
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.neighbours import choose_queries, nearest


def test_order_by_hand():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [5.0, 1.0], [1.0, 1.0]])
    found = nearest(features, [0, 1], 3)
    # rows 2 and 4 are equal: the lower index comes first; the query itself never does
    assert found.indices.tolist() == [[3, 2, 4], [2, 4, 3]]
    half = 0.5**0.5
    assert found.cosines[0].tolist() == pytest.approx([5 / 26**0.5, half, half])
    assert found.cosines[1].tolist() == pytest.approx([half, half, 1 / 26**0.5])
    for k in (0, 5):
        with pytest.raises(ValueError, match="--k: expected 1 to 4 neighbours of 5 images"):
            nearest(features, [0], k)


def test_queries():
    paths = ["a/cat/1.jpg", "a/cat/2.jpg", "a/dog/1.jpg"]
    assert choose_queries(["2", "cat/2.jpg", "a/cat/1.jpg"], paths, 8, 0) == [2, 1, 0]
    for word, fits in (("1.jpg", 2), ("3", 0), ("at/2.jpg", 0)):
        with pytest.raises(ValueError, match=f"{word}.*fits {fits}"):
            choose_queries([word], paths, 8, 0)
    chosen = choose_queries([], paths, 2, 5)
    assert chosen == choose_queries([], paths, 2, 5) and len(set(chosen)) == 2
    assert sorted(choose_queries([], paths, 8, 5)) == [0, 1, 2]


def test_sheet_shows_query_and_neighbours_in_order(tmp_path):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    paths = []
    for i, color in enumerate(colors):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 8), color).save(paths[-1])
    found = nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), [0], 2)
    sheet = np.asarray(neighbours.sheet(paths, ["a", "b", "a"], [0], found, image_size=8))
    left = [np.argwhere((sheet == color).all(-1))[:, 1].min() for color in colors]
    assert left[0] < left[2] < left[1]
    same, other = (np.argwhere((sheet == color).all(-1)) for color in (neighbours._SAME, neighbours._OTHER))
    assert same[:, 1].min() == left[2] and other[:, 1].min() == left[1]


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, color in (("dark", 40), ("light", 200)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray((color + rng.integers(-9, 9, (24, 24, 3))).astype(np.uint8)).save(
                folder / f"{i}.png"
            )
    line = [
        "neighbours",
        "--weights",
        "random",
        "--arch",
        "vit_tiny",
        "--device",
        "cpu",
        "--image_size",
        "32",
    ]
    line += ["--data_path", str(tmp_path / "data"), "--k", "3", "--output_dir", str(tmp_path / "out")]
    assert main([*line, "--queries", "0", "light/2.png"]) == 0
    record = json.loads((tmp_path / "out" / "neighbours.json").read_text())
    assert list(record["pictures"]) == ["neighbours.png"] and (tmp_path / "out" / "neighbours.png").exists()
    for row, name in zip(record["details"]["queries"], ("dark", "light"), strict=True):
        assert len(row["neighbours"]) == 3 and all(f"/{name}/" in path for path in row["neighbours"])
        assert row["cosines"] == sorted(row["cosines"], reverse=True)
    assert main([*line, "--max_images", "4", "--seed", "3", "--queries", "7"]) == 0
    assert "light/3.png" in capsys.readouterr().out
    assert main([*line, "--queries", "nowhere.png"]) == 2
    Image.new("RGB", (24, 24)).save(tmp_path / "alone.png")
    (tmp_path / "list.txt").write_text("alone.png\n")
    line[line.index("--data_path") + 1] = str(tmp_path / "list.txt")
    capsys.readouterr()
    assert main(line) == 2
    assert "--data_path: expected at least 2 images, got 1" in capsys.readouterr().err
