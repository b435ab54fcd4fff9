"""The page of an evaluation: figures of several networks, the paper's beside them, nothing that runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fastdino.report.comparison import Network, label, read_results, render, write_comparison


def result(folder, protocol, figures, *, dataset=None, network="vit_small/16", pictures=None):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "protocol": protocol,
        "figures": figures,
        "settings": {"image_size": 224} | ({"dataset": dataset} if dataset else {}),
        "pictures": pictures or {},
        "network": {"name": network, "parameters": 21_665_664},
        "command": f"python -m fastdino.evaluation {protocol} --weights '<a&b>'",
        "data_path": "data",
        "seconds": 61.0,
        "environment": {"device": "a CPU"},
    }
    name = f"{protocol}.{dataset}" if dataset else protocol
    (folder / f"{name}.json").write_text(json.dumps(record))


@pytest.fixture
def networks(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    result(one, "knn", {"top1_k20": 70.0, "top5_k20": 91.25})
    result(two, "knn", {"top1_k20": 74.0, "top5_k20": 90.0})
    result(one, "retrieval", {"mAP_medium": 41.0}, dataset="roxford5k")
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(two / "map.png")
    (tmp_path / "secret.png").write_bytes((two / "map.png").read_bytes())
    result(two, "tsne", {}, pictures={"map.png": "the <map>", "../secret.png": "outside"})
    return [read_results("one", one), read_results("two", two)]


def test_page(networks):
    networks[1].failures["davis"] = "--data_path: <no> such folder"
    page = render(networks)
    assert "74.5" in page and "Table 2, vit_small/16" in page  # the paper's k-NN of this network
    assert "41.8" in page and "Retrieval: roxford5k" in page
    assert "<b>74.0</b>" in page and "<b>70.0</b>" not in page and "<b>91.2</b>" in page
    assert "the &lt;map&gt;" in page and "outside" not in page and page.count("data:image/jpeg") == 1
    assert "not measured. --data_path: &lt;no&gt; such folder" in page
    assert "&lt;a&amp;b&gt;" in page and "<script" not in page and "default-src 'none'" in page
    assert page.index("k-NN") < page.index("Retrieval:") < page.index("Classes as a map")


def test_one_network_needs_no_comparison(networks, tmp_path):
    page = write_comparison(networks[:1], tmp_path / "new" / "report.html").read_text()
    assert "<title>one - fastdino evaluation</title>" in page and "The best is green" not in page
    with pytest.raises(ValueError, match="networks"):
        write_comparison([], tmp_path / "report.html")


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "knn.json").write_text('{"protocol": "knn", "figures"')
    (tmp_path / "other.json").write_text("[1, 2]")
    network = read_results("a", tmp_path)
    assert isinstance(network, Network) and not network.results
    assert list(network.failures) == ["knn"] and "knn.json cannot be read" in network.failures["knn"]


@pytest.mark.parametrize(
    "figure, text",
    [
        ("top1_k20", "top-1, k = 20"),
        ("top5", "top-5"),
        ("jaccard_60", "Jaccard, 60 % of the mass"),
        ("mAP_medium", "mAP, medium"),
        ("mAP", "mAP"),
    ],
)
def test_labels(figure, text):
    assert label(figure) == text
