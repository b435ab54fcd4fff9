"""Fine-tuning: schedule, layers and mixtures against their definitions; interrupted; on two processes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageEnhance
from torch import nn

from fastdino.data.manifest import build_manifest
from fastdino.engine.parallel import World
from fastdino.evaluation import mixup
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.features import in_threads, read_image
from fastdino.evaluation.finetune import (
    RECIPES,
    FineTuning,
    Recipe,
    build_classifier,
    epoch_order,
    layer_scale,
    learning_rate,
    parameter_groups,
    training_crop,
)
from fastdino.evaluation.randaugment import FILL, OPERATIONS, rand_augment
from fastdino.evaluation.training import Sample, crop_box, generator, random_crop
from fastdino.models import ResNet
from runs import spawn
from tests.evaluation.test_linear import ALONE, dataset, line, tiny_vit, two_heads  # noqa: F401

QUICK = Recipe(epochs=4, lr=0.05, warmup_epochs=1, drop_path=0.3, head_scale=1.0)

# --- schedule, order, layers --------------------------------------------------------------------------------


def test_learning_rate_of_deit():
    recipe = Recipe()
    top = 5e-4 * 1024 / 512
    assert learning_rate(0, recipe, 1024) == pytest.approx(1e-6)
    assert learning_rate(2.5, recipe, 1024) == pytest.approx((1e-6 + top) / 2)
    assert learning_rate(5, recipe, 1024) == pytest.approx(
        1e-5 + (top - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2
    )
    assert learning_rate(150, recipe, 1024) == pytest.approx((top + 1e-5) / 2)
    assert learning_rate(300, recipe, 1024) == pytest.approx(1e-5)
    cifar = RECIPES["cifar"]
    assert cifar.epochs == 1000 and cifar.erase == 0 and cifar.lr * 768 / 512 == pytest.approx(7.5e-6)
    assert learning_rate(3, dataclasses.replace(recipe, warmup_epochs=0), 512) < 5e-4


def test_images_of_an_epoch_are_repeated():
    order = epoch_order(0, 0, 10, 3)
    assert len(order) == 10 and [len(set(order[i : i + 3].tolist())) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(order.tolist())) == 4
    assert sorted(epoch_order(0, 1, 10, 1).tolist()) == list(range(10))
    assert not np.array_equal(order, epoch_order(0, 1, 10, 3))


def test_rates_fall_from_layer_to_layer():
    names = {
        "head.weight": 1.0,
        "backbone.norm.weight": 1.0,
        "backbone.blocks.11.attn.qkv.weight": 0.5,
        "backbone.blocks.10.mlp.fc1.bias": 0.25,
        "backbone.blocks.0.norm1.weight": 0.5**12,
        "backbone.patch_embed.proj.weight": 0.5**13,
        "backbone.pos_embed": 0.5**13,
        "backbone.cls_token": 0.5**13,
    }
    assert {name: layer_scale(name, 12, 0.5) for name in names} == names


def classifier(recipe: Recipe, classes: int = 2):
    return build_classifier(tiny_vit(), classes, recipe, 24, torch.device("cpu"), seed=0)


def test_groups_hold_every_parameter_once_and_decay_matrices_alone():
    model = classifier(Recipe(layer_decay=0.5))
    groups = parameter_groups(model, Recipe(layer_decay=0.5))
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["scale"] == layer_scale(names[parameter], 2, 0.5)
            matrix = names[parameter].endswith("weight") and parameter.ndim > 1
            assert group["weight_decay"] == (0.05 if matrix else 0.0), names[parameter]
    assert {group["scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}
    assert len(parameter_groups(model, Recipe())) == 2


def test_classifier_starts_small_and_refuses_what_a_network_lacks():
    small, large = classifier(Recipe()), classifier(Recipe(head_scale=1.0))
    torch.testing.assert_close(small.head.weight * 1000, large.head.weight)
    assert small.backbone.drop_path_rate == 0.1
    assert 0.01 < large.head.weight.std().item() < 0.03 and not large.head.bias.any()
    for recipe, flag in ((Recipe(), "drop_path"), (Recipe(drop_path=0, layer_decay=0.5), "layer_decay")):
        with pytest.raises(ValueError, match=flag):
            build_classifier(nn.Flatten(), 2, recipe, 24, torch.device("cpu"), 0)
    resnet = ResNet(width=4, blocks=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="drop_path.*ResNet has no stochastic depth"):
        build_classifier(resnet, 2, Recipe(), 32, torch.device("cpu"), 0)
    plain = build_classifier(nn.Flatten(), 2, Recipe(drop_path=0), 24, torch.device("cpu"), 0)
    assert plain.head.in_features == 3 * 24 * 24


# --- crops, RandAugment, erasing ----------------------------------------------------------------------------


def test_crop_boxes_follow_torchvision():
    areas, ratios = [], []
    for i in range(400):
        left, top, right, bottom = crop_box(generator(0, 1, i), 400, 300)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / 120_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.07 < min(areas) < 0.12 and max(areas) > 0.9 and 0.4 < np.mean(areas) < 0.56
    assert 0.73 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.36
    # no box of an allowed ratio fits: the largest central one
    assert crop_box(generator(0), 1000, 10, (0.9, 1.0)) == (493, 0, 506, 10)
    assert crop_box(generator(0), 10, 1000, (0.9, 1.0)) == (0, 493, 10, 506)


def test_random_crop_is_pillow_on_the_box():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    flips = 0
    for i in range(20):
        crop = np.array(random_crop(image, 24, generator(5, i), Image.Resampling.BILINEAR))
        box = crop_box(generator(5, i), 60, 40)
        expected = np.array(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR))
        flips += bool(np.array_equal(crop, expected[:, ::-1]))
        assert np.array_equal(crop, expected) or np.array_equal(crop, expected[:, ::-1])
    assert 3 < flips < 17


def test_threads_keep_the_order_and_pass_errors_on():
    batches = [[1, 2, 3], [], [4], [5, 6]]
    assert list(in_threads(lambda x: x * x, batches, 3)) == [[1, 4, 9], [], [16], [25, 36]]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda x: 1 / (x - 4), batches, 2))


def test_operations_of_rand_augment():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    pixels = np.array(image).astype(int)
    by = [np.array(operation(image, 0.9, 1.0)).astype(int) for operation in OPERATIONS]
    assert all(result.shape == (24, 24, 3) for result in by)
    assert np.array_equal(by[2], 255 - pixels)  # invert
    assert np.array_equal(by[4], pixels & 0b10000000)  # 4 - int(3.6) = 1 bit is left
    assert np.array_equal(by[5], np.where(pixels < 26, pixels, 255 - pixels))  # solarize from 256 - 230
    assert np.array_equal(by[6], np.where(pixels < 128, np.minimum(pixels + 99, 255), pixels))
    assert np.array_equal(by[9], np.array(ImageEnhance.Brightness(image).enhance(1.81)))
    dark = np.array(OPERATIONS[9](image, 0.9, -1.0))
    assert np.array_equal(dark, np.array(ImageEnhance.Brightness(image).enhance(1 - 0.81)))
    shifted = np.array(OPERATIONS[13](image, 10 / (0.45 * 24), 1.0))  # by 10 pixels to the left
    assert np.array_equal(shifted[:, :14], pixels[:, 10:]) and (shifted[:, 15:] == FILL).all()
    upright = np.array(OPERATIONS[14](image, 10 / (0.45 * 24), -1.0))
    assert np.array_equal(upright[10:], pixels[:14]) and (upright[:9] == FILL).all()


def test_rand_augment_applies_each_of_two_operations_half_of_the_time(monkeypatch):
    image = Image.new("RGB", (24, 24), (10, 20, 30))
    calls: list[tuple[int, float, float]] = []

    def spy(index):
        return lambda image, share, sign: calls.append((index, share, sign)) or image

    monkeypatch.setattr(
        "fastdino.evaluation.randaugment.OPERATIONS", [spy(i) for i in range(len(OPERATIONS))]
    )
    for i in range(1000):
        rand_augment(image, generator(i))
    assert 930 < len(calls) < 1070 and {index for index, _, _ in calls} == set(range(15))
    levels = np.array([share for _, share, _ in calls]) * 10
    assert levels.max() <= 10 and 8.9 < levels.mean() < 9.1 and 0.4 < levels.std() < 0.55
    assert 0.4 < np.mean([sign == 1 for _, _, sign in calls]) < 0.6


def test_erased_boxes():
    boxes = np.array([mixup.draw_box(generator(i), 100, 0.25) for i in range(800)])
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    assert 0.2 < np.mean(area > 0) < 0.3
    assert boxes.min() == 0 and boxes.max() <= 100
    assert area[area > 0].min() > 150 and 3000 < area.max() < 3450
    assert mixup.draw_box(generator(0), 100, 0.0) == (0, 0, 0, 0)
    images = torch.full((2, 3, 8, 8), 7.0)
    box = torch.tensor([[1, 4, 2, 8], [0, 0, 0, 0]])
    erased = mixup.erase(images, box, torch.Generator().manual_seed(0))
    assert torch.equal(erased[1], images[1])
    changed = erased[0] != 7.0
    assert changed[:, 1:4, 2:8].all() and int(changed.sum()) == 3 * 3 * 6
    assert erased[0][changed].std() > 0.5


def test_a_crop_is_a_function_of_its_counters(dataset):  # noqa: F811
    path = str(dataset / "train" / "dark" / "0.png")
    first, again, other = (
        training_crop(Sample(path, 0, 3, position), 24, Recipe(erase=1.0)) for position in (5, 5, 6)
    )
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]
    assert not np.array_equal(first[0], other[0]) and first[1] != other[1]
    plain = training_crop(Sample(path, 0, 3, 5), 24, Recipe(rand_augment=False, erase=0.0))
    expected = random_crop(read_image(path), 24, generator(0, 3, 5), Image.Resampling.BICUBIC)
    assert np.array_equal(plain[0], np.array(expected)) and plain[1] == (0, 0, 0, 0)


# --- mixup --------------------------------------------------------------------------------------------------


def test_targets_sum_to_one_and_are_smoothed():
    targets = mixup.mix_targets(torch.tensor([0, 1, 3]), 4, 0.7, 0.1)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    low, high = 0.1 / 4, 0.9 + 0.1 / 4
    row = [0.7 * high + 0.3 * low, low, low, 0.3 * high + 0.7 * low]
    assert targets[0].tolist() == pytest.approx(row)
    assert targets[1].tolist() == pytest.approx([low, high, low, low])
    hard = mixup.mix_targets(torch.tensor([2, 0]), 3, 1.0, 0.0)
    assert hard.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_shares_match_the_areas():
    cuts, blends = 0, []
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    for i in range(300):
        mixture = mixup.draw_mixture(generator(9, i), 16, 0.8, 1.0)
        mixed = mixup.mix_images(images, mixture)
        # of the partner, whose pixels are 1
        assert float(mixed[0].mean()) == pytest.approx(1 - mixture.share, abs=1e-6)
        torch.testing.assert_close(mixed[1], 1 - mixed[0])
        if mixture.box is None:
            blends.append(mixture.share)
        else:
            cuts += 1
            assert set(mixed.unique().tolist()) <= {0.0, 1.0}
    assert 120 < cuts < 180
    assert 0.4 < np.mean(blends) < 0.6 and np.var(blends) == pytest.approx(1 / 4 / (2 * 0.8 + 1), abs=0.02)
    assert mixup.draw_mixture(generator(0), 16, 0.0, 0.0) == (1.0, None)
    assert all(mixup.draw_mixture(generator(i), 16, 0.8, 0.0).box is None for i in range(20))
    assert all(mixup.draw_mixture(generator(i), 16, 0.0, 1.0).box is not None for i in range(20))


# --- the run ------------------------------------------------------------------------------------------------


def tuning(folder: Path, recipe: Recipe = QUICK, world: World = ALONE, batch: int = 6, **more) -> FineTuning:
    train, test = build_manifest(folder / "train"), build_manifest(folder / "val")
    labels = [torch.from_numpy(manifest.labels) for manifest in (train, test)]
    more = {"image_size": 24, "num_threads": 1, **more}
    return FineTuning(classifier(recipe), train, labels[0], test, labels[1], recipe, world, batch, **more)


def test_one_step_equals_adamw_by_hand(dataset):  # noqa: F811
    plain = Recipe(
        drop_path=0, smoothing=0, mixup=0, cutmix=0, erase=0, rand_augment=False, warmup_epochs=0, repeats=1
    )
    run = tuning(dataset, dataclasses.replace(plain, layer_decay=0.5, head_scale=1.0))
    start = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    crops, labels = next(run._crops(0))
    images = torch.stack([torch.from_numpy(crop).permute(2, 0, 1) for crop, _ in crops]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    loss = nn.functional.cross_entropy(run.model((images - mean) / std), labels)
    grads = dict(zip(start, torch.autograd.grad(loss, list(run.model.parameters())), strict=True))
    run.model.train()
    assert float(run._step(0, crops, labels)) == pytest.approx(loss.item(), rel=1e-5)
    rate = 5e-4 * 6 / 512
    for name, decay, scale in (
        ("head.weight", 0.05, 1.0),
        ("backbone.blocks.0.attn.qkv.weight", 0.05, 0.25),
        ("backbone.pos_embed", 0.0, 0.125),
    ):
        step = grads[name] / (grads[name].abs() + 1e-8)  # the first one of Adam
        expected = start[name] * (1 - rate * scale * decay) - rate * scale * step
        moved, wanted = run.model.get_parameter(name).detach() - start[name], expected - start[name]
        clear = grads[name].abs() > 1e-5
        torch.testing.assert_close(moved[clear], wanted[clear], rtol=0.05, atol=1e-8)


def test_it_learns_to_tell_dark_from_light(dataset):  # noqa: F811
    recipe = Recipe(
        epochs=12, lr=0.1, warmup_epochs=1, mixup=0, cutmix=0, rand_augment=False, erase=0, head_scale=1.0
    )
    history = tuning(dataset, recipe).run(val_freq=5)
    assert [entry["epoch"] for entry in history if "top1" in entry] == [1, 6, 11, 12]
    assert history[-1]["top1"] == 100.0 and history[-1]["loss"] < 0.6


class Crash(Exception):
    pass


def test_interrupted_and_resumed_equals_uninterrupted(dataset):  # noqa: F811
    whole = tuning(dataset, root=dataset / "whole", settings={"lr": 1})
    whole.run()

    def crash(entry):
        if entry["epoch"] == 2:
            raise Crash

    with pytest.raises(Crash):
        tuning(dataset, root=dataset / "cut", settings={"lr": 1}).run(on_epoch=crash)
    resumed = tuning(dataset, root=dataset / "cut", settings={"lr": 1})
    told: list[int] = []
    resumed.run(on_epoch=lambda entry: told.append(entry["epoch"]))
    assert told == [3, 4] and resumed.history == whole.history
    for name in ("model", "optimizer"):
        files = [dataset / run / "step-00000004" / f"{name}.safetensors" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="with lr 1, this run has 2"):
        tuning(dataset, root=dataset / "cut", settings={"lr": 2}).run()


def test_a_loss_that_is_not_finite_ends_it(dataset):  # noqa: F811
    with pytest.raises(ValueError, match="epoch 1 is not finite"):
        tuning(dataset, Recipe(epochs=1, lr=1e38, warmup_lr=1e30)).run()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run = tuning(Path(folder), PLAIN, World(rank, 2, torch.device("cpu")))
    history = run.run()
    torch.save((history, run.model.state_dict()), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# What is drawn once per process and step is off: then two processes see what one sees.
PLAIN = Recipe(epochs=2, lr=0.05, warmup_epochs=0, drop_path=0, mixup=0, cutmix=0, erase=0)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(dataset):  # noqa: F811
    spawn(worker, (str(dataset),), 2)
    (history, state), (other, same) = (torch.load(dataset / f"{rank}.pt") for rank in (0, 1))
    assert history == other and all(torch.equal(state[name], same[name]) for name in state)
    alone = tuning(dataset, PLAIN)
    for entry, expected in zip(history, alone.run(), strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    torch.testing.assert_close(state, alone.model.state_dict(), rtol=0.02, atol=2e-4)


def test_command(dataset, capsys):  # noqa: F811
    out = dataset / "out"
    words = ["--recipe", "cifar", "--epochs", "2", "--batch_size_per_gpu", "6", "--lr", "0.05"]
    words += ["--layer_decay", "0.75", "--output_dir", str(out)]
    assert main(line(dataset, "finetune", *words)) == 0
    shown = capsys.readouterr().out
    assert "14 training images, 6 held-out images, 2 classes" in shown and "Epoch 2: loss" in shown
    record = json.loads((out / "finetune.json").read_text())
    assert record["figures"].keys() == {"top1", "top5"} and record["figures"]["top5"] == 100.0
    assert record["settings"]["erase"] == 0 and record["settings"]["layer_decay"] == 0.75
    assert main(line(dataset, "finetune", *words)) == 0  # finished already
    assert "Epoch 2: loss" not in capsys.readouterr().out
    assert json.loads((out / "finetune.json").read_text())["figures"] == record["figures"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--smoothing", "2"], "--smoothing"),
        (["--lr", "-1"], "--lr"),
        (["--drop_path", "1"], "--drop_path"),
        (["--seed", "-1"], "--seed"),
        (["--batch_size_per_gpu", "15"], "15"),
    ],
)
def test_errors_are_one_line(dataset, words, message, capsys):  # noqa: F811
    assert main(line(dataset, "finetune", *words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
