"""The model card tells what is known, leaves out what is not, and the Hub's library reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from fastdino.config import Config, config_to_dict, config_to_yaml
from fastdino.engine import checkpoint
from fastdino.interop.__main__ import main
from fastdino.models import VisionTransformer, build_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = Config()
    config.model.arch, config.model.out_dim, config.model.head_hidden_dim = "vit_tiny", 64, 8
    config.model.depth, config.crops.global_crops_size = 1, 32
    config.data.data_path = "/private/photos"
    state = build_model(config.model, img_size=32).state_dict()
    tensors = {f"{who}.{k}": v.clone() for who in ("student", "teacher") for k, v in state.items()}
    identity = {"global batch": 16, "list of images": "0123456789abcdef"}
    meta = {"config": config_to_dict(config), "identity": identity, "epoch": 1, "steps_per_epoch": 5}
    path = tmp_path / "run"
    checkpoint.save(path / "checkpoints", 5, tensors, {}, meta)
    (path / "config.yaml").write_text(config_to_yaml(config))
    (path / "environment.json").write_text(json.dumps({"commit": "abc1234", "images": 80}))
    (path / "log.txt").write_text('{"epoch": 0, "train_teacher_entropy": 3.25, "train_kl": 0.75}\n')
    lines = [{"step": 0, "knn": {"10": 11.0}, "untrained": {"10": 11.0}}, {"step": 5, "knn": {"10": 42.5}}]
    (path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def result(path: Path, protocol: str, figures: dict[str, float], **settings: int) -> None:
    record = {"protocol": protocol, "figures": figures, "settings": settings}
    path.write_text(json.dumps({**record, "environment": {"device": "Some | GPU"}}))


def card(source: Path, target: Path, *flags: str) -> tuple[dict, str]:
    assert main(["timm", "export", str(source), str(target), *flags]) == 0
    text = (target / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_what_the_run_tells(tmp_path, run) -> None:
    head, body = card(run, tmp_path / "out", "--license", "apache-2.0")
    assert head["license"] == "apache-2.0" and head["library_name"] == "timm"
    assert head["pipeline_tag"] == "image-feature-extraction" and head["metrics"] == ["accuracy"]
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert metrics == [{"type": "accuracy", "name": "k-NN top-1, k = 10, 32 pixels", "value": 42.5}]
    for said in (
        "| k-NN top-1, k = 10, 32 pixels | 42.5 % | held-out images, during training |",
        "on 80 images. SHA-256 of the list of their names: `0123456789abcdef`...",
        "Teacher entropy 3.250 in the last epoch of the run (0: one prototype takes all; ln K = 4.159",
        "KL divergence of the student from the teacher 0.750.",
        "| Steps | 5 |",
        "| Images seen, each in several crops | 80 |",
        "| Commit | abc1234 |",
        "global_crops_size: 32",
        'timm.create_model("local-dir:.", pretrained=True)',
        "model.forward_features(image)",
        "@inproceedings{caron2021emerging",
    ):
        assert said in body
    assert "private" not in body and "data_path" not in body and "11.0" not in body
    assert "images per second" not in body


def test_figures_of_evaluations_come_before_those_of_the_run(tmp_path, run) -> None:
    result(run / "knn.json", "knn", {"top1_k10": 61.25, "top5_k10": 90.0}, image_size=64)
    result(run / "throughput.json", "throughput", {"img_s_fp32": 1234.5}, batch=8)
    head, body = card(run, tmp_path / "out")
    assert "license" not in head
    assert "| k-NN top-1, k = 10, 64 pixels | 61.2 % | python -m fastdino.evaluation knn |" in body
    assert "| images per second, fp32 | 1234.5 | forward pass, 8 images at once, Some \\| GPU |" in body
    assert "42.5" not in body
    result(tmp_path / "other.json", "knn", {"top1_k20": 12.5}, image_size=32)
    _, body = card(run, tmp_path / "named", "--results", str(tmp_path / "other.json"))
    assert "k = 20, 32 pixels | 12.5 %" in body and "61.2" not in body and "1234.5" not in body


def test_another_checkpoint_or_network_takes_no_figures_of_the_run(tmp_path, run) -> None:
    for flags in (("--checkpoint_key", "student"), ()):
        if not flags:
            lines = (run / "eval.jsonl").read_text().replace('"step": 5', '"step": 4')
            (run / "eval.jsonl").write_text(lines)
        head, body = card(run, tmp_path / f"out{len(flags)}", *flags)
        assert "model-index" not in head and "Nothing was measured." in body


def test_a_file_that_tells_nothing(tmp_path) -> None:
    torch.save(VisionTransformer(32, 8, 3, 64, 1, 1).state_dict(), tmp_path / "a.pth")
    head, body = card(tmp_path / "a.pth", tmp_path / "out")
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}
    assert body.count("Not recorded in the source.") == 2
    assert "does not tell which images it was trained on" in body and "Nothing was measured." in body
    patches, width = 16, 64
    blocks = 12 * (patches + 1) * width**2 + 2 * (patches + 1) ** 2 * width
    macs = patches * width * 3 * 8**2 + blocks
    assert f"| GMACs | {macs / 1e9:.2f} at 32 x 32 pixels |" in body
    parameters = sum(p.numel() for p in VisionTransformer(32, 8, 3, 64, 1, 1).parameters())
    assert f"| Parameters | {parameters / 1e6:.2f} M |" in body


def test_the_library_of_the_hub_reads_it(tmp_path, run) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    card(run, tmp_path / "out", "--license", "mit")
    read = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert read.data.license == "mit" and read.data.library_name == "timm"
    (figure,) = read.data.eval_results
    assert (figure.metric_type, figure.metric_value) == ("accuracy", 42.5)
