"""Official training files through our format and back, to the bit."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch
from fastdino_kernels import LAMB

from fastdino.config import Config, as_flags, config_from_dict, config_to_dict
from fastdino.engine import checkpoint
from fastdino.engine.optim import parameter_groups
from fastdino.interop.files import WeightsError, read_pickle
from fastdino.interop.official import from_native, import_checkpoint, main, read_official, to_native
from fastdino.interop.weights import load_backbone
from fastdino.models import build_model, build_student_teacher

VARIANTS = [
    {"full_size": True},
    {"norm_last_layer": False},
    {"batch_norm": True},
    {"frozen": True},
    {"optimizer": "sgd"},
    {"optimizer": "lars", "frozen": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_round_trip_through_a_checkpoint_directory_is_bitwise(tmp_path, capsys, layout, variant) -> None:
    contents = layout.training_file(**variant)
    source, run, target = tmp_path / "checkpoint.pth", tmp_path / "run", tmp_path / "out.pth"
    torch.save(contents, source)
    assert main(["import", str(source), str(run)]) == 0
    assert main(["export", str(run), str(target)]) == 0
    with torch.serialization.safe_globals([argparse.Namespace]):  # no NumPy is left to be allowed
        layout.assert_same(contents, torch.load(target, weights_only=True))
    assert "continues at epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("world", [1, 3])
def test_a_checkpoint_in_pieces_is_exported_to_the_same_bytes(tmp_path, layout, world) -> None:
    torch.save(layout.training_file(), tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "run")
    whole = checkpoint.latest(tmp_path / "run" / "checkpoints")
    model, optimizer, meta = checkpoint.load(whole)

    def rows_of(state, rank):
        pieces = {}
        for name, tensor in state.items():
            pieces[name] = tensor
            if tensor.ndim and name != "center":
                start, stop = len(tensor) * rank // world, len(tensor) * (rank + 1) // world
                pieces[name] = checkpoint.Piece(tensor[start:stop], start, len(tensor))
        return pieces

    for rank in reversed(range(world)):
        states = rows_of(model, rank), rows_of(optimizer, rank)
        root = tmp_path / "pieces" / "checkpoints"
        path = checkpoint.save(root, 1, *states, meta, rank=rank, world_size=world, attempt="a", timeout=0)
    assert len(list(path.glob("*.safetensors"))) == 2 * world
    assert main(["export", str(whole), str(tmp_path / "whole.pth")]) == 0
    for source in (path, tmp_path / "pieces"):
        assert main(["export", str(source), str(tmp_path / "pieces.pth")]) == 0
        assert (tmp_path / "pieces.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()
    one, other = load_backbone(whole).state_dict(), load_backbone(tmp_path / "pieces").state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [({}, (55, 102)), ({"norm_last_layer": False}, (56, 102)), ({"batch_norm": True}, (55, 106))],
)
def test_optimizer_state_lands_on_the_right_parameters(tmp_path, layout, variant, sizes) -> None:
    contents = layout.training_file(**variant)
    assert tuple(len(g["params"]) for g in contents["optimizer"]["param_groups"]) == sizes
    torch.save(contents, tmp_path / "a.pth")
    model, optimizer, meta = to_native(read_official(tmp_path / "a.pth"))
    student = build_model(config_from_dict(meta["config"]).model)
    names = {p: name for name, p in student.named_parameters()}
    ordered = [names[p] for group in parameter_groups(student) for p in group["params"]]
    for number, name in enumerate(ordered):
        entry = contents["optimizer"]["state"][number]
        assert set(entry) == {k.partition(".")[0] for k in optimizer if k.partition(".")[2] == name}
        for key, value in entry.items():
            assert torch.equal(optimizer[f"{key}.{name}"], value)
    # The same, through the optimizer that official training uses.
    groups = [{**g} for g in parameter_groups(student)]
    theirs = torch.optim.AdamW(groups)
    theirs.load_state_dict(contents["optimizer"])
    by_name = dict(student.named_parameters())
    for name in ordered:
        assert torch.equal(theirs.state[by_name[name]]["exp_avg"], optimizer[f"exp_avg.{name}"])
    assert model.keys() == {f"{who}.{n}" for who in ("student", "teacher") for n in student.state_dict()} | {
        "center"
    }


def test_import_fills_the_configuration_and_the_state(tmp_path, layout) -> None:
    contents = layout.training_file()
    torch.save(contents, tmp_path / "a.pth")
    line = import_checkpoint(tmp_path / "a.pth", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert str(path) in line and "config.yaml" in line
    model, _, meta = checkpoint.load(path)
    config = config_from_dict(meta["config"])
    assert config.model.arch == "vit_tiny" and config.model.out_dim == 12
    assert config.crops.global_crops_scale == (0.4, 1.0) and config.crops.local_crops_scale == (0.05, 0.25)
    assert config.optim.epochs == 300 and config.optim.lr == 0.001 and config.run.seed == 3
    assert config.run.output_dir == str(tmp_path / "run")
    assert meta["epoch"] == 1 and meta["world_size"] == 16
    assert meta["scaler"] == {"scale": 32768.0, "good_steps": 17}
    assert torch.equal(model["center"], contents["dino_loss"]["center"][0])
    assert torch.equal(
        model["student.backbone.blocks.3.attn.qkv.weight"],
        contents["student"]["module.backbone.blocks.3.attn.qkv.weight"],
    )
    student, teacher = build_student_teacher(config)
    for who, module in (("student.", student), ("teacher.", teacher)):
        module.load_state_dict({k.removeprefix(who): v for k, v in model.items() if k.startswith(who)})
    with pytest.raises(WeightsError, match="already holds checkpoints"):
        import_checkpoint(tmp_path / "a.pth", tmp_path / "run")


def native(optimizer: str, use_bn: bool = False) -> tuple[Config, dict, dict, dict]:
    """The three parts of a checkpoint of our own, after a few real steps."""
    torch.manual_seed(0)
    config = Config()
    config.model.arch, config.model.out_dim, config.model.use_bn_in_head = "vit_tiny", 20, use_bn
    config.model.depth, config.model.patch_size, config.model.head_hidden_dim = 2, 16, 16
    config.crops.global_crops_size = 32
    config.optim.optimizer = optimizer  # type: ignore[assignment]
    student, teacher = build_student_teacher(config)
    groups = parameter_groups(student)
    kinds = {
        "adamw": torch.optim.AdamW,
        "sgd": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
        "lamb": LAMB,
    }
    trainer = kinds[optimizer](groups)  # type: ignore[operator]
    for _ in range(2):
        student.head(student.backbone(torch.randn(4, 3, 32, 32))).square().sum().backward()
        trainer.step()
    names = {p: name for name, p in student.named_parameters()}
    state = {f"{key}.{names[p]}": v for p, entry in trainer.state.items() for key, v in entry.items()}
    model = {f"student.{k}": v for k, v in student.state_dict().items()}
    model |= {f"teacher.{k}": v for k, v in teacher.state_dict().items()}
    model["center"] = torch.randn(20)
    meta = {
        "step": 30,
        "epoch": 3,
        "steps_per_epoch": 10,
        "config": config_to_dict(config),
        "identity": {"global batch": 512},
        "scaler": {"scale": 4.0, "good_steps": 7},
    }
    return config, model, state, meta


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_export_loads_where_the_official_code_loads_it(tmp_path, optimizer, use_bn) -> None:
    config, model, state, meta = native(optimizer, use_bn)
    checkpoint.save(tmp_path / "checkpoints", 30, model, state, meta)
    assert main(["export", str(tmp_path), str(tmp_path / "out.pth")]) == 0
    contents = read_pickle(tmp_path / "out.pth")
    assert list(contents) == ["student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"]
    student, teacher = build_student_teacher(config)
    student.load_state_dict({k.removeprefix("module."): v for k, v in contents["student"].items()})
    assert all(k.startswith("module.") for k in contents["student"])
    assert all(k.startswith("module.") == use_bn for k in contents["teacher"])
    assert [k.removeprefix("module.") for k in contents["teacher"]] == list(teacher.state_dict())
    groups = parameter_groups(student)
    theirs = (
        torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, lr=0, momentum=0.9)
    )
    settings = theirs.state_dict()["param_groups"]
    theirs.load_state_dict(contents["optimizer"])
    for name, p in student.named_parameters():
        assert torch.equal(p, model[f"student.{name}"])
        for key, value in theirs.state.get(p, {}).items():
            assert torch.equal(value, state[f"{key}.{name}"])
    assert sum(len(entry) for entry in theirs.state.values()) == len(state)
    for before, after in zip(settings, contents["optimizer"]["param_groups"], strict=True):
        assert list(before) == list(after) and before["params"] == after["params"]
        assert after["lr"] == pytest.approx(5e-4 * 2 * 29 / 99)  # within the warm-up of 10 epochs
    decay = [g["weight_decay"] for g in contents["optimizer"]["param_groups"]]
    assert 0.04 < decay[0] < 0.045 and decay[1] == 0.0
    assert contents["epoch"] == 3 and contents["dino_loss"]["center"].shape == (1, 20)
    assert vars(contents["args"]) == as_flags(config)
    assert contents["fp16_scaler"] == {
        "scale": 4.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }


def test_export_of_an_optimizer_that_the_official_code_lacks(tmp_path) -> None:
    config, model, state, meta = native("lamb", False)
    checkpoint.save(tmp_path / "checkpoints", 30, model, state, meta)
    assert main(["export", str(tmp_path), str(tmp_path / "out.pth")]) == 0
    student, _ = build_student_teacher(config)
    ours = LAMB(parameter_groups(student))
    ours.load_state_dict(read_pickle(tmp_path / "out.pth")["optimizer"])
    loaded = {f"{k}.{n}": v for n, p in student.named_parameters() for k, v in ours.state.get(p, {}).items()}
    assert set(loaded) == set(state) and all(torch.equal(v, state[k]) for k, v in loaded.items())
    assert 0.04 < ours.param_groups[0]["weight_decay"] < 0.045 and ours.param_groups[0]["eps"] == 1e-6


def test_our_checkpoint_survives_the_official_format(tmp_path) -> None:
    config, model, state, meta = native("adamw")
    torch.save(from_native(model, state, meta), tmp_path / "a.pth")
    model_again, state_again, meta_again = to_native(read_official(tmp_path / "a.pth"))
    assert model.keys() == model_again.keys() and state.keys() == state_again.keys()
    assert all(torch.equal(model[k], model_again[k]) for k in model)
    assert all(torch.equal(state[k], state_again[k]) for k in state)
    assert config_from_dict(meta_again["config"]) == config


def test_no_scaler_without_mixed_precision() -> None:
    config, model, state, meta = native("adamw")
    config.optim.use_fp16 = False
    assert "fp16_scaler" not in from_native(model, state, {**meta, "config": config_to_dict(config)})


def test_export_within_an_epoch_says_so(tmp_path, capsys) -> None:
    _, model, state, meta = native("adamw")
    checkpoint.save(tmp_path, 34, model, state, {**meta, "step": 34})
    assert main(["export", str(tmp_path), str(tmp_path / "out.pth")]) == 0
    assert "within epoch 3, which the official code will start again" in capsys.readouterr().out


def test_both_spellings_of_weight_norm(tmp_path, layout) -> None:
    contents = layout.training_file()
    torch.save(contents, tmp_path / "old.pth")
    for who in ("student", "teacher"):
        renamed = type(contents[who])()
        for key, value in contents[who].items():
            key = key.replace("last_layer.weight_g", "last_layer.parametrizations.weight.original0")
            renamed[key.replace("last_layer.weight_v", "last_layer.parametrizations.weight.original1")] = (
                value
            )
        contents[who] = renamed
    torch.save(contents, tmp_path / "new.pth")
    old, new = read_official(tmp_path / "old.pth"), read_official(tmp_path / "new.pth")
    assert old.student is not None and new.student is not None
    assert old.student.keys() == new.student.keys()
    assert "head.last_layer.weight_g" in new.student
    assert all(torch.equal(old.student[k], new.student[k]) for k in old.student)


def test_step_counts_of_old_torch_are_numbers(tmp_path, layout) -> None:
    contents = layout.training_file()
    for entry in contents["optimizer"]["state"].values():
        entry["step"] = 1251
    torch.save(contents, tmp_path / "a.pth")
    _, optimizer, _ = to_native(read_official(tmp_path / "a.pth"))
    steps = [v for k, v in optimizer.items() if k.startswith("step.")]
    assert len(steps) == 157
    assert all(v.dtype == torch.float32 and v.ndim == 0 and v == 1251 for v in steps)


def broken(contents: dict, how: str) -> dict:
    student = contents["student"]
    if how == "missing":
        del student["module.backbone.norm.bias"]
    elif how == "unexpected":
        student["module.backbone.extra"] = torch.ones(1)
    elif how == "shape":
        student["module.backbone.pos_embed"] = torch.ones(1, 5, 192)
    elif how == "no center":
        del contents["dino_loss"]
    elif how == "arch":
        contents["args"].arch = "xcit_small_12_p16"
    elif how == "center":
        contents["dino_loss"]["center"] = torch.ones(1, 7)
    elif how == "optimizer":
        contents["optimizer"]["param_groups"][1]["params"].pop()
    elif how == "moments":
        contents["optimizer"]["state"][0]["exp_avg"] = torch.ones(3)
    elif how == "groups":
        del contents["optimizer"]["param_groups"]
    elif how == "twice":
        student["backbone.norm.bias"] = student["module.backbone.norm.bias"]
    elif how == "value":
        student["module.backbone.norm.bias"] = [1.0]
    elif how == "list":
        return [1, 2]  # type: ignore[return-value]
    return contents


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "student does not fit --arch vit_tiny: missing: backbone.norm.bias"),
        ("unexpected", "unexpected: backbone.extra"),
        ("shape", r"shapes: backbone.pos_embed \[1, 5, 192\] instead of \[1, 197, 48\]"),
        ("no center", "not a training checkpoint, it has no center"),
        ("arch", "--arch: .*xcit_small_12_p16"),
        ("center", "center has 7 entries, --out_dim is 12"),
        ("optimizer", r"optimizer has 55 \+ 101 parameters, expected 55 \+ 102"),
        ("moments", r"optimizer exp_avg of backbone.cls_token has shape \[3\], expected \[1, 1, 48\]"),
        ("groups", "optimizer is not the state of a torch optimizer"),
        ("twice", "two tensors for backbone.norm.bias"),
        ("value", "expected tensors by name, got list under 'module.backbone.norm.bias'"),
        ("list", "expected a dictionary of weights, got list"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, capsys, layout, how, message) -> None:
    path = tmp_path / "broken.pth"
    torch.save(broken(layout.training_file(), how), path)
    with pytest.raises(WeightsError, match=message) as error:
        to_native(read_official(path))
    assert str(path) in str(error.value)
    assert main(["import", str(path), str(tmp_path / "run")]) == 1
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_bare_backbone_is_not_a_training_checkpoint(tmp_path, layout) -> None:
    torch.save(layout.backbone(), tmp_path / "pretrain.pth")
    with pytest.raises(
        WeightsError, match="pretrain.pth: not a training checkpoint, it has no student, args, epoch"
    ):
        to_native(read_official(tmp_path / "pretrain.pth"))


def test_command_line_errors(tmp_path, capsys) -> None:
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out.pth")]) == 1
    assert "neither a checkpoint nor a run directory" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing.pth"), str(tmp_path / "run")]) == 1
    assert "nothing.pth" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["convert"])
    assert stop.value.code == 2
    assert not (tmp_path / "out.pth").exists()


def test_exported_file_needs_no_code_of_ours(tmp_path, layout) -> None:
    """The only globals in an exported file are those of torch, collections and argparse."""
    torch.save(layout.training_file(), tmp_path / "a.pth")
    contents = from_native(*to_native(read_official(tmp_path / "a.pth")))
    torch.save(contents, tmp_path / "b.pth")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "b.pth")
    assert names == ["argparse.Namespace"]
    assert pickle.dumps(contents["args"])
