"""Weights to safetensors and to the folders of timm and transformers and back, without either library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import fastdino
from fastdino.config import RESNETS, Config, config_to_dict
from fastdino.engine import checkpoint
from fastdino.interop.__main__ import main
from fastdino.interop.files import WeightsError, read_pickle
from fastdino.interop.foreign import from_hf, to_hf
from fastdino.interop.weights import load_backbone
from fastdino.models import ResNet, SwinTransformer, VisionTransformer, build_model


def config(**model: object) -> Config:
    made = Config()
    sizes = {"arch": "vit_tiny", "embed_dim": 40, "depth": 2, "num_heads": 5, "patch_size": 8}
    for name, value in {**sizes, "out_dim": 8, "head_hidden_dim": 8, **model}.items():
        setattr(made.model, name, value)
    made.crops.global_crops_size = 32
    made.data.data_path, made.run.output_dir = "/private/photos", "/private/run"
    return made


def run_directory(path: Path) -> None:
    """A run whose heads are not as wide as those of official models."""
    made = config()
    torch.manual_seed(0)
    module = build_model(made.model, img_size=32)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no zeros and ones that would hide a term
    state = module.state_dict()
    tensors = {f"{who}.{k}": v.clone() for who in ("student", "teacher") for k, v in state.items()}
    tensors["student.backbone.cls_token"] += 1
    identity = {"global batch": 16, "list of images": "0123456789abcdef"}
    meta = {"config": config_to_dict(made), "identity": identity, "epoch": 1, "steps_per_epoch": 5}
    checkpoint.save(path / "checkpoints", 5, tensors, {}, meta)
    facts = {"commit": "abc1234", "images": 80, "device": "a machine"}
    (path / "environment.json").write_text(json.dumps(facts))


def export(kind: str, source: Path, target: Path, *flags: str) -> Path:
    assert main([kind, "export", str(source), str(target), *flags]) == 0
    return target


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    run_directory(path)
    return path


def test_every_source_gives_the_same_features(tmp_path, run) -> None:
    made, module = config(), load_backbone(run)
    folder, hf, file = tmp_path / "timm", tmp_path / "hf", tmp_path / "a.safetensors"
    for kind, target in (("timm", folder), ("hf", hf), ("safetensors", file)):
        export(kind, run, target)
    state = module.state_dict()
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "ddp.pth")
    torch.save(to_hf(state), tmp_path / "hf.pth")
    images = torch.randn(2, 3, 32, 40)
    for source in (folder, folder / "model.safetensors", hf, hf / "model.safetensors", file):
        loaded = load_backbone(source)
        assert loaded.num_heads == made.model.num_heads and not loaded.training
        assert torch.equal(loaded(images), module(images)), source
    for source in (tmp_path / "ddp.pth", tmp_path / "hf.pth"):
        with pytest.raises(WeightsError, match="the number of heads is not known"):
            load_backbone(source)
    student = load_backbone(run, key="student")
    export("timm", run, tmp_path / "student", "--checkpoint_key", "student")
    assert torch.equal(load_backbone(tmp_path / "student")(images), student(images))
    assert not torch.equal(student(images), module(images))


def test_one_format_after_another_changes_no_bit(tmp_path, run) -> None:
    export("hf", run, tmp_path / "hf")
    export("timm", tmp_path / "hf", tmp_path / "timm")
    export("safetensors", tmp_path / "timm", tmp_path / "a.safetensors")
    state = load_backbone(run).state_dict()
    assert load_file(tmp_path / "a.safetensors").keys() == state.keys()
    for path in (tmp_path / "timm" / "model.safetensors", tmp_path / "a.safetensors"):
        assert all(torch.equal(value, state[name]) for name, value in load_file(path).items())
    facts = [metadata(tmp_path / name) for name in ("hf/model.safetensors", "a.safetensors")]
    assert facts[0] == facts[1]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_metadata_say_where_the_weights_come_from_but_not_on_which_disk(tmp_path, run) -> None:
    export("safetensors", run, tmp_path / "a.safetensors")
    facts = metadata(tmp_path / "a.safetensors")
    stored = json.loads(facts.pop("fastdino.config"))
    assert stored["model"]["num_heads"] == 5 and "/private" not in json.dumps(stored)
    assert facts == {
        "format": "pt",
        "fastdino.version": fastdino.__version__,
        "fastdino.source": f"{run.name}, step-00000005, teacher",
        "fastdino.step": "5",
        "fastdino.images_seen": "80",
        "fastdino.image_list": "0123456789abcdef",
        "fastdino.commit": "abc1234",
        "fastdino.images": "80",
    }


def test_names_of_transformers(layout) -> None:
    state = layout.backbone()
    theirs = to_hf(state)
    assert len(theirs) == 198 and theirs["encoder.layer.11.attention.attention.value.bias"].shape == (192,)
    rows = state["blocks.3.attn.qkv.weight"]
    for i, part in enumerate(("query", "key", "value")):
        weight = theirs[f"encoder.layer.3.attention.attention.{part}.weight"]
        assert torch.equal(weight, rows[192 * i : 192 * (i + 1)])
    assert torch.equal(theirs["encoder.layer.0.output.dense.bias"], state["blocks.0.mlp.fc2.bias"])
    extra = {"pooler.dense.weight": torch.ones(1), "classifier.bias": torch.ones(1)}
    back = from_hf({f"vit.{k}": v for k, v in theirs.items()} | extra, Path("file"))
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_positions_at_another_size_are_the_official_ones(tmp_path, run) -> None:
    module = load_backbone(run)
    for kind in ("timm", "hf", "safetensors"):
        source = export(kind, run, tmp_path / kind, "--image_size", "48")
        loaded = load_backbone(source)
        assert torch.equal(loaded.pos_embed, module.interpolate_pos_encoding(48, 48))
        images = torch.randn(1, 3, 48, 48)
        torch.testing.assert_close(loaded(images), module(images))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["image_size"] == 48
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["img_size"] == 48


def saved(path: Path, model: torch.nn.Module) -> Path:
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("hf export resnet.pth out", "expected a ViT for transformers, got resnet"),
        ("timm export resnet.pth out", "timm has ViTs and the ResNet-50, no wider ones; got resnet"),
        ("timm export swin.pth out", "and of Swins one with another epsilon; got swin"),
        (
            "timm export run out --image_size 30",
            "expected a multiple of the patch size 8, got 30",
        ),
        ("timm export run out --image_size 0", "--image_size: expected a positive number, got 0"),
        ("timm export run full", "full: expected a new or empty folder to write to"),
        ("safetensors export run full", "full: expected a file to write"),
        ("timm export nothing out", "nothing"),
        ("timm export run out --results resnet.pth", "resnet.pth: not a result of fastdino.evaluation"),
        ("timm import run run", "run: already holds checkpoints"),
        ("timm import chans.pth out", "no run can begin with it: --in_chans: expected 3"),
        ("timm import wide.pth out", "--arch: expected MLPs 4 times as wide as the tokens, got 2 times"),
        ("hf import resnet.pth out", "--arch has no name for a resnet"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path, monkeypatch, capsys, run, command, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    saved(tmp_path / "resnet.pth", ResNet(4))
    saved(tmp_path / "swin.pth", SwinTransformer(8, (1, 1, 1, 1)))
    saved(tmp_path / "chans.pth", VisionTransformer(16, 8, 5, 64, 1, 1))
    saved(tmp_path / "wide.pth", VisionTransformer(16, 8, 3, 64, 1, 1, mlp_ratio=2.0))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_folders_that_compute_something_else_are_refused(tmp_path, run) -> None:
    export("hf", run, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"hidden_act": "quick_gelu"}, "hidden_act: expected gelu, got 'quick_gelu'"),
        ({"num_attention_heads": 7}, "expected heads that divide the width 40, got 7"),
        ({"num_attention_heads": "5"}, "expected heads that divide the width 40, got '5'"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(WeightsError, match=message):
            load_backbone(tmp_path / "hf")
    path.write_text("{")
    with pytest.raises(WeightsError, match="config.json: not JSON"):
        load_backbone(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.1.attention.attention.key.bias": None}, "missing key of blocks.1.attn.qkv.bias"),
        (
            {"embeddings.distillation_token": torch.ones(1)},
            "distillation_token has no place in a ViT",
        ),
        ({"layernorm.bias": None}, "not the weights of a ViT: missing: norm.bias"),
        ({"layernorm.bias": "text"}, "expected tensors by name, got str under 'layernorm.bias'"),
    ],
)
def test_weights_of_transformers_that_do_not_fit(tmp_path, change, message) -> None:
    whole = to_hf(VisionTransformer(16, 8, 3, 64, 2, 1).state_dict())
    state = {k: v for k, v in {**whole, **change}.items() if v is not None}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=f"odd.pth: .*{message}"):
        load_backbone(tmp_path / "odd.pth")


def test_damaged_safetensors(tmp_path, run) -> None:
    data = export("safetensors", run, tmp_path / "a.safetensors").read_bytes()
    for number, cut in enumerate((data[:-1], data[:100], data[:12], data[:8] + b'{"' + data[11:])):
        (tmp_path / f"{number}.safetensors").write_bytes(cut)
        with pytest.raises(WeightsError, match=f"{number}.safetensors: not a safetensors file, or damaged"):
            load_backbone(tmp_path / f"{number}.safetensors")


def test_metadata_of_others_are_not_believed(tmp_path, run) -> None:
    from fastdino.interop.files import write_safetensors

    state = load_backbone(run).state_dict()
    for config in ("", "[]", '{"model": 3}', '{"model": {"num_heads": "x"}}', '{"model": {"arch": []}}'):
        write_safetensors(tmp_path / "a.safetensors", state, {"fastdino.config": config})
        with pytest.raises(WeightsError, match="the number of heads is not known"):
            load_backbone(tmp_path / "a.safetensors")


def test_training_begins_with_an_imported_backbone(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    vit = VisionTransformer(32, 8, 3, 64, 2, 1)
    source = export("hf", saved(tmp_path / "a.pth", vit), tmp_path / "hf")
    (tmp_path / "flags.yaml").write_text("out_dim: 12\nhead_hidden_dim: 8\n")
    out = tmp_path / "run"
    assert main(["hf", "import", str(source), str(out), "--config", str(tmp_path / "flags.yaml")]) == 0
    said = capsys.readouterr().out
    assert "a new run that begins with this ViT 64x2/8, a fresh head and no optimizer state" in said
    tensors, optimizer, meta = checkpoint.load(out / "checkpoints" / "step-00000000")
    assert not optimizer and meta["began_with"] == "a.pth"
    for name, value in vit.state_dict().items():
        assert torch.equal(tensors[f"student.backbone.{name}"], value)
        assert torch.equal(tensors[f"teacher.backbone.{name}"], value)
    assert not tensors["center"].any() and tensors["student.head.last_layer.weight_v"].shape == (12, 256)
    with pytest.raises(WeightsError, match="imported and has not been trained since"):
        from fastdino.interop.official import export_checkpoint

        export_checkpoint(out, tmp_path / "b.pth")
    flags = dict(batch_size_per_gpu=2, warmup_epochs=0, epochs=1, local_crops_number=2, local_crops_size=16)
    flags |= dict(num_workers=1, device="cpu", precision="fp32", logger="none", report=False, lr=1e-6)
    fastdino.train(data=str(tmp_path / "images"), out=str(out), config=str(out / "config.yaml"), **flags)
    trained = load_backbone(out, key="student").blocks[0].mlp.fc1.weight
    assert 0 < (trained - vit.blocks[0].mlp.fc1.weight).abs().max() < 1e-6
    assert export_checkpoint(out, tmp_path / "b.pth")
    assert read_pickle(tmp_path / "b.pth")["epoch"] == 1


def test_import_of_a_resnet_for_another_method(tmp_path, monkeypatch) -> None:
    from fastdino.interop.source import Source
    from fastdino.interop.start import start_run

    monkeypatch.setitem(RESNETS, "resnet50", 4)
    resnet = ResNet(4)
    made = config(arch="vit_small")
    made.method.method, made.method.hidden_mlp, made.method.feat_dim = "byol", 8, 8
    made.method.predictor_hidden_dim = 8
    source = Source(tmp_path, resnet, 224, {"fastdino.source": "here"}, None)
    start_run(source, tmp_path / "run", made)
    assert torch.equal(load_backbone(tmp_path / "run").conv1.weight, resnet.conv1.weight)


def test_help_of_every_format() -> None:
    """The list of formats without torch, the flags of each with it."""
    code = (
        "import sys; from fastdino.interop.__main__ import parser; parser(None).format_help();"
        "sys.exit(', '.join({'torch', 'numpy', 'transformers', 'timm'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for kind in ("timm", "hf", "safetensors", "onnx"):
        for command in ("export", "import"):
            if (kind, command) != ("onnx", "import"):
                with pytest.raises(SystemExit) as end:
                    main([kind, command, "--help"])
                assert end.value.code == 0


def test_official_is_one_of_the_formats(tmp_path, layout, capsys) -> None:
    torch.save(layout.training_file(), tmp_path / "a.pth")
    assert main(["official", "import", str(tmp_path / "a.pth"), str(tmp_path / "run")]) == 0
    assert main(["official", "export", str(tmp_path / "run"), str(tmp_path / "b.pth")]) == 0
    layout.assert_same(read_pickle(tmp_path / "a.pth"), read_pickle(tmp_path / "b.pth"))
    facts = metadata(export("safetensors", tmp_path / "run", tmp_path / "c.safetensors"))
    assert "fastdino.step" not in facts  # the file counts epochs
    torch.save(layout.backbone(), tmp_path / "bare.pth")
    assert main(["official", "import", str(tmp_path / "bare.pth"), str(tmp_path / "new")]) == 1
    assert "safetensors import` begins a run" in capsys.readouterr().err
