"""A continuation with another flag that changes what is computed, or with other data, is refused with both
values; the flags that may change are listed, and none is forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch

from fastdino.config import Config, ConfigError, as_flags, config_from_flags, config_to_dict
from fastdino.data.manifest import build_manifest
from fastdino.engine import checkpoint, identity
from fastdino.engine.trainer import Trainer
from reliability import toy
from reliability.promises import promise

DRIFTS = {
    "--out_dim": "128",
    "--depth": "3",
    "--embed_dim": "64",
    "--drop_path_rate": "0.2",
    "--use_bn_in_head": "true",
    "--norm_last_layer": "false",
    "--momentum_teacher": "0.99",
    "--teacher_temp": "0.07",
    "--center_momentum": "0.5",
    "--teacher_op": "sinkhorn",
    "--optimizer": "lamb",
    "--lr": "0.02",
    "--weight_decay_end": "0.1",
    "--clip_grad": "0",
    "--epochs": "3",
    "--warmup_epochs": "0",
    "--freeze_last_layer": "0",
    "--local_crops_number": "3",
    "--global_crops_scale": "0.3 1.0",
    "--global_crops_size": "40",
    "--seed": "7",
    "--precision": "bf16",
    "--batch_size_per_gpu": "4",
}
OTHER_NAME = {"--precision": "compute type", "--batch_size_per_gpu": "global batch"}


def test_every_drift_is_refused_with_both_values(images, tmp_path):
    out = tmp_path / "run"
    toy.train(images, out, "--max_steps", "4")
    expected = toy.state_hash(out)
    flags = dict(zip(toy.SMALL[::2], toy.SMALL[1::2], strict=True))
    flags |= {"--data_path": str(images), "--output_dir": str(out)}
    with promise(9, "a flag or the data differs from the checkpoint's: refused, both values told") as cases:
        with cases.case("the command"):
            job = toy.train(images, out, "--lr", "0.02", code=2)
            assert "--lr: checkpoint 0.01, now 0.02" in job.text and "Traceback" not in job.text, job.text
        data = tmp_path / "data"
        shutil.copytree(images, data)
        with cases.case("one image more"):
            shutil.copy(next(data.rglob("*.jpg")), data / "class0" / "more.jpg")
            job = toy.start(data, out)
            assert job.wait() == [2] and "list of images: checkpoint" in job.text, job.text
        for flag, value in DRIFTS.items():
            with cases.case(f"{flag} {value}"):
                words = {name.removeprefix("--"): v for name, v in (flags | {flag: value}).items()}
                with pytest.raises(checkpoint.CheckpointError, match="belongs to another run") as refusal:
                    Trainer(config_from_flags(**words))
                shown = OTHER_NAME.get(flag, flag)
                assert re.search(rf"^  {shown}: checkpoint .+, now .+$", str(refusal.value), re.M)
    assert toy.state_hash(out) == expected  # nothing was touched


def test_what_may_change_changes_no_bit_and_the_rest_can_be_allowed(images, tmp_path):
    toy.train(images, tmp_path / "whole")
    data, out = tmp_path / "moved", tmp_path / "run"
    toy.train(images, out, "--max_steps", "4")
    shutil.copytree(images, data)
    free = ("--num_workers", "2", "--cache_decoded", "off", "--log_every", "2", "--save_every", "3")
    with promise(9, "a moved data set, other threads, intervals: allowed, the same bits") as cases:
        with cases.case("free flags"):
            toy.train(data, out, *free, "--max_steps", "9")
            toy.train(images, out)
            assert toy.state_hash(out) == toy.state_hash(tmp_path / "whole")
        with cases.case("--allow_changes"):
            other = tmp_path / "longer"
            toy.train(images, other, "--max_steps", "4")
            toy.train(images, other, "--epochs", "3", "--lr", "0.02", code=2)
            job = toy.train(images, other, "--epochs", "3", "--lr", "0.02", "--allow_changes", "epochs", "lr")
            assert toy.newest(other) == 36, job.text


def test_every_flag_is_compared_or_listed_as_free(images):
    manifest = build_manifest(str(images))
    told = identity.identity(Config(), manifest, 64, torch.float32)
    flags = {f"--{name}" for name in as_flags(Config())}
    assert {name for name in told if name.startswith("--")} | {f"--{name}" for name in identity.FREE} == flags
    assert not {f"--{name}" for name in identity.FREE} & told.keys()
    with pytest.raises(ConfigError, match="--allow_changes: expected names of flags, got 'learning_rate'"):
        config_from_flags(data_path=str(images), allow_changes=("learning_rate",))


def test_checkpoints_of_earlier_releases_are_compared_by_what_they_tell(images):
    manifest = build_manifest(str(images))
    config = Config()
    ours = identity.identity(config, manifest, 64, torch.float32)
    stored = json.loads(json.dumps(config_to_dict(config)))  # as meta.json gives it
    del stored["method"]  # a release that knew DINO alone
    few = {"global batch": 64, "list of images": ours["list of images"], "--seed": 0}
    meta = {"identity": few, "config": stored}
    assert identity.differences(ours, meta) == []
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    theirs = identity.identity(changed, manifest, 64, torch.float32)
    assert identity.differences(theirs, meta) == ["--lr: checkpoint 0.0005, now 0.5"]
    assert identity.differences(theirs, meta, ("lr",)) == []
    assert identity.differences(theirs, {"official": True, "identity": {"--seed": 0}}) == []
