"""EsViT against its formula, what is left of it without regions, and whole runs, staged ones among them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdino.config import (
    RESNETS,
    SWINS,
    Config,
    ConfigError,
    config_from_flags,
    layered,
    validate,
    with_flags,
)
from fastdino.data.loader import Crops
from fastdino.dryrun import estimate
from fastdino.engine import checkpoint
from fastdino.engine.build import build
from fastdino.engine.parallel import World
from fastdino.engine.schedules import Schedule
from fastdino.engine.trainer import Trainer
from fastdino.evaluation.__main__ import main as evaluate
from fastdino.interop.files import read_pickle
from fastdino.interop.official import export_checkpoint, import_checkpoint
from fastdino.interop.weights import load_backbone
from fastdino.methods import DINO, EsViT, build_method
from fastdino.models import SwinTransformer, VisionTransformer
from fastdino.presets import PRESETS
from fastdino.switches import matches_regions
from runs import spawn
from tests.engine.test_parallel import part
from tests.engine.test_step import B
from tests.methods.oracles import gradients, perturb
from tests.methods.test_runs import TINY, data  # noqa: F401

K, TEMP = 24, 0.06
NARROW = (8, (2, 2, 2, 2), 7)


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    monkeypatch.setitem(SWINS, "swin_tiny_w7", NARROW)
    monkeypatch.setitem(RESNETS, "resnet50", 4)


def configured(arch: str = "swin_tiny_w7", **flags) -> Config:
    """Crops of 64 and 32 pixels: 4 regions and 1 in a Swin or ResNet, 64 and 16 in a ViT."""
    sizes = dict(embed_dim=16, depth=2, num_heads=2, patch_size=8) if arch == "vit_tiny" else {}
    base = dict(method="esvit", arch=arch, out_dim=K, head_hidden_dim=16, bottleneck_dim=8)
    base |= dict(global_crops_size=64, local_crops_size=32, local_crops_number=2, norm_last_layer=False)
    base |= dict(batch_size_per_gpu=B, device="cpu", precision="fp32", drop_path_rate=0.0, lr=0.02)
    base |= dict(epochs=4, warmup_epochs=1, warmup_teacher_temp_epochs=2, teacher_temp=0.07)
    config = with_flags(Config(), base | sizes | flags)
    validate(config, 1)
    return config


def crops(config: Config, seed: int = 0, images: int = B) -> Crops:
    generator = torch.Generator().manual_seed(seed)
    sizes, number = config.crops, config.crops.local_crops_number
    shapes = [(2, sizes.global_crops_size), (number, sizes.local_crops_size)]
    views = [torch.randn(n * images, 3, size, size, generator=generator) for n, size in shapes]
    return Crops(views[0], views[1] if number else None, np.arange(images))


def moved(config: Config) -> EsViT:
    """A method in which nothing is equal by its initialisation."""
    torch.manual_seed(0)
    method = EsViT(config)
    perturb(method.student, 1)
    perturb(method.teacher, 2)
    generator = torch.Generator().manual_seed(3)
    for center in (method.center, method.center_grid):
        center.copy_(0.2 * torch.randn(K, generator=generator))
    return method


def views_of(model, batches: list[Tensor]) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Of every view its logits [B, K], and for every image the features [T, C] and logits [T, K] of its
    regions; crops of one size go through together, for the sake of batch norm.
    """
    found = []
    for batch in batches:
        features, (maps,) = model.backbone.forward_regions(batch)
        for f, m in zip(features.split(B), maps.split(B), strict=True):
            found.append((model.head(f), list(m), [model.head_dense(image) for image in m]))
    return found


def formula(method: EsViT, batch: Crops) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, signs, and means of the teacher's logits, one pair of views, image and region at a time."""
    batches = [batch.global_, *([] if batch.local is None else [batch.local])]
    with torch.no_grad():
        teacher = views_of(method.teacher, batches[:1])
    student = views_of(method.student, batches)
    losses, divergences = [], []

    def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * F.log_softmax(logits / 0.1, -1)).sum(-1)

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1)

    for g, (view, features, regions) in enumerate(teacher):
        p = ((view - method.center) / TEMP).softmax(-1)
        for v, (logits, own_features, own_regions) in enumerate(student):
            if g == v:
                continue
            m_r, kl_r = [], []
            for b in range(B):
                q = ((regions[b] - method.center_grid) / TEMP).softmax(-1)
                for z, region in zip(own_features[b], own_regions[b], strict=True):
                    best = F.cosine_similarity(z[None], features[b], dim=-1).argmax()
                    m_r.append(cross_entropy(q[best], region))
                    kl_r.append(m_r[-1] - entropy(q[best]))
            m_v = cross_entropy(p, logits)
            losses.append((m_v.mean() + torch.stack(m_r).mean()) / 2)
            divergences.append(torch.stack([(m_v - entropy(p)).mean(), torch.stack(kl_r).mean()]))
    kl = torch.stack(divergences).mean(0)
    signs, means = {"kl": kl[0], "region_kl": kl[1]}, []
    rows = torch.cat([view for view, _, _ in teacher]), torch.cat([x for *_, r in teacher for x in r])
    for name, x, center in zip(("teacher", "region"), rows, (method.center, method.center_grid), strict=True):
        signs[f"{name}_entropy"] = entropy(((x - center) / TEMP).softmax(-1)).mean()
        means.append(x.mean(0))
    return torch.stack(losses).mean(), signs, torch.cat(means)


@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("arch", ["swin_tiny_w7", "resnet50", "vit_tiny"])
def test_loss_and_gradients_are_those_of_the_formula(arch, local):
    config = configured(arch, local_crops_number=local)
    method, batch = moved(config), crops(config)
    wide = copy.deepcopy(method).double()
    out = method(batch.global_, batch.local, teacher_temp=torch.tensor(TEMP), freeze_last_layer=False)
    double = Crops(batch.global_.double(), None if batch.local is None else batch.local.double(), batch.ids)
    loss, signs, means = formula(wide, double)
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-5, atol=0)
    ours, expected = gradients(method.student, out.loss), gradients(wide.student, loss)
    # Batch norm over few places multiplies the rounding errors of fp32 on the way down.
    resnet = arch == "resnet50"
    for name in [name for name in expected if not resnet or name.startswith("head")]:
        error = (ours[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < (2e-3 if resnet else 2e-5), name
    for name in ("head", "head_dense"):
        assert expected[f"{name}.last_layer.weight_v"].abs().max() > 1e-3
    torch.testing.assert_close(out.statistics.double(), means, rtol=1e-4, atol=1e-5)
    assert out.signs.keys() == signs.keys() == set(EsViT.signs)
    for name, value in signs.items():
        torch.testing.assert_close(out.signs[name].double(), value.detach(), rtol=1e-4, atol=1e-5)


def test_one_region_per_view_is_the_loss_of_views():
    """Crops of 32 pixels have a single region in a Swin, whose features are the view's."""
    config = configured(global_crops_size=32, local_crops_size=16)
    method, batch = moved(config), crops(config)
    for model in (method.student, method.teacher):
        model.head_dense.load_state_dict(model.head.state_dict())
    method.center_grid.copy_(method.center)
    dino = DINO(with_flags(config, {"method": "dino"}))
    state = {k: v for k, v in method.state_dict().items() if "head_dense" not in k and k != "center_grid"}
    dino.load_state_dict(state)
    how = dict(teacher_temp=TEMP, freeze_last_layer=False)
    ours, theirs = (m(batch.global_, batch.local, **how) for m in (method, dino))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(*ours.statistics.chunk(2))
    torch.testing.assert_close(ours.signs["region_kl"], theirs.signs["kl"], rtol=1e-4, atol=1e-5)
    a, b = gradients(method.student, ours.loss), gradients(dino.student, theirs.loss)
    for name in ("backbone.norm.weight", "backbone.layers.0.blocks.1.mlp.fc1.weight"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    for name in ("mlp.0.weight", "last_layer.weight_v"):
        torch.testing.assert_close(a[f"head.{name}"], b[f"head.{name}"] / 2, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a[f"head_dense.{name}"], b[f"head.{name}"] / 2, rtol=1e-3, atol=1e-5)


def test_crops_of_one_size():
    config = configured(local_crops_size=64)
    batch = crops(config)
    numbers = moved(config).student.features([batch.global_, batch.local], B).numbers
    assert numbers == [4, 4, 4, 4]


def test_without_regions_it_is_dino():
    config = configured(use_dense_prediction=False)
    torch.manual_seed(0)
    method = build_method(config)
    torch.manual_seed(0)
    dino = DINO(with_flags(config, {"method": "dino"}))
    assert isinstance(method, DINO) and method.state_dict().keys() == dino.state_dict().keys()
    batch = crops(config)
    how = dict(teacher_temp=TEMP, freeze_last_layer=False)
    assert torch.equal(*(m(batch.global_, batch.local, **how).loss for m in (method, dino)))


def test_both_centers_follow_unless_the_step_is_skipped():
    method = moved(configured())
    before, means = torch.cat([method.center, method.center_grid]), torch.randn(2 * K)
    method.update(means, torch.tensor(True))
    assert torch.equal(torch.cat([method.center, method.center_grid]), before)
    method.update(means, torch.tensor(False))
    after = torch.cat([method.center, method.center_grid])
    torch.testing.assert_close(after, 0.9 * before + 0.1 * means)


def test_both_last_layers_are_frozen_at_first():
    config = configured(drop_path_rate=0.1)
    engine, batch = build(config), crops(config)
    method, updater = engine.method, engine.updater
    assert isinstance(method, EsViT) and len(updater.last_layer) == 4
    assert (method.student.backbone.drop_path_rate, method.teacher.backbone.drop_path_rate) == (0.1, 0.0)
    for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    schedule = Schedule(config, 2, B)
    names = ("head.last_layer.weight_v", "head_dense.last_layer.weight_v", "head_dense.mlp.0.weight")
    start = [method.student.get_parameter(name).detach().clone() for name in names]
    for step, moves in ((1, [False, False, True]), (2, [True, True, True])):
        assert not engine.step.run(iter([batch]), schedule(step)).skipped
        now = [method.student.get_parameter(name) for name in names]
        assert [not torch.equal(a, b) for a, b in zip(start, now, strict=True)] == moves
    teacher = method.teacher.get_parameter("head_dense.last_layer.weight_v")
    assert not torch.equal(teacher, start[1]) and not torch.equal(teacher, now[1])


def test_a_bad_step_changes_nothing():
    config = configured()
    engine = build(config)
    state = {k: v.clone() for k, v in engine.state().items()}
    bad = crops(config)
    bad.local[0, 0, 3, 3] = float("inf")
    assert engine.step.run(iter([bad]), Schedule(config, 2, B)(3)).skipped
    assert all(torch.equal(v, state[k]) for k, v in engine.state().items())


def test_tokens_of_a_vit_are_its_regions():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2).eval()
    images = [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32), torch.randn(3, 3, 16, 24)]
    features, regions = model.forward_regions(images)
    torch.testing.assert_close(features, model(images))
    assert [tuple(part.shape) for part in regions] == [(3, 16, 16), (3, 6, 16)]
    for tokens, batch in zip(regions, (torch.cat(images[:2]), images[2]), strict=True):
        torch.testing.assert_close(tokens, model.get_intermediate_layers(batch)[0][:, 1:])
    model.checkpointing = "full"
    again, parts = model.train().forward_regions(images)
    torch.testing.assert_close(again, features)
    sum(tokens.sum() for tokens in parts).backward()
    assert model.blocks[1].mlp.fc1.weight.grad is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "dino", "use_dense_prediction": True}, "use_dense_prediction: expected none or false"),
        ({"predictor": "on"}, "predictor: expected auto or off with --method esvit"),
        ({"loss": "mse"}, "loss: expected none with --method esvit"),
        ({"teacher_op": "sinkhorn"}, "teacher_op: expected none with --method esvit"),
        (
            {"teacher_temp": 0.0, "warmup_teacher_temp_epochs": 0},
            "teacher_temp: expected a number > 0 with --method esvit",
        ),
        ({"queue_length": 64}, "queue_length: expected 0 or none"),
    ],
)
def test_switches_that_it_does_not_have_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        configured(**flags)


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("arch", ["vit_tiny", "swin_tiny_w7"])
def test_the_dry_run_counts_both_heads(arch, norm_last_layer):
    config = configured(arch, norm_last_layer=norm_last_layer)
    student, found = EsViT(config).student, estimate(config, None)
    heads = [*student.head.parameters(), *student.head_dense.parameters()]
    assert found.head_parameters == sum(p.numel() for p in heads)
    trained = sum(p.numel() for p in heads if p.requires_grad)
    assert found.trainable_parameters - found.backbone_parameters == trained
    view = estimate(configured(arch, use_dense_prediction=False), None)
    products = 16 * student.backbone.embed_dim + 16 * 16 + 16 * 8 + 8 * K
    regions = {"vit_tiny": (64, 16), "swin_tiny_w7": (4, 1)}[arch]
    rows = 2 * 4 * regions[0] + 2 * 3 * regions[1]  # student three times a forward pass, teacher once
    assert found.flops_per_image - view.flops_per_image == pytest.approx(2.0 * products * rows)
    assert found.loss_bytes > view.loss_bytes and found.state_bytes > view.state_bytes


def test_presets_are_the_rows_of_the_table():
    names = [f"esvit-swin-{size}-w{window}" for size in "tsb" for window in (7, 14)]
    assert {name for name in PRESETS if name.startswith("esvit")} == {*names, *(f"{n}-view" for n in names)}
    for name in names:
        dense, view = layered(name, None), layered(f"{name}-view", None)
        size, window = name[11], name.partition("-w")[2]
        assert dense.model.arch == f"swin_{dict(t='tiny', s='small', b='base')[size]}_w{window}"
        assert dense.model.drop_path_rate == (0.1 if size == "t" else 0.2)
        assert matches_regions(dense) and not matches_regions(view) and not view.model.norm_last_layer
        assert dense.model.norm_last_layer == (name == "esvit-swin-b-w14")
        optim, loss, crops = dense.optim, dense.loss, dense.crops
        assert optim.lr * optim.batch_size / 256 == 1e-3 and (optim.epochs, optim.clip_grad) == (300, 3.0)
        assert (loss.warmup_teacher_temp, loss.teacher_temp, loss.warmup_teacher_temp_epochs) == (
            0.04,
            0.07,
            30,
        )
        assert (crops.local_crops_number, crops.global_crops_scale) == (8, (0.4, 1.0))


def together(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    SWINS["swin_tiny_w7"] = NARROW
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    config = configured()
    engine = build(config, World(rank, size, torch.device("cpu")))
    losses = [
        engine.step.run(iter([part(crops(config, s, size * B), rank, size)]), Schedule(config, 2, B)(s)).loss
        for s in range(4)
    ]
    torch.save((losses, engine.state()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_are_one_with_their_batch(tmp_path: Path):
    spawn(together, (2, str(tmp_path)), 2)
    (losses, one), (others, two) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert losses == others and all(torch.equal(v, two[k]) for k, v in one.items())
    config = configured()
    whole = build(config)
    expected = [
        whole.step.run(iter([crops(config, s, 2 * B)]), Schedule(config, 2, B)(s)).loss for s in range(4)
    ]
    assert losses == pytest.approx(expected, rel=1e-3)
    for name in ("center", "center_grid"):
        assert one[name].abs().max() > 0
        torch.testing.assert_close(one[name], whole.state()[name], rtol=1e-2, atol=1e-4)


SWIN = {
    **{k: v for k, v in TINY.items() if k not in ("embed_dim", "depth", "num_heads", "patch_size")},
    "arch": "swin_tiny_w7",
    "method": "esvit",
    "global_crops_size": 64,
    "local_crops_size": 32,
}


def run(data, out, **flags) -> Trainer:  # noqa: F811
    trainer = Trainer(config_from_flags(**SWIN | flags, data_path=data / "train", output_dir=out))
    trainer.fit()
    return trainer


def final(out):
    return checkpoint.load(checkpoint.latest(out / "checkpoints"))


def test_a_run_resumes_exactly_and_is_evaluated(data, tmp_path):  # noqa: F811
    whole = run(data, tmp_path / "whole", max_steps=4)
    run(data, tmp_path / "parts", max_steps=2)
    run(data, tmp_path / "parts", max_steps=4)
    for one, two in zip(final(tmp_path / "whole")[:2], final(tmp_path / "parts")[:2], strict=True):
        assert one.keys() == two.keys() and [k for k in one if not torch.equal(one[k], two[k])] == []
    record = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(EsViT.signs) <= record.keys()
    loaded = load_backbone(tmp_path / "whole")
    assert isinstance(loaded, SwinTransformer)
    expected = whole.method.teacher.backbone.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    line = ["knn", "--weights", str(tmp_path / "whole"), "--data_path", str(data), "--image_size", "64"]
    line += ["--nb_knn", "5", "--device", "cpu", "--precision", "fp32", "--num_workers", "1"]
    assert evaluate([*line, "--output_dir", str(tmp_path / "knn")]) == 0
    assert json.loads((tmp_path / "knn" / "knn.json").read_text())["figures"]
    export_checkpoint(tmp_path / "whole", tmp_path / "a.pth")
    contents = read_pickle(tmp_path / "a.pth")
    assert list(contents["dino_loss"]) == ["center", "center_grid"]
    assert "module.head_dense.last_layer.weight_v" in contents["student"]
    assert "patch_embed.proj.weight" in contents["teacher"]


@pytest.mark.parametrize("began", [{"method": "dino"}, {"use_dense_prediction": False}], ids=str)
def test_regions_after_views_alone(data, tmp_path, began):  # noqa: F811
    """Three steps per epoch: one epoch of views, one with regions."""
    run(data, tmp_path / "view", max_steps=3, **began)
    import_checkpoint(tmp_path / "view", tmp_path / "dense", method="esvit")
    before, optimizer, meta = final(tmp_path / "dense")
    assert meta["epoch"] == 1 and optimizer == {}
    flags = dict(config=tmp_path / "dense" / "config.yaml", data_path=data / "train", max_steps=6)
    trainer = Trainer(config_from_flags(**flags))
    assert trainer.step == 3 and isinstance(trainer.method, EsViT)
    view = final(tmp_path / "view")[0]
    state = trainer.method.state_dict()
    assert all(torch.equal(state[name], value) for name, value in view.items())
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "dense" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1]
    after = final(tmp_path / "dense")[0]
    assert not torch.equal(after["center_grid"], before["center_grid"])
    with pytest.raises(checkpoint.CheckpointError, match="--method: checkpoint 'esvit', now 'dino'"):
        Trainer(config_from_flags(**flags, method="dino", use_dense_prediction=None))
