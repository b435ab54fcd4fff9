"""The fidelity bench: its verdict, its pictures, and both sides on a run of seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench import fidelity
from bench.fidelity import Alone, as_on_a_gpu, picture, report, subset, verdict
from bench.harness import Transcript
from fastdino.config import config_from_flags


def test_verdict_is_welchs():
    from scipy import stats

    ours, theirs = [41.0, 43.0, 42.5], [40.0, 42.0, 41.2]
    found = verdict(ours, theirs)
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    assert found["p"] == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert found["difference"] == pytest.approx((low + high) / 2)
    assert found["visible"] == pytest.approx((high - low) / 2)
    assert found["within"]
    assert not verdict([50.0, 50.5, 50.2], theirs)["within"]
    assert verdict([1.0, 1.0], [1.0, 1.0])["within"] and not verdict([2.0, 2.0], [1.0, 1.0])["within"]


def curves(*finals: float) -> list[fidelity.Curve]:
    return [{"knn": [20.0, 30.0, final], "loss": [5.0, 0.1 * final], "cpu": [12.0]} for final in finals]


def test_table_and_picture(tmp_path):
    found = {"official": curves(40.0, 42.0, 41.0), "fastdino": curves(41.0, 42.5, 40.0)}
    say = Transcript()
    results = report(say, found, [0, 1, 2])
    assert results["knn"]["within"] and results["loss"]["within"]
    assert say.lines[-1].endswith(" would be seen: within the noise of seeds")
    assert "official  seed 1    20.0  30.0  42.0       12 s of CPU" in say.lines
    assert "official  seed 1    5.00  4.20" in say.lines
    assert "fastdino  at the end 41.17, deviation 1.26" in say.lines
    found["fastdino"] = curves(60.0, 61.0, 62.0)
    results = report(say, found, [0, 1, 2])
    assert not results["knn"]["within"] and not results["loss"]["within"]
    assert say.lines[-1].endswith("NOT within the noise of seeds")
    assert report(say, {side: runs[:1] for side, runs in found.items()}, [0]) == {}
    picture(found, "two sides", tmp_path / "a" / "fidelity.png")
    assert (tmp_path / "a" / "fidelity.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, n in (("train", 16), ("test", 4)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                level = 60 if label == "cat" else 190
                pixels = np.clip(rng.normal(level, 40, (20, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{i:02}.png")
    return root


def test_subset_takes_the_first_of_each_class(images, tmp_path):
    small = subset(images, tmp_path / "small", {"train": 6, "test": 2})
    names = sorted(str(path.relative_to(small)) for path in small.rglob("*.png"))
    assert names == [
        *("test/cat/00.png", "test/dog/00.png"),
        *(f"train/{label}/{i:02}.png" for label in ("cat", "dog") for i in range(3)),
    ]


class Checkout:
    """A stand-in for the official modules, with their names and calls, that keeps what it was given.

    The real ones are in a checkout that is not part of this repository.
    """

    def __init__(self) -> None:
        self.utils = self.main_dino = self.vision_transformer = self
        self.calls: list[tuple] = []
        self.seed = None

    def fix_random_seeds(self, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(seed)

    def VisionTransformer(self, **options):
        vit = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, options["embed_dim"]))
        vit.embed_dim = options["embed_dim"]
        return vit

    def DINOHead(self, width, k, **options):
        return nn.Linear(width, k)

    def MultiCropWrapper(self, backbone, head):
        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone, self.head = backbone, head

            def forward(self, crops):
                return torch.cat([self.head(self.backbone(crop)) for crop in crops])

        return Wrapper()

    def DINOLoss(self, *sizes, **options):
        self.loss = sizes, options

        class Loss(nn.Module):
            def forward(self, student, teacher, epoch):
                return student.square().mean()

        return Loss()

    def get_params_groups(self, model):
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def cosine_scheduler(self, first, last, epochs, steps, warmup_epochs=0):
        return first, last, epochs, steps, warmup_epochs

    def train_one_epoch(
        self, student, teacher, alone, criterion, loader, optimizer, lr, wd, momentum, epoch, scaler, args
    ):
        print("must not be seen")
        for images, _ in loader:
            images = [image.cuda(non_blocking=True) for image in images]
            loss = criterion(student(images), teacher(images[:2]), epoch)
            loss.backward()
            torch.cuda.synchronize()
        with torch.no_grad():
            for q, k in zip(student.module.parameters(), alone.parameters(), strict=True):
                k.mul_(0.5).add_(q)
        assert scaler is None and args.clip_grad == 3.0
        self.calls.append((epoch, len(loader), [tuple(image.shape) for image in images], lr, wd, momentum))
        return {"loss": 6.5 - epoch}


def test_both_sides_of_a_small_run(images, tmp_path, monkeypatch, capsys):
    code = Checkout()
    monkeypatch.setattr(fidelity.official, "load", lambda path: code)
    changes = dict(embed_dim=16, depth=1, out_dim=32, head_hidden_dim=16, bottleneck_dim=8, epochs=2)
    changes |= dict(global_crops_size=16, local_crops_size=8, batch_size_per_gpu=8, num_workers=1)
    flags = fidelity.RECIPE | changes | dict(seed=5, device="cpu")
    paths = dict(data_path=images / "train", eval_data_path=images / "test", output_dir=tmp_path / "run")
    config = config_from_flags(**flags, **paths)
    threads = torch.get_num_threads()
    found = {"official": [fidelity.theirs(config, Path("checkout"))], "fastdino": [fidelity.fastdino(config)]}
    torch.set_num_threads(threads)
    for (curve,) in found.values():
        assert len(curve["knn"]) == 3 and all(0 <= value <= 100 for value in curve["knn"])
        assert len(curve["loss"]) == 2 and curve["cpu"][0] > 0
    assert "must not be seen" not in capsys.readouterr().out
    assert found["official"][0]["loss"] == [6.5, 5.5]
    assert code.seed == 5 and [call[0] for call in code.calls] == [0, 1]
    _, steps, shapes, lr, wd, momentum = code.calls[0]
    assert steps == 4 and shapes == [(8, 3, 16, 16)] * 2 + [(8, 3, 8, 8)] * 2
    assert lr == (config.optim.lr / 32, config.optim.min_lr, 2, 4, config.optim.warmup_epochs)
    assert momentum[:2] == (config.loss.momentum_teacher, 1) and wd[0] == config.optim.weight_decay
    sizes, options = code.loss
    assert sizes[:2] == (32, 4) and options["student_temp"] == config.loss.student_temp


def test_what_the_official_loop_finds_on_a_cpu():
    module = nn.Linear(2, 2)
    tensor = torch.ones(1, 2)
    with as_on_a_gpu(torch.device("cpu")):
        assert tensor.cuda(non_blocking=True) is tensor
        torch.cuda.synchronize()
    assert Alone(module).module is module and torch.equal(Alone(module)(tensor), module(tensor))
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            tensor.cuda()
