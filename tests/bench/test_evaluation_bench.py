"""bench/evaluation.py: sides are compared before they are timed, and the rivals are what they claim to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import evaluation
from fastdino.evaluation.features import center_crop, normalize, read_image


def test_toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDINO_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench", "--toy", "--save", "--seconds", "0.1", "--workers", "1"])
    evaluation.main()
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    assert "nan" not in path.read_text().lower()
    found = [(row["op"], row["provider"]) for row in record["rows"]]
    assert found[:2] == [("knn", "chunked eager"), ("knn", "fastdino")]
    assert ("pixels", "plain eager, Pillow") in found and ("vit_small/16", "fastdino fp32") in found
    items = {"knn": 300, "pixels": 6, "vit_small/16": 6}
    for row in record["rows"]:
        assert row["per_second"] == pytest.approx(items[row["op"]] / row["median_s"]) and row["rounds"] > 0
    assert any("not measured (no --official PATH)" in line for line in record["transcript"])


def test_chunked_is_the_official_count() -> None:
    """Two neighbours of class 3 at cosine 0.6 against one of class 2 at 1: exp(1 / T) decides."""
    bank = torch.tensor([[0.6, 0.8], [0.6, -0.8], [1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([3, 3, 2, 7])
    query = torch.tensor([[1.0, 0.0]])
    for truth, T, top1, top5 in ((2, 0.07, 100, 100), (3, 0.07, 0, 100), (3, 10.0, 100, 100), (9, 1.0, 0, 0)):
        assert evaluation.chunked(bank, labels, query, torch.tensor([truth]), 3, T) == (top1, top5)


def test_pillow_side_sees_the_official_view(tmp_path: Path) -> None:
    evaluation.make_images(tmp_path, 1)
    (path,) = tmp_path.iterdir()
    images = evaluation.OfficialImages([str(path)], 96)[0]
    expected = normalize(torch.from_numpy(center_crop(read_image(path), 96))[None])[0]
    assert torch.equal(images, expected)


def test_other_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {10: (50.0, 80.0), 20: (51.0, 81.0)}
    evaluation.same_hits({"official": {**right, 20: (51.3, 81.0)}, "fastdino": right}, 1000)
    with pytest.raises(SystemExit, match="k = 20: official counts 4 other hits, nothing is timed"):
        evaluation.same_hits({"official": {**right, 20: (51.0, 81.4)}, "fastdino": right}, 1000)
    assert evaluation.difference({"a": torch.ones(2, 3), "b": torch.ones(2, 3) * (1 + 1e-6)}) < 1e-5
    for wrong in (torch.ones(2, 3) * 1.001, torch.full((2, 3), float("nan"))):
        with pytest.raises(SystemExit, match="nothing is timed"):
            evaluation.difference({"a": torch.ones(2, 3), "b": wrong})
    with pytest.raises(SystemExit, match="eval_knn.py"):
        evaluation.official_classifier(Path("/nowhere"))


def test_features_of_clusters_are_the_same_in_every_run() -> None:
    first, again = (evaluation.clustered(50, 5, 8, 1.0, seed=1) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.allclose(first[0].norm(dim=1), torch.ones(50))
