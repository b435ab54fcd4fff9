"""Whole runs of every method: logs that show a collapse, exact resume, and the network that is evaluated."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import config_from_flags, config_to_yaml, read_yaml
from fastdino.engine import checkpoint
from fastdino.engine.trainer import Trainer
from fastdino.evaluation.__main__ import main as evaluate
from fastdino.interop.files import WeightsError
from fastdino.interop.official import export_checkpoint
from fastdino.interop.weights import load_backbone
from tests.methods.oracles import SIBLINGS, SWITCHES

TINY = {
    "arch": "vit_tiny",
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 1,
    "patch_size": 8,
    "out_dim": 32,
    "head_hidden_dim": 16,
    "bottleneck_dim": 8,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 2,
    "batch_size_per_gpu": 4,
    "epochs": 2,
    "warmup_epochs": 1,
    "num_workers": 1,
    "logger": "none",
    "log_every": 1,
    "report": False,
    "device": "cpu",
    "prescan": "off",
    "cache_decoded": "off",
}
RUNS = SIBLINGS | {name: SWITCHES[name] for name in ("mse", "infonce", "sinkhorn", "prev_epoch")}
SIGNS = {
    "byol": {"spread"},
    "mse": {"spread"},
    "mocov2": {"spread", "accuracy"},
    "infonce": {"spread", "accuracy"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 JPEGs of noise in train/, three steps per epoch, and 4 in val/; two classes."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 4)):
        for i in range(number):
            folder = root / part / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


def run(name: str, data, out, **flags) -> Trainer:
    trainer = Trainer(
        config_from_flags(**TINY | RUNS[name] | flags, data_path=data / "train", output_dir=out)
    )
    trainer.fit()
    return trainer


def final(out):
    return checkpoint.load(checkpoint.latest(out / "checkpoints"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_exactly_and_its_network_loads(name, data, tmp_path):
    whole = run(name, data, tmp_path / "whole", max_steps=5)
    run(name, data, tmp_path / "parts", max_steps=2)
    run(name, data, tmp_path / "parts", max_steps=5)
    for one, two in zip(final(tmp_path / "whole")[:2], final(tmp_path / "parts")[:2], strict=True):
        assert one.keys() == two.keys()
        assert [k for k in one if not torch.equal(one[k], two[k])] == []

    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    signs = SIGNS.get(name, {"teacher_entropy", "kl"})
    assert len(records) == 5 and signs <= records[0].keys()
    every = {"teacher_entropy", "kl", "spread", "accuracy"}
    assert not (every - signs) & records[0].keys()
    epoch = json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[0])
    assert {f"train_{sign}" for sign in signs} <= epoch.keys()

    evaluated = "student" if name in SIBLINGS else "teacher"
    expected = getattr(whole.method, evaluated).backbone.state_dict()
    loaded = load_backbone(tmp_path / "whole").state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())
    assert whole.engine.evaluated_backbone() is getattr(whole.method, evaluated).backbone
    if name in SIBLINGS:
        with pytest.raises(WeightsError, match="the official format holds DINO's"):
            export_checkpoint(tmp_path / "whole", tmp_path / "run.pth")
    if name.startswith("swav"):
        with pytest.raises(WeightsError, match="has no teacher, only a student"):
            load_backbone(tmp_path / "whole", key="teacher")


def test_neighbours_of_a_run_are_those_of_its_student(data, tmp_path):
    run("byol", data, tmp_path / "run", max_steps=2)
    line = ["knn", "--weights", str(tmp_path / "run"), "--data_path", str(data), "--image_size", "32"]
    line += ["--nb_knn", "5", "--device", "cpu", "--precision", "fp32", "--num_workers", "1"]
    figures = []
    for key in ("auto", "student"):
        assert evaluate([*line, "--checkpoint_key", key, "--output_dir", str(tmp_path / key)]) == 0
        figures.append(json.loads((tmp_path / key / "knn.json").read_text())["figures"])
    assert figures[0] == figures[1] != {}


def test_a_run_of_another_method_is_refused(data, tmp_path):
    run("mse", data, tmp_path, max_steps=1)
    with pytest.raises(checkpoint.CheckpointError, match="--loss: checkpoint 'mse', now 'infonce'"):
        run("infonce", data, tmp_path, max_steps=2)


def test_a_checkpoint_without_flags_of_methods_is_one_of_dino(data, tmp_path):
    trainer = run("sinkhorn", data, tmp_path / "run", max_steps=1, teacher_op="center")
    path = checkpoint.latest(tmp_path / "run" / "checkpoints")
    model, optimizer, meta = checkpoint.load(path)
    for flag in ("method", "loss", "teacher", "queue_length", "predictor"):
        del meta["identity"][f"--{flag}"]
    older = checkpoint.save(tmp_path / "older" / "checkpoints", 1, model, optimizer, meta)
    trainer.restore(older)
    assert trainer.step == 1


def test_collapse_and_doubtful_switches_are_told(data, tmp_path, capsys):
    run("mse", data, tmp_path / "once", max_steps=1, teacher="copy", center_momentum=1.0)
    assert "WARNING: --loss mse --teacher copy without centering" in capsys.readouterr().out
    trainer = run("mse", data, tmp_path / "again", max_steps=1, teacher="copy", center_momentum=1.0)
    said: list[str] = []
    trainer._warn_of_collapse({"spread": 0.01}, SimpleNamespace(say=said.append))
    assert len(said) == 1 and "COLLAPSE: the embeddings of all images are nearly the same" in said[0]


def test_yaml_tells_flags_from_the_sections_of_their_names(tmp_path):
    config = config_from_flags(method="swav", loss="ce", epsilon=0.03)
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(config))
    assert config_from_flags(config=file) == config
    file.write_text("method: byol\nloss:\n  student_temp: 0.2\n")
    assert read_yaml(file) == {"method": "byol", "student_temp": 0.2}


@pytest.mark.parametrize(
    ("name", "flags", "entropy", "words"),
    [
        ("sinkhorn", {}, 0.0, "COLLAPSE to one prototype: .* --teacher_temp too low"),
        ("swav", {}, math.log(20), "COLLAPSE to the uniform distribution: .* --epsilon too high"),
        ("sinkhorn", {"teacher_op": "center", "teacher_temp": 0.0}, 0.0, None),
    ],
)
def test_warnings_name_the_temperature_that_there_is(name, flags, entropy, words, data, tmp_path):
    trainer = Trainer(
        config_from_flags(**TINY | RUNS[name] | flags, data_path=data / "train", output_dir=tmp_path)
    )
    said: list[str] = []
    trainer._warn_of_collapse({"teacher_entropy": entropy}, SimpleNamespace(say=said.append))
    assert len(said) == (words is not None) and all(re.search(words, text) for text in said)
