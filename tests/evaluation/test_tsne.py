"""Class means by hand, the guards of t-SNE, a map that keeps groups together, the files."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from fastdino.evaluation import sheets
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.tsne import (
    capped_learning_rate,
    capped_perplexity,
    class_means,
    embed,
    scatter,
    write_csv,
)


def test_means_of_the_classes_that_have_images():
    features = np.array([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [5.0, 6.0]])
    means, classes = class_means(features, np.array([4, 1, 4, 1]))
    assert classes.tolist() == [1, 4] and means.tolist() == [[4, 5], [5.5, 11]]


def test_guards_for_few_classes():
    assert capped_perplexity(20, 1000) == 20
    assert capped_perplexity(20, 10) == 3
    assert capped_perplexity(20, 3) == 1
    assert [capped_learning_rate(200, points) for points in (10, 500, 1000, 5000)] == [50, 100, 200, 200]
    with pytest.raises(ValueError, match="--learning_rate"):
        capped_learning_rate(0, 10)
    with pytest.raises(ValueError, match="at least 3 classes with images, got 2"):
        capped_perplexity(20, 2)
    with pytest.raises(ValueError, match="--perplexity"):
        capped_perplexity(0.5, 100)


def test_groups_stay_together_and_the_seed_decides():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 8)
    means = 20 * rng.normal(size=(3, 40))[group] + rng.normal(size=(24, 40))
    places = embed(means, iterations=300)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(24)
    assert (group[distance.argmin(1)] == group).all()
    assert np.array_equal(places, embed(means, iterations=300))
    assert embed(means[:3], iterations=250).shape == (3, 2)
    with pytest.raises(ValueError, match="at least 3 classes"):
        embed(means[:2])


@pytest.mark.parametrize("count, pictures", [(3, False), (3, True), (70, False), (70, True)])
def test_map(tmp_path, count, pictures):
    places = np.random.default_rng(0).normal(size=(count, 2))
    names = [f"class {i}" for i in range(count)]
    thumbnails = [np.full((8, 8, 3), i, np.uint8) for i in range(count)] if pictures else None
    figure = scatter(places, names, "note", thumbnails)
    path = sheets.save(figure, tmp_path / "map.png")
    assert Image.open(path).size == (1200, 1000)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == (names if count <= 60 else [])
    write_csv(tmp_path / "map.csv", ["a,b", *names[1:]], places)
    rows = list(csv.reader((tmp_path / "map.csv").open()))
    assert rows[0] == ["class", "x", "y"] and rows[1][0] == "a,b" and len(rows) == count + 1
    assert float(rows[1][1]) == pytest.approx(places[0, 0], rel=1e-5)


def test_names_do_not_cover_each_other():
    figure = scatter(
        np.array([[0.0, 0.0], [0.02, 0.0], [1.0, 1.0], [0.04, 0.0]]), ["aaaa", "bbbb", "cc", "dddd"], ""
    )
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abcd":
        folder = tmp_path / "data" / "val" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    line = ["tsne", "--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--image_size", "32"]
    line += ["--iterations", "250", "--thumbnails", "--output_dir", str(tmp_path / "out")]
    assert main([*line, "--data_path", str(tmp_path / "data")]) == 0
    assert "4 classes are few: perplexity 1, learning rate 50" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "tsne.json").read_text())
    assert record["settings"]["perplexity"] == 1 and (tmp_path / "out" / "tsne.png").exists()
    assert (tmp_path / "out" / "tsne.csv").read_text().splitlines()[4].startswith("d,")
    for few in ("a", "b"):
        for file in (tmp_path / "data" / "val" / few).iterdir():
            file.unlink()
    assert main([*line, "--data_path", str(tmp_path / "data")]) == 2
    assert "at least 3 classes" in capsys.readouterr().err
    assert main([*line, "--data_path", str(tmp_path / "data" / "val" / "c")]) == 2
    assert "class folders" in capsys.readouterr().err
