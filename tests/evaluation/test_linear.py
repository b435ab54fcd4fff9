"""Linear probes against torch's own SGD, by hand, interrupted, on two processes and from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from fastdino.engine.parallel import World
from fastdino.evaluation import evaluate, linear
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.linear import (
    Batch,
    Cached,
    Heads,
    Live,
    ProbeFeatures,
    accuracy,
    load_linear,
    train_linear,
)
from fastdino.interop.files import WeightsError
from fastdino.models import VisionTransformer
from runs import spawn

ALONE = World(0, 1, torch.device("cpu"))


def tiny_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()


def make_images(root: Path, per_class: dict[str, int]) -> Path:
    """Two classes, a dark and a light one, of 24-pixel images, in folders named after the splits."""
    rng = np.random.default_rng(0)
    for split, count in per_class.items():
        for name, color in (("dark", 60), ("light", 190)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (color + rng.integers(-20, 20, (24, 24, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def dataset(tmp_path) -> Path:
    make_images(tmp_path, {"train": 7, "val": 3})
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in tiny_vit().state_dict().items()}}, tmp_path / "w.pth"
    )
    return tmp_path


def line(dataset: Path, protocol: str, *words: str) -> list[str]:
    network = ["--weights", str(dataset / "w.pth"), "--arch", "vit_tiny", "--device", "cpu"]
    return [
        protocol,
        *network,
        "--data_path",
        str(dataset),
        "--image_size",
        "24",
        "--num_workers",
        "1",
        *words,
    ]


@pytest.fixture(autouse=True)
def two_heads(monkeypatch):
    """The tiny network has 2 heads, which an official file does not say."""
    monkeypatch.setitem(__import__("fastdino.config").config.ARCHITECTURES, "vit_tiny", (32, 2, 2))


# --------------------------------------------------------------------------------------------------- features


def test_features_of_the_last_blocks():
    vit, images = tiny_vit(), torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        first, second = vit.get_intermediate_layers(images, 2)
        joined = ProbeFeatures(vit, 2)(images)
        assert torch.equal(joined, torch.cat([first[:, 0], second[:, 0]], 1))
        torch.testing.assert_close(ProbeFeatures(vit, 1)(images), second[:, 0])
        pooled = ProbeFeatures(vit, 1, avgpool=True)(images)
    assert pooled.shape == (3, 64)
    assert torch.equal(pooled[:, 0::2], second[:, 0]) and torch.equal(pooled[:, 1::2], second[:, 1:].mean(1))


def test_a_backbone_may_bring_its_own_features():
    class Own(nn.Module):
        def probe_features(self, images, n):
            return images.flatten(1)[:, :n]

    assert ProbeFeatures(Own(), 5)(torch.ones(2, 3, 4, 4)).shape == (2, 5)
    with pytest.raises(ValueError, match="avgpool_patchtokens"):
        ProbeFeatures(Own(), 1, avgpool=True)


@pytest.mark.parametrize("n, avgpool, flag", [(3, False, "n_last_blocks"), (2, True, "avgpool_patchtokens")])
def test_wrong_blocks_are_named(n, avgpool, flag):
    with pytest.raises(ValueError, match=flag):
        ProbeFeatures(tiny_vit(), n, avgpool)


# --------------------------------------------------------------------------------------------------- training


def test_two_steps_by_hand():
    heads = Heads(torch.zeros(1, 2, 1), torch.zeros(1, 2))
    batch = Batch(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]))
    loss = heads.step(batch, torch.tensor([0.1]))
    # p = 1/2 everywhere: d/dw0 = (-.5 * 1 + .5 * 3) / 2 = .5, d/db0 = 0
    assert loss.item() == pytest.approx(2 * np.log(2))
    assert heads.weight.flatten().tolist() == pytest.approx([-0.05, 0.05])
    assert heads.bias.flatten().tolist() == pytest.approx([0, 0])
    heads.step(batch, torch.tensor([0.2]))
    p = 1 / (1 + np.exp(-0.1 * np.array([1.0, 3.0])))  # of class 1
    grad = ((p[0] - 0) * 1 + (p[1] - 1) * 3) / 2
    assert heads.weight[0, 1].item() == pytest.approx(0.05 - 0.2 * (0.9 * -0.5 + grad))
    assert heads.bias[0, 1].item() == pytest.approx(-0.2 * (p[0] + p[1] - 1) / 2)


class Fixed:
    """The same features every epoch, in the same order."""

    def __init__(self, features, labels, size):
        self.parts = [Batch(x, y) for x, y in zip(features.split(size), labels.split(size), strict=True)]
        self.steps = len(self.parts)

    def epoch(self, epoch):
        yield from self.parts


def clusters(n, classes=3, dim=8, spread=0.3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(classes, (n,), generator=rng)
    return centers[labels] + spread * torch.randn(n, dim, generator=rng), labels


def fit(source, held_out, **changes):
    settings = {"num_labels": 3, "lrs": [0.5], "batch": 16, "epochs": 5, "world": ALONE}
    return train_linear(source, *held_out, **(settings | changes))


def test_equals_torch_sgd_with_its_cosine():
    x, y = clusters(50, spread=1.0)
    seen = fit(Fixed(x, y, 16), clusters(40, spread=1.0, seed=1), lrs=[0.3, 2.0])
    for head, lr in enumerate([0.3, 2.0]):
        layer = nn.Linear(8, 3)
        layer.weight.data = 0.01 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        layer.bias.data.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr * 16 / 256, momentum=0.9, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=0)
        for epoch in range(5):
            total = 0.0
            for features, labels in Fixed(x, y, 16).parts:
                loss = nn.functional.cross_entropy(layer(features), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(labels)
            scheduler.step()
            assert seen.history[epoch]["loss"][head] == pytest.approx(total / 50, rel=1e-5)
        held_out, truth = clusters(40, spread=1.0, seed=1)
        expected = (layer(held_out).argmax(1) == truth).float().mean().item() * 100
        assert seen.history[-1]["top1"][head] == pytest.approx(expected)


def test_separable_features_reach_100_percent():
    x, y = clusters(60)
    source = Cached(x[None], y, ALONE, 16, 60)
    seen = fit(source, clusters(30, seed=1), epochs=20, val_freq=7)
    assert seen.best["top1"] == 100.0 and seen.best["top5"] == 100.0
    assert [entry["epoch"] for entry in seen.history if "top1" in entry] == [1, 8, 15, 20]


def test_rates_side_by_side_equal_rates_alone_and_one_may_diverge():
    x, y = clusters(60, spread=1.0)
    source, held_out = Cached(x[None], y, ALONE, 16, 60), clusters(30, spread=1.0, seed=1)
    together = fit(source, held_out, lrs=[0.1, 1e38, 3.0])
    for head, lr in ((0, 0.1), (2, 3.0)):
        alone = fit(source, held_out, lrs=[lr])
        for a, b in zip(alone.history, together.history, strict=True):
            assert a["loss"][0] == pytest.approx(b["loss"][head], rel=1e-5)
            assert a["top1"][0] == b["top1"][head]
        assert together.best_of(head) == alone.best_of(0)
    assert together.history[-1]["loss"][1] is None and together.history[-1]["top1"][1] == 0.0


def test_accuracy_counts():
    weight = torch.eye(7)
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    top1, top5 = accuracy(weight, torch.zeros(7), logits, torch.tensor([0, 4, 5, 1]))
    assert (top1, top5) == (25.0, 75.0)
    assert accuracy(weight, torch.full((7,), torch.nan), logits, torch.tensor([0, 0, 0, 0])) == (0.0, 0.0)


def live(dataset: Path, world: World = ALONE, batch: int = 4) -> Live:
    paths = [str(p) for p in sorted(dataset.glob("train/*/*.png"))]
    labels = torch.tensor(["light" in p for p in paths]).long()
    return Live(ProbeFeatures(tiny_vit(), 2), paths, labels, world, batch, image_size=24, num_threads=1)


def test_an_epoch_holds_every_image_once_and_crops_change(dataset):
    source = live(dataset)
    first, again, second = (list(source.epoch(e)) for e in (0, 0, 1))
    assert [len(b.labels) for b in first] == [4, 4, 4, 2] and source.steps == 4
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again, strict=True))
    assert sum(int(b.labels.sum()) for b in first) == 7
    rows = {tuple(row.tolist()) for b in (*first, *second) for row in b.features}
    assert len(rows) == 28  # no crop twice


def test_processes_share_each_batch(dataset):
    whole = list(live(dataset, batch=6).epoch(3))
    halves = [list(live(dataset, World(rank, 2, torch.device("cpu")), 6).epoch(3)) for rank in (0, 1)]
    for batch, even, odd in zip(whole, *halves, strict=True):
        torch.testing.assert_close(batch.features[0::2], even.features)
        torch.testing.assert_close(batch.features[1::2], odd.features)
        assert torch.equal(batch.labels[1::2], odd.labels)


def test_cached_views_are_kept_crops(dataset):
    source = live(dataset)
    views = source.views(2)
    assert views.shape == (2, 14, 64) and not torch.equal(views[0], views[1])
    assert torch.equal(views, live(dataset, batch=3).views(2)) or torch.allclose(views, source.views(2))
    cached = Cached(views, source.labels, ALONE, 4, 14)
    for epoch in (0, 1, 2):
        rows = torch.cat([batch.features for batch in cached.epoch(epoch)])
        assert torch.equal(rows.sort(0).values, views[epoch % 2].sort(0).values)


class Crash(Exception):
    pass


def test_interrupted_and_resumed_equals_uninterrupted(dataset):
    held_out = clusters(6, classes=2, dim=64)
    settings = {"num_labels": 2, "lrs": [0.05, 0.5], "batch": 4, "settings": {"weights": "a"}}
    whole = fit(live(dataset), held_out, root=dataset / "whole", **settings)

    def crash(entry):
        if entry["epoch"] == 2:
            raise Crash

    with pytest.raises(Crash):
        fit(live(dataset), held_out, root=dataset / "cut", on_epoch=crash, **settings)
    told: list[int] = []
    resumed = fit(
        live(dataset), held_out, root=dataset / "cut", on_epoch=lambda e: told.append(e["epoch"]), **settings
    )
    assert told == [3, 4, 5]
    assert resumed.history == whole.history and resumed.best == whole.best
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)
    for name in ("model", "optimizer"):
        files = [dataset / run / "step-00000005" / f"{name}.safetensors" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="with weights a, this run has b"):
        fit(live(dataset), held_out, root=dataset / "cut", **(settings | {"settings": {"weights": "b"}}))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    x, y = clusters(7, classes=2, dim=64)
    seen = train(live(Path(folder), world, 5), (x[rank::2], y[rank::2]), world, Path(folder) / "shared")
    torch.save((seen.history, seen.weight), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train(source: Live, held_out, world: World, root: Path | None = None):
    return fit(source, held_out, num_labels=2, lrs=[0.1], batch=5, epochs=3, world=world, root=root)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(dataset):
    spawn(worker, (str(dataset),), 2)
    (history, weight), (other, same) = (torch.load(dataset / f"{rank}.pt") for rank in (0, 1))
    alone = train(live(dataset, batch=5), clusters(7, classes=2, dim=64), ALONE)
    assert history == other and torch.equal(weight, same)
    torch.testing.assert_close(weight, alone.weight, rtol=1e-4, atol=1e-6)
    for entry, expected in zip(history, alone.history, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert entry["top1"] == expected["top1"]


# ------------------------------------------------------------------------------------------------ the command


def test_command_trains_resumes_and_evaluates(dataset, capsys):
    out = dataset / "out"
    words = line(dataset, "linear", "--n_last_blocks", "2", "--epochs", "4", "--batch_size_per_gpu", "4")
    words += ["--lr", "0.5", "5", "--output_dir", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "14 training images, 6 held-out images, 2 classes" in shown and "Best: lr" in shown
    record = json.loads((out / "linear.json").read_text())
    assert record["figures"].keys() == {"top1", "top5", "last_top1"} and record["figures"]["top1"] == 100.0
    assert len(record["details"]["epochs"]) == 4 and [r["lr"] for r in record["details"]["rates"]] == [0.5, 5]

    assert main(words) == 0  # finished already
    assert "Epoch" not in capsys.readouterr().out
    assert json.loads((out / "linear.json").read_text())["figures"] == record["figures"]
    assert main([*words, "--seed", "1"]) == 2
    assert "seed 0" in capsys.readouterr().err

    weight, bias = load_linear(out / "linear")
    official = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 4, "state_dict": official, "best_acc": 1.0}, dataset / "head.pth.tar")
    evaluate = line(dataset, "linear", "--n_last_blocks", "2", "--evaluate")
    for source in (["--output_dir", str(out)], ["--linear_weights", str(dataset / "head.pth.tar")]):
        assert main([*evaluate, *source]) == 0
        assert "Accuracy of the network on the 6 test images: Top1: 100.00" in capsys.readouterr().out
    wide = line(dataset, "linear", "--n_last_blocks", "1", "--evaluate", "--output_dir", str(out))
    assert main(wide) == 2
    assert "64 features" in capsys.readouterr().err


def damage_unseen(image: Path) -> None:
    """Without looking into it, it is the same."""
    before = image.stat()
    image.write_bytes(b"damaged".ljust(before.st_size))
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_other_images_are_not_given_the_figures_of_the_first(dataset, protocol, capsys):
    words = line(dataset, protocol, "--epochs", "1", "--batch_size_per_gpu", "4")
    words += ["--output_dir", str(dataset / "out")]
    assert main(words) == 0
    capsys.readouterr()
    for split in ("train", "val"):  # as many images of each class, with the labels the other way round
        (dataset / split / "dark").rename(dataset / split / "x")
        (dataset / split / "light").rename(dataset / split / "dark")
        (dataset / split / "x").rename(dataset / split / "light")
    assert main(words) == 2
    assert "images" in capsys.readouterr().err


def test_networks_from_python(dataset):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 8)

        def forward(self, images):
            return self.layer(images.mean((2, 3)))

        def __len__(self):
            raise TypeError("as of torch.compile's modules")

    settings = dict(data_path=str(dataset), image_size=24, epochs=2, device="cpu", num_workers=1, lr=[0.1])
    assert evaluate("linear", Plain(), batch_size_per_gpu=4, **settings).figures["top1"] >= 0
    with pytest.raises(ValueError, match="--n_last_blocks: .* get_intermediate_layers"):
        evaluate("linear", Plain(), n_last_blocks=4, **settings)


def test_a_killed_run_goes_on_with_its_features(dataset, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    words = ["--features", "cached", "--epochs", "2", "--batch_size_per_gpu", "4"]
    words += ["--output_dir", str(dataset / "out")]
    joined, pooled = ["--n_last_blocks", "2"], ["--n_last_blocks", "1", "--avgpool_patchtokens", "true"]
    with monkeypatch.context() as patch:
        patch.setattr(linear, "train_linear", killed)
        with pytest.raises(KeyboardInterrupt):
            main(line(dataset, "linear", *words, *joined))
    damage_unseen(next((dataset / "train").rglob("*.png")))
    assert main(line(dataset, "linear", *words, *pooled)) == 2  # features as wide, but others
    assert main(line(dataset, "linear", *words, *joined)) == 0  # no image is read
    assert sorted(path.name for path in (dataset / "out").iterdir()) == ["linear", "linear.json"]


@pytest.mark.parametrize("views", ["0", "2"])
def test_command_with_cached_features(dataset, views, capsys):
    words = ["--features", "cached", "--cached_views", views, "--lr", "5", "--epochs", "6"]
    words += ["--batch_size_per_gpu", "4", "--n_last_blocks", "1", "--avgpool_patchtokens", "true"]
    assert main(line(dataset, "linear", *words)) == 0
    assert "best Top1: 100.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lr", "0"], "--lr"),
        (["--cached_views", "2"], "--cached_views"),
        (["--num_labels", "1"], "--num_labels"),
        (["--n_last_blocks", "3"], "--n_last_blocks"),
        (["--avgpool_patchtokens", "true"], "--avgpool_patchtokens"),
        (["--linear_weights", "x.pth"], "--linear_weights"),
        (["--evaluate"], "--evaluate"),
        (["--evaluate", "--linear_weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_errors_are_one_line(dataset, words, message, capsys):
    assert main(line(dataset, "linear", *words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_labels_are_needed_and_must_match(dataset, capsys):
    (dataset / "val" / "other").mkdir()
    Image.new("RGB", (24, 24)).save(dataset / "val" / "other" / "0.png")
    assert main(line(dataset, "linear")) == 2
    assert "'other'" in capsys.readouterr().err
    Image.new("RGB", (24, 24)).save(dataset / "train" / "0.png")
    assert main(line(dataset, "linear")) == 2
    assert "labels" in capsys.readouterr().err


def test_foreign_files_are_refused(tmp_path):
    torch.save({"state_dict": {"module.linear.weight": torch.ones(3, 2)}}, tmp_path / "half.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("half.pth", "list.pth"):
        with pytest.raises(WeightsError, match=name):
            load_linear(tmp_path / name)
