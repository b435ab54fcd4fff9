"""The page of an evaluation: the results of several networks, protocol by protocol, beside the paper's.

Reads the ``<protocol>.json`` files that ``python -m fastdino.evaluation`` writes, one folder per network.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastdino.engine.logs import write_text
from fastdino.evaluation.paper import paper_figure
from fastdino.report import figures
from fastdino.report.page import page_template, resource
from fastdino.report.run import duration, number

TITLES = {
    "knn": ("k-NN", "A held-out image gets the class that most of its nearest training images have."),
    "linear": ("Linear probe", "One linear layer trained on frozen features."),
    "logistic": (
        "Logistic regression",
        "The best linear classifier of frozen features.",
    ),
    "finetune": ("Fine-tuning", "The whole network trained on the labels."),
    "retrieval": ("Retrieval", "Landmarks: images of the same building are to be ranked first."),
    "copydetection": ("Copy detection", "Distorted copies are to be found among distractors."),
    "davis": (
        "Video object segmentation",
        "The first frame's mask is carried on by similarity alone.",
    ),
    "jaccard": ("Attention as segmentation", "The attention of the best head against the object's outline."),
    "attention": ("Attention", "Where the heads of the last block look."),
    "pca": ("Patch features", "Equal colours are equal to the network, over all images."),
    "neighbours": ("Nearest neighbours", "Images nearest to a query by the cosine of their features."),
    "tsne": ("Classes as a map", "Mean features of the classes, laid out by t-SNE."),
    "collapse": ("Collapse", "Teacher entropy and KL divergence during training."),
    "throughput": ("Throughput", "Images per second of the forward pass."),
}
"""Protocol -> title and one sentence, in the order of the page."""

_LABELS = {
    "top1": "top-1",
    "top5": "top-5",
    "last_top1": "top-1, last epoch",
    "JF": "J&F",
    "img_s_fp32": "images/s, fp32",
    "img_s_bf16": "images/s, bf16",
    "img_s_fp16": "images/s, fp16",
}
_HEADLINES = {
    "knn": "top1_k20",
    "linear": "top1",
    "logistic": "top1",
    "finetune": "top1",
    "retrieval": "mAP_medium",
    "copydetection": "mAP",
    "davis": "JF",
    "jaccard": "jaccard_60",
}


@dataclass
class Network:
    """One column: a folder of results under the name it is shown by."""

    name: str
    folder: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Protocol -> why there is no result."""


def read_results(name: str, folder: Path) -> Network:
    """The results in a folder, by the file's name; damaged files become failures."""
    network = Network(name, folder)
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            network.failures[path.stem] = f"{path.name} cannot be read: {error}"
            continue
        if isinstance(record, dict) and isinstance(record.get("figures"), dict) and "protocol" in record:
            network.results[path.stem] = record
    return network


def write_comparison(networks: Sequence[Network], path: Path) -> Path:
    """Write the page, whole or not at all. Raises ValueError without any network."""
    if not networks:
        raise ValueError("networks: expected at least one, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(networks), errors="replace")
    return path


def render(networks: Sequence[Network]) -> str:
    """The whole page as text."""
    names = list(dict.fromkeys(key for network in networks for key in (*network.results, *network.failures)))
    order = list(TITLES)
    names.sort(key=lambda key: (order.index(_protocol(key)) if _protocol(key) in order else len(order), key))
    sections = [_section(key, networks) for key in names]
    return page_template("comparison.html").render(
        css=Markup(resource("page.css") + resource("comparison.css")),
        title=networks[0].name if len(networks) == 1 else f"{len(networks)} networks",
        facts=_facts(networks),
        networks=[network.name for network in networks],
        sections=sections,
        headlines=[row for section in sections for row in section["rows"] if row["headline"]],
        written=time.strftime("%d %B %Y, %H:%M").lstrip("0"),
    )


def _protocol(key: str) -> str:
    """Of a result's file name, which may tell the data set behind a dot: ``retrieval.roxford5k``."""
    return key.partition(".")[0]


def _facts(networks: Sequence[Network]) -> list[str]:
    facts = []
    for network in networks:
        shape: dict[str, Any] = next((r["network"] for r in network.results.values() if r.get("network")), {})
        if shape:
            size = f"{shape['name']}, {shape['parameters'] / 1e6:.1f} M parameters"
            facts.append(size if len(networks) == 1 else f"{network.name}: {size}")
    devices = {
        str(r["environment"]["device"])
        for n in networks
        for r in n.results.values()
        if "device" in (r.get("environment") or {})
    }
    return facts + sorted(devices)


def _section(key: str, networks: Sequence[Network]) -> dict[str, Any]:
    """Everything the template shows of one protocol."""
    protocol = _protocol(key)
    title, why = TITLES.get(protocol, (protocol, ""))
    records = [network.results.get(key) for network in networks]
    found = [record for record in records if record is not None]
    figures_ = list(dict.fromkeys(name for record in found for name in record["figures"]))
    several = len({json.dumps(record.get("settings"), sort_keys=True) for record in found}) > 1
    return {
        "key": key,
        "title": title + (f": {key.partition('.')[2]}" if "." in key else ""),
        "why": why,
        "rows": [_row(protocol, title, name, records) for name in figures_],
        "runs": [
            {
                "name": network.name,
                "settings": _settings(record) if several or network is networks[0] else "",
                "command": record.get("command", ""),
                "seconds": duration(number(record.get("seconds"))),
                "data": record.get("data_path") or "",
                "pictures": _pictures(network, record),
            }
            for network, record in zip(networks, records, strict=True)
            if record is not None
        ],
        "failures": [(n.name, n.failures[key]) for n in networks if key in n.failures],
    }


def _row(protocol: str, title: str, name: str, records: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One figure of all networks, the best in bold, and the paper's for the first network that has one."""
    values = [number(record["figures"].get(name)) if record else math.nan for record in records]
    paper = next(
        (
            (value, f"{where}, {record['network']['name']}")
            for record in records
            if record and record.get("network")
            for value, where in [
                paper_figure(protocol, name, record["network"]["name"], record.get("settings") or {})
                or (None, "")
            ]
            if value is not None
        ),
        None,
    )
    finite = [value for value in values if math.isfinite(value)]
    return {
        "protocol": title,
        "label": label(name),
        "headline": _HEADLINES.get(protocol) == name,
        "texts": [_text(value) for value in values],
        "best": [len(finite) > 1 and value == max(finite) for value in values],
        "paper": None if paper is None else (_text(paper[0]), paper[1]),
    }


def label(figure: str) -> str:
    """A figure's name for people: ``top1_k20`` -> "top-1, k = 20"."""
    if figure in _LABELS:
        return _LABELS[figure]
    head, _, tail = figure.partition("_")
    if head == "jaccard":
        return f"Jaccard, {tail} % of the mass"
    head = _LABELS.get(head, head)
    if tail[:1] == "k" and tail[1:].isdigit():
        tail = f"k = {tail[1:]}"
    return f"{head}, {tail.replace('_', ' ')}" if tail else head


def _text(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _settings(record: dict[str, Any]) -> str:
    pairs = (record.get("settings") or {}).items()
    return ", ".join(
        f"{key.replace('_', ' ')} {_shown(key, value)}" for key, value in pairs if value is not None
    )


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return (" x " if key.endswith("size") else " ").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _pictures(network: Network, record: dict[str, Any]) -> list[tuple[str, tuple[str, int, int]]]:
    """Caption and data URI with size of every picture that can be read and lies in the network's folder."""
    found = []
    root = network.folder.resolve()
    for name, caption in (record.get("pictures") or {}).items():
        try:
            path = (root / str(name)).resolve()
            if not path.is_relative_to(root):
                continue
            found.append((str(caption), figures.picture_file(path)))
        except (OSError, SyntaxError, ValueError):
            found.append((f"{name} cannot be read", ("", 0, 0)))
    return found
