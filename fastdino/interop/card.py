"""README.md of a folder of weights, a model card as the Hugging Face Hub reads it.

It says what the run, its evaluations and the file tell, and leaves out what they do not: no name of a data
set, no licence and no figure is guessed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastdino
from fastdino.config import config_to_yaml
from fastdino.dryrun import forward_flops
from fastdino.interop.files import WeightsError
from fastdino.interop.source import PLACES, Source, model_config
from fastdino.report.run import Run, last_epoch, number, prototypes_of

_PAPERS = {
    "dino": (
        "caron2021emerging",
        "Emerging Properties in Self-Supervised Vision Transformers",
        "Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien "
        "and Bojanowski, Piotr and Joulin, Armand",
        "International Conference on Computer Vision (ICCV)",
        "2021",
        "2104.14294",
    ),
    "esvit": (
        "li2022efficient",
        "Efficient Self-supervised Vision Transformers for Representation Learning",
        "Li, Chunyuan and Yang, Jianwei and Zhang, Pengchuan and Gao, Mei and Xiao, Bin and Dai, Xiyang and "
        "Yuan, Lu and Gao, Jianfeng",
        "International Conference on Learning Representations (ICLR)",
        "2022",
        "2106.09785",
    ),
}


@dataclass(frozen=True)
class Figure:
    """Something that was measured, and how."""

    name: str
    value: float
    where: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that write a card."""
    parser.add_argument("--license", metavar="ID", help="of the weights, as mit; default: none is stated")
    parser.add_argument(
        "--results",
        nargs="+",
        metavar="JSON",
        help="what evaluations of these weights wrote (default: knn.json and throughput.json of the run)",
    )


def model_card(source: Source, *, library: str, usage: str, license: str | None, results: list[str]) -> str:
    """The text. In the code ``usage`` PATH stands for the folder; ``results`` are files of the evaluation.

    Raises WeightsError for a file of ``results`` that is none.
    """
    run = None if source.run is None else Run.read(source.run)
    accuracies = list(_accuracies(source, run, results))
    rates = list(_rates(source, results))
    body = [
        f"# {source.name} pretrained with {_method(source).upper()}",
        _description(source),
        "## Model details",
        _details(source),
        "## Use",
        usage.replace("PATH", "."),
        "## Measured",
        _table(accuracies + rates) or "Nothing was measured.",
        "## Data",
        _data(source),
        "## Signs of collapse",
        _collapse(run),
        "## Limits",
        _limits(source),
        "## Configuration",
        _configuration(source),
        "## Citation",
        _bibtex(_method(source)),
    ]
    return _head(source, library, license, accuracies) + "\n" + "\n\n".join(body) + "\n"


def _head(source: Source, library: str, license: str | None, accuracies: list[Figure]) -> str:
    import yaml

    head: dict[str, Any] = {} if license is None else {"license": license}
    head |= {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": [_method(source), "self-supervised-learning", "fastdino"],
    }
    if accuracies:
        head["metrics"] = ["accuracy"]
        task = {"type": "image-classification", "name": "k-NN classification of frozen features"}
        dataset = {"type": "imagefolder", "name": "held-out images, not named"}
        metrics = [{"type": "accuracy", "name": f.name, "value": round(f.value, 2)} for f in accuracies]
        result = {"task": task, "dataset": dataset, "metrics": metrics}
        head["model-index"] = [{"name": source.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _method(source: Source) -> str:
    config = source.config
    return "dino" if config is None else config.method.method


def _description(source: Source) -> str:
    trained = "student" if source.facts.get("fastdino.source", "").endswith("student") else "teacher"
    whose = f"the {trained} of a run" if source.config is not None else "a backbone"
    return (
        f"Image features learned without labels: {whose}, exported by fastdino {fastdino.__version__}. "
        "There is no classifier."
    )


def _details(source: Source) -> str:
    backbone = source.backbone
    rows = [("Architecture", source.name)]
    rows.append(("Parameters", f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M"))
    try:
        flops = sum(forward_flops(model_config(backbone), source.image_size))
        rows.append(("GMACs", f"{flops / 2e9:.2f} at {source.image_size} x {source.image_size} pixels"))
    except WeightsError:
        pass  # sizes that no flag describes
    rows += [("Image size", f"{source.image_size} x {source.image_size}"), ("Width", str(backbone.embed_dim))]
    named = {
        "Source": "source",
        "Steps": "step",
        "Images seen, each in several crops": "images_seen",
        "Commit": "commit",
        "fastdino": "version",
    }
    rows += [
        (row, source.facts[f"fastdino.{k}"]) for row, k in named.items() if f"fastdino.{k}" in source.facts
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {row} | {_cell(value)} |" for row, value in rows)


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.replace("|", "\\|").split())


def _accuracies(source: Source, run: Run | None, results: list[str]) -> Iterator[Figure]:
    """k-NN figures: of evaluations, else what the run itself measured of these very weights."""
    found = list(_records(source, "knn", results))
    for record in found:
        size = record["settings"].get("image_size")
        for key, value in record["figures"].items():
            if key.startswith("top1_k") and math.isfinite(number(value)):
                name = f"k-NN top-1, k = {key[6:]}, {size} pixels"
                yield Figure(name, value, "python -m fastdino.evaluation knn")
    config = source.config
    if found or run is None or config is None:
        return
    size = config.eval.eval_image_size or config.crops.global_crops_size
    last = run.evals[-1] if run.evals else {}
    if str(last.get("step")) == source.facts.get("fastdino.step") and isinstance(last.get("knn"), dict):
        for k, value in last["knn"].items():
            if math.isfinite(number(value)):
                yield Figure(f"k-NN top-1, k = {k}, {size} pixels", value, "held-out images, during training")


def _rates(source: Source, results: list[str]) -> Iterator[Figure]:
    for record in _records(source, "throughput", results):
        device = (record.get("environment") or {}).get("device", "a machine without a name")
        batch = record["settings"].get("batch")
        for key, value in record["figures"].items():
            if key.startswith("img_s_") and math.isfinite(number(value)):
                where = f"forward pass, {batch} images at once, {device}"
                yield Figure(f"images per second, {key[6:]}", value, where)


def _records(source: Source, protocol: str, results: list[str]) -> Iterator[dict[str, Any]]:
    """Results of one protocol: those of the files named, or those of the run."""
    paths = [Path(name) for name in results]
    if not paths and source.run is not None:
        paths = [path for path in [source.run / f"{protocol}.json"] if path.is_file()]
    for path in paths:
        try:
            record = json.loads(path.read_text("utf-8"))
            if not isinstance(record["figures"], dict) or not isinstance(record["settings"], dict):
                raise TypeError("figures and settings are no objects")
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{path}: not a result of fastdino.evaluation ({type(error).__name__})"
            ) from error
        if record.get("protocol") == protocol:
            yield record


def _table(figures: list[Figure]) -> str:
    if not figures:
        return ""
    unit = {True: " %", False: ""}
    rows = [f"| {f.name} | {f.value:.1f}{unit['top-1' in f.name]} | {_cell(f.where)} |" for f in figures]
    return "| | | |\n|---|---|---|\n" + "\n".join(rows)


def _data(source: Source) -> str:
    facts = source.facts
    if "fastdino.images" not in facts and "fastdino.image_list" not in facts:
        return "The source does not tell which images it was trained on."
    count = facts.get("fastdino.images", "an unknown number of")
    digest = facts.get("fastdino.image_list")
    hashed = "" if digest is None else f" SHA-256 of the list of their names: `{_cell(digest)}`..."
    return f"Trained without labels on {count} images.{hashed} The name of the data set is not recorded."


def _collapse(run: Run | None) -> str:
    if run is None:
        return "Not recorded in the source."
    said = []
    entropy, prototypes = last_epoch(run, "teacher_entropy"), prototypes_of(run)
    if math.isfinite(entropy) and prototypes > 1:
        said.append(
            f"Teacher entropy {entropy:.3f} in the last epoch of the run (0: one prototype takes all; ln K = "
            f"{math.log(prototypes):.3f}: all are alike)."
        )
    if math.isfinite(kl := last_epoch(run, "kl")):
        said.append(f"KL divergence of the student from the teacher {kl:.3f}.")
    if math.isfinite(spread := last_epoch(run, "spread")):
        said.append(f"Spread of the embeddings {spread:.3f} of at most 1 (0: all images are alike).")
    return " ".join(said) or "Not recorded by the run."


def _limits(source: Source) -> str:
    return "\n".join(
        (
            "* Features, not classes: a classifier has to be trained, or neighbours looked up.",
            f"* Meant for images of {source.image_size} pixels.",
            "* What the training images show rarely, or with a bias, the features know no better.",
        )
    )


def _configuration(source: Source) -> str:
    config = source.config
    if config is None:
        return "Not recorded in the source."
    lines = config_to_yaml(config).strip().splitlines()
    kept = "\n".join(line for line in lines if line.partition(":")[0] not in PLACES)
    return f"The flags of `train.py`, without those that name places:\n\n```yaml\n{kept}\n```"


def _bibtex(method: str) -> str:
    key, title, authors, venue, year, arxiv = _PAPERS.get(method, _PAPERS["dino"])
    return (
        f"```bibtex\n@inproceedings{{{key},\n  title     = {{{title}}},\n  author    = {{{authors}}},\n"
        f"  booktitle = {{{venue}}},\n  year      = {{{year}}},\n  note      = {{arXiv:{arxiv}}}\n}}\n```"
    )
