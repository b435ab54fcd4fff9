"""EsViT's training files, written from the description of their layout: through our format and back, to the
bit, and on from whole views to regions.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdino.config import (
    RESNETS,
    SWINS,
    Config,
    config_from_dict,
    config_to_dict,
    validate,
    with_flags,
)
from fastdino.engine import checkpoint
from fastdino.engine.build import build
from fastdino.interop.files import WeightsError, read_pickle
from fastdino.interop.official import (
    _flags,
    export_checkpoint,
    import_checkpoint,
    main,
    read_official,
    to_native,
    with_dense_head,
)
from fastdino.interop.weights import load_backbone
from tests.interop.test_other_backbones import prefixed, resnet, swin

K, HIDDEN, BOTTLENECK, WIDTH = 12, 16, 8, 32


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    """Files of 20 MB instead of 700."""
    for window in (7, 14):
        monkeypatch.setitem(SWINS, f"swin_tiny_w{window}", (WIDTH, (1, 1, 1, 1), window))


def heads(width: int, names: tuple[str, ...], seed: int) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"mlp.0.weight": (HIDDEN, width), "mlp.0.bias": (HIDDEN,)}
    shapes |= {"mlp.2.weight": (HIDDEN, HIDDEN), "mlp.2.bias": (HIDDEN,)}
    shapes |= {"mlp.4.weight": (BOTTLENECK, HIDDEN), "mlp.4.bias": (BOTTLENECK,)}
    shapes |= {"last_layer.weight_g": (K, 1), "last_layer.weight_v": (K, BOTTLENECK)}
    return OrderedDict(
        (f"{name}.{k}", torch.randn(v, generator=generator)) for name in names for k, v in shapes.items()
    )


def training_file(dense: bool = True, window: int = 7, **changes: Any) -> dict[str, Any]:
    """What EsViT saves of a Swin after two epochs."""
    names = ("head", "head_dense") if dense else ("head",)
    state = [
        OrderedDict(swin(window, WIDTH, (1, 1, 1, 1), seed=seed) | heads(8 * WIDTH, names, seed + 5))
        for seed in range(2)
    ]
    trained = [(n, p) for n, p in state[0].items() if p.is_floating_point()]
    decayed = [(n, p) for n, p in trained if p.ndim > 1 and not n.endswith(".bias")]
    plain = [(n, p) for n, p in trained if p.ndim == 1 or n.endswith(".bias")]
    generator = torch.Generator().manual_seed(9)
    moments = {
        i: {
            "step": torch.tensor(2502.0),
            "exp_avg": torch.randn(p.shape, generator=generator),
            "exp_avg_sq": torch.rand(p.shape, generator=generator),
        }
        for i, (_, p) in enumerate(decayed + plain)
    }
    settings = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    numbers = list(range(len(trained)))
    groups = [
        {**settings, "weight_decay": 0.0401, "params": numbers[: len(decayed)]},
        {**settings, "weight_decay": 0.0, "params": numbers[len(decayed) :]},
    ]
    args = argparse.Namespace(
        cfg=f"experiments/imagenet/swin/swin_tiny_patch4_window{window}_224.yaml",
        arch="swin_tiny",
        patch_size=16,
        out_dim=K,
        norm_last_layer=False,
        use_dense_prediction=dense,
        local_crops_number=(8,),
        local_crops_size=[96],
        aug_opt="dino_aug",
        use_mixup=False,
        teacher_temp=0.07,
        epochs=300,
        seed=3,
        world_size=16,
        opts=[],
        head_hidden_dim=HIDDEN,
        bottleneck_dim=BOTTLENECK,
    )
    for name, value in changes.items():
        setattr(args, name, value)
    centers = OrderedDict(center=torch.randn(1, K, generator=generator))
    if dense:
        centers["center_grid"] = torch.randn(1, K, generator=generator)
    return {
        "student": OrderedDict(prefixed("module.", state[0])),
        "teacher": state[1],
        "optimizer": {"state": moments, "param_groups": groups},
        "epoch": 2,
        "args": args,
        "dino_loss": centers,
    }


@pytest.mark.parametrize("window", [7, 14])
def test_round_trip_is_bitwise(tmp_path, layout, window) -> None:
    contents = training_file(window=window)
    torch.save(contents, tmp_path / "a.pth")
    assert main(["import", str(tmp_path / "a.pth"), str(tmp_path / "run")]) == 0
    model, optimizer, meta = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    config = config_from_dict(meta["config"])
    assert (config.model.arch, config.method.method) == (f"swin_tiny_w{window}", "esvit")
    assert (config.crops.local_crops_number, config.crops.local_crops_size) == (8, 96)
    assert config.model.drop_path_rate == 0.1
    validate(config, 1)
    for name in ("center", "center_grid"):
        assert torch.equal(model[name], contents["dino_loss"][name][0])
    key = "head_dense.last_layer.weight_v"
    assert torch.equal(model[f"teacher.{key}"], contents["teacher"][key])
    names = [n.removeprefix("module.") for n, p in contents["student"].items() if p.is_floating_point()]
    decayed = [n for n in names if contents["teacher"][n].ndim > 1]
    moments = contents["optimizer"]["state"][decayed.index(key)]
    assert torch.equal(optimizer[f"exp_avg.{key}"], moments["exp_avg"])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "b.pth")]) == 0
    layout.assert_same(contents, read_pickle(tmp_path / "b.pth"))
    expected = swin(window, WIDTH, (1, 1, 1, 1), seed=1)
    loaded = load_backbone(tmp_path / "run").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_views_alone_are_a_run_of_dino(tmp_path, layout) -> None:
    contents = training_file(dense=False)
    torch.save(contents, tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "run")
    _, _, meta = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert config_from_dict(meta["config"]).method.method == "dino"
    export_checkpoint(tmp_path / "run", tmp_path / "b.pth")
    layout.assert_same(contents, read_pickle(tmp_path / "b.pth"))


@pytest.mark.parametrize("norm", [None, "true"])
def test_regions_begin_with_a_fresh_head_and_without_optimizer_state(tmp_path, norm) -> None:
    contents = training_file(dense=False)
    torch.save(contents, tmp_path / "view.pth")
    line = ["import", str(tmp_path / "view.pth"), str(tmp_path / "run"), "--method", "esvit"]
    before = torch.random.get_rng_state()
    assert main(line + (["--norm_last_layer", norm] if norm else [])) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    model, optimizer, meta = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    config = config_from_dict(meta["config"])
    validate(config, 1)
    assert config.method.method == "esvit" and config.model.norm_last_layer == (norm == "true")
    assert optimizer == {} and meta["epoch"] == 2
    assert torch.equal(model["center"], contents["dino_loss"]["center"][0])
    assert torch.equal(model["center_grid"], torch.zeros(K))
    for name, value in contents["teacher"].items():
        ours = name if name.startswith("head.") else f"backbone.{name}"
        assert torch.equal(model[f"teacher.{ours}"], value), name
    dense = [name for name in model if name.startswith("student.head_dense.")]
    assert len(dense) == 8
    for name in dense:
        assert torch.equal(model[name], model[name.replace("student", "teacher")])
    weight = "student.head_dense.last_layer.weight_"
    assert model[f"{weight}v"].std() > 0 and model[f"{weight}g"].eq(1).all()
    engine = build(config)
    engine.load_state(model)
    engine.updater.load_state(optimizer)

    export_checkpoint(tmp_path / "run", tmp_path / "dense.pth")
    again, _, _ = to_native(read_official(tmp_path / "dense.pth"))
    assert again.keys() == model.keys() and all(torch.equal(again[k], model[k]) for k in model)
    with pytest.raises(WeightsError, match="has a dense head already"):
        with_dense_head(read_official(tmp_path / "dense.pth"))


def test_a_large_swin_has_the_depth_of_its_file() -> None:
    contents = training_file(arch="swin_small")
    state = {k.removeprefix("module."): v for k, v in contents["student"].items()}
    state = {f"backbone.{k}": v for k, v in state.items()}
    assert _flags(vars(contents["args"]), state)["drop_path_rate"] == 0.2


def test_a_resnet_is_wrapped_twice(tmp_path) -> None:
    names = heads(128, ("head", "head_dense"), 1)
    contents = {
        "student": prefixed("module.", prefixed("backbone.backbone.", resnet()) | names),
        "teacher": prefixed("module.", prefixed("backbone.backbone.", resnet(seed=1)) | names),
    }
    torch.save(contents, tmp_path / "a.pth")
    found = read_official(tmp_path / "a.pth")
    assert found.student is not None
    assert found.student.keys() == (prefixed("backbone.", resnet()) | names).keys()


@pytest.mark.parametrize(
    ("arch", "first", "wrapped"),
    [
        ("resnet50", "module.backbone.backbone.conv1.weight", True),
        ("vit_tiny", "module.cls_token", False),
        ("swin_tiny_w7", "module.patch_embed.proj.weight", False),
    ],
)
def test_our_runs_there_and_back(tmp_path, monkeypatch, arch, first, wrapped) -> None:
    monkeypatch.setitem(RESNETS, "resnet50", 4)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 1} if arch == "vit_tiny" else {}
    sizes = {"out_dim": K, "head_hidden_dim": HIDDEN, "bottleneck_dim": BOTTLENECK, "batch_size_per_gpu": 2}
    config = with_flags(Config(), {"method": "esvit", "arch": arch, "device": "cpu", **small, **sizes})
    state = {name: value.clone() for name, value in build(config).state().items()}
    meta = {
        "config": config_to_dict(config),
        "identity": {"global batch": 64},
        "epoch": 1,
        "step": 10,
        "steps_per_epoch": 10,
        "scaler": None,
    }
    checkpoint.save(tmp_path / "run" / "checkpoints", 10, state, {}, meta)
    export_checkpoint(tmp_path / "run", tmp_path / "a.pth")
    contents = read_pickle(tmp_path / "a.pth")
    assert next(iter(contents["student"])) == first
    assert all(name.startswith("module.") == wrapped for name in contents["teacher"])
    back, _, meta = to_native(read_official(tmp_path / "a.pth"))
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    assert config_from_dict(meta["config"]) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mixup": True}, "expected DINO's augmentation without mixup"),
        ({"aug_opt": "deit_aug"}, "expected DINO's augmentation without mixup, got deit_aug"),
        ({"local_crops_number": (4, 4)}, "local_crops_number: expected an integer"),
        ({"arch": "cvt_tiny"}, "expected one of vit_tiny"),
    ],
)
def test_runs_that_do_not_exist_here_are_refused(tmp_path, changes, message) -> None:
    torch.save(training_file(**changes), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        to_native(read_official(tmp_path / "a.pth"))


def test_missing_and_misplaced_parts_are_named(tmp_path, capsys) -> None:
    contents = training_file()
    del contents["dino_loss"]["center_grid"]
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="center_grid is missing, --out_dim is 12"):
        to_native(read_official(tmp_path / "a.pth"))
    for line, message in (
        ("import a b --norm_last_layer true", "only with --method esvit"),
        ("import a b --method esvit --norm_last_layer maybe", "expected true or false, got 'maybe'"),
    ):
        with pytest.raises(SystemExit):
            main(line.split())
        assert message in capsys.readouterr().err
