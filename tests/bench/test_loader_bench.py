"""bench/loader.py: what is compared is what it says, and whether the loader holds a step back."""

from __future__ import annotations

import argparse
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdino_kernels.multicrop import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image

from bench import loader, loader_dali, loader_providers, solo_learn
from bench.harness import Transcript
from bench.loader import compare, step_rates, verdict
from bench.loader_providers import PROVIDERS, Setting, lacking, measure, memory
from bench.loader_stages import STAGES, stages, table
from bench.providers import EngineStep
from fastdino.data.loader import Crops, MultiCropLoader
from fastdino.engine.step import TrainStep

pytest.importorskip("nvidia.dali")
NAMES = ["official", "fastdino", "fastdino, decoded once", "DALI's own *", "DALI's own, stacked *"]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (30, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    return Setting(str(tmp_path), 1, batch=2, workers=1, n_batches=2)


@pytest.mark.parametrize("name", NAMES)
def test_providers_give_all_crops(setting: Setting, name: str) -> None:
    with PROVIDERS[name](setting) as batches:
        for _ in range(4):  # more than an epoch
            batch = next(batches)
    if isinstance(batch, Crops):
        assert batch.local is not None
        batch = [*batch.global_.split(2), *batch.local.split(2)]
    assert [tuple(view.shape) for view in batch] == [(2, 3, s, s) for s in (224, 224, 96)]
    assert all(view.dtype == torch.float32 and view.std() > 0.1 for view in batch)


def test_dalis_own_operations_make_crops_of_one_kind_in_both_forms(tmp_path: Path) -> None:
    """Each crop of a stack is drawn for itself: by colours, mirrored or not, sharp or not."""
    pixels = np.random.default_rng(0).integers(0, 40, (300, 300, 3), dtype=np.uint8)
    pixels[:, :150] += np.array((20, 70, 140), np.uint8)
    pixels[:, 150:] += np.array((200, 110, 40), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    setting = Setting(str(tmp_path), 4, batch=40, workers=1, n_batches=1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    for graph in (loader_dali.separate, loader_dali.stacked):
        views = [(view * std + mean) * 255 for view in next(graph(setting, gpu=False))]
        assert len(views) == 6
        for view in views:
            assert view.min() > -1 and view.max() < 256
            gray = (view.amax(1) - view.amin(1)).amax((1, 2)) < 3  # [40]
            assert 0 < gray.float().mean() < 0.5
            assert (view - view[:1]).abs().amax((1, 2, 3))[1:].min() > 1  # no two are equal
        left = views[0][..., :112].mean((1, 2, 3)) < views[0][..., 112:].mean((1, 2, 3))
        assert 0.2 < left.float().mean() < 0.8  # the others are mirrored
        noise = [(view[..., 1:] - view[..., :-1]).abs().mean((1, 2, 3)).median() for view in views[:2]]
        assert noise[0] < 0.7 * noise[1]  # all of the first are blurred, a tenth of the second


def test_what_cannot_be_measured(setting: Setting) -> None:
    for name in PROVIDERS:
        why = lacking(name, setting)
        assert bool(why) == (name not in NAMES and not (torch.cuda.is_available() and "solo" not in name))
        assert not why or why in ("there is no GPU", "no --solo_learn checkout")


def test_measuring(setting: Setting) -> None:
    figures = measure("fastdino", setting)
    assert figures["images_per_second"] > 0 and figures["cpu_ms_per_image"] > 0
    assert figures["competing_cores"] >= 0
    with mmap.mmap(-1, 1 << 26) as held:  # malloc may keep what is freed
        held.write(b"x" * (1 << 26))
        before = loader_providers.own_bytes()
    assert loader_providers.own_bytes() <= before - (1 << 25)
    assert memory("fastdino", setting)["device_bytes"] >= 0


def test_stages(setting: Setting) -> None:
    found = stages(setting, 2)
    assert list(found) == list(STAGES)
    assert all(found[name] > 0 for name in ("read", "parameters", "write"))
    text = table(dict.fromkeys(STAGES, 1.0) | {"decode": 4.0})
    assert "decode          4.000    40%" in text and text.endswith("sum            10.000")


def test_the_comparison(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "peak", lambda *_: {"host_bytes": 5_000_000, "device_bytes": 0})
    monkeypatch.setattr(loader, "stages", lambda *_, **__: dict.fromkeys(STAGES, 1.0))
    monkeypatch.setattr(
        loader,
        "measure",
        lambda name, _: {
            "images_per_second": 300.0 if name.startswith("fastdino") else 100.0,
            "cpu_ms_per_image": 2.0,
            "competing_cores": 0.0,
        },
    )
    say = Transcript()
    result = compare(setting, argparse.Namespace(rounds=2, demand=150.0), say)
    (ours,) = [line for line in say.lines if line.startswith("fastdino  ")]
    assert ours.split() == "fastdino 300 900 2.00 3.00x 3.00-3.00 1.00x 5".split()
    (solo,) = [line for line in say.lines if line.startswith("solo-learn, DALI *")]
    assert solo.endswith("not measured: no --solo_learn checkout")
    assert (
        result["not_measured"]["solo-learn, DALI *"]
        and result["memory"]["official"]["host_bytes"] == 5_000_000
    )
    assert any("no, it is 2.0 times as fast" in line for line in say.lines)


def test_crops_that_differ_are_not_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.check_equal(setting)
    monkeypatch.setattr(loader, "multicrop", lambda *_, out: [view.zero_() for view in out])
    with pytest.raises(AssertionError):
        loader.check_equal(setting)


def test_solo_learn_is_loaded_without_what_it_trains_with(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--solo_learn .*: expected a checkout of vturrisi/solo-learn"):
        solo_learn.load(tmp_path)
    folder = tmp_path / "solo" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").write_text("raise ImportError('not to be run')")
    (folder / "temp_dali_fix.py").write_text("NUMBER = 3")
    (folder / "dali_dataloader.py").write_text(
        "import lightning.pytorch as pl\nimport omegaconf\n"
        "from timm.data.constants import IMAGENET_DEFAULT_MEAN\n"
        "from solo.data.temp_dali_fix import NUMBER\nfrom solo.utils.misc import omegaconf_select\n"
        "class Module(pl.LightningDataModule):\n    config: omegaconf.DictConfig\n"
    )
    found = solo_learn.load(tmp_path)
    assert found.NUMBER == 3 and found.IMAGENET_DEFAULT_MEAN[0] == 0.485
    assert not any(name.split(".")[0] in ("solo", "omegaconf", "lightning") for name in sys.modules)


def test_verdict() -> None:
    fast = verdict("ours", 900.0, 100.0, local=8)
    assert fast == "ours: 9000 crops/s; the step takes 1000 crops/s. Bottleneck: no, it is 9.0 times as fast"
    assert verdict("ours", 50.0, 100.0, local=0).endswith(
        "100 crops/s; the step takes 200 crops/s. Bottleneck: YES, it gives 50% of that"
    )


@pytest.mark.parametrize("batch", [2, 3])
def test_the_step_alone_and_fed_by_our_loader(
    setting: Setting, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = EngineStep.__init__

    def started(self: EngineStep, step: TrainStep) -> None:
        real(self, step)
        enqueue = step.enqueue

        def record(batches: Iterator[Crops], *options: object) -> None:
            taken.append(isinstance(batches, MultiCropLoader))
            enqueue(batches, *options)  # type: ignore[arg-type]

        monkeypatch.setattr(step, "enqueue", record)

    monkeypatch.setattr(EngineStep, "__init__", started)
    say = Transcript()
    args = argparse.Namespace(step_batch=batch, arch="vit_small", toy=True)
    assert min(step_rates(setting, args, say)) > 0
    alone, fed = say.lines
    assert f"batch {batch}" in alone and "fastdino" in alone
    assert fed.startswith("the step fed by fastdino") and fed.endswith("% of that")
    assert set(taken[:3]) == {False} and set(taken[-5:]) == {True}
