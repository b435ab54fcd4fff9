"""Configuration: presets, conversion, YAML, stored dictionaries, validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdino.config import (
    Config,
    ConfigError,
    as_flags,
    config_from_dict,
    config_from_flags,
    config_to_dict,
    config_to_yaml,
    layered,
    preset,
    split_batch,
    validate,
    with_flags,
)
from fastdino.presets import PRESETS
from fastdino.validation import method_warnings

# Defaults of main_dino.py.
OFFICIAL = {
    "arch": "vit_small",
    "patch_size": 16,
    "out_dim": 65536,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "use_bn_in_head": False,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "use_fp16": True,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "batch_size_per_gpu": 64,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4),
    "output_dir": ".",
    "saveckp_freq": 20,
    "seed": 0,
    "num_workers": 10,
    "dist_url": "env://",
    "local_rank": 0,
}


def test_defaults_are_the_official_ones() -> None:
    flags = as_flags(Config())
    assert {name: flags[name] for name in OFFICIAL} == OFFICIAL


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_list_only_differences(name: str) -> None:
    default, flags = as_flags(Config()), preset(name)
    assert [flag for flag, value in flags.items() if default[flag] == value] == []
    validate(layered(name, None), world_size=1)
    assert PRESETS[name].figure.endswith(".")


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].base is not None])
def test_a_preset_differs_from_its_base_by_its_delta_alone(name: str) -> None:
    row = PRESETS[name]
    base, flags = as_flags(layered(row.base, None)), as_flags(layered(name, None))
    assert {flag: value for flag, value in flags.items() if value != base[flag]} == row.delta


def test_every_row_of_the_papers_ablations_is_a_preset() -> None:
    rows = {"table7": 9, "table9": 4, "table13": 8, "table14": 10, "table15": 6, "fig6": 4, "appendix": 46}
    for table, number in rows.items():
        assert sum(name.startswith(f"{table}-") for name in PRESETS) == number, table
    swav = layered("swav-dino", None)
    assert (swav.method.teacher, swav.method.teacher_op, swav.crops.local_crops_number) == (
        "copy",
        "sinkhorn",
        6,
    )
    assert layered("table14-6", None).crops == layered("table8-2x224-6x96", None).crops
    assert layered("appendix-teacher-temp-0", None).loss.teacher_temp == 0
    resnet = layered("table13-swav-rn50", None).optim
    assert resnet.lr * resnet.batch_size / 256 == pytest.approx(4.8)


def test_paper_presets_differ_from_the_code_as_the_papers_runs_did() -> None:
    flags = as_flags(layered("paper-300", None))
    assert flags["epochs"] == 300
    assert flags["batch_size"] == 1024
    assert flags["lr"] * flags["batch_size"] / 256 == 0.002
    assert (flags["warmup_teacher_temp"], flags["teacher_temp"]) == (0.04, 0.07)
    assert flags["warmup_teacher_temp_epochs"] == 30
    assert (flags["global_crops_scale"], flags["local_crops_scale"]) == ((0.25, 1.0), (0.05, 0.25))
    assert flags["local_crops_number"] == 10
    assert (flags["clip_grad"], flags["min_lr"], flags["norm_last_layer"]) == (0.0, 1e-5, False)
    rows = ["table8-2x224", "table8-2x224-2x96", "table8-2x224-6x96", "table8-2x224-10x96"]
    assert [layered(row, None).crops.local_crops_number for row in rows] == [0, 2, 6, 10]


def test_preset_names_are_forgiving() -> None:
    assert preset("table8_2x224_6x96") == preset("table8-2x224-6x96")
    with pytest.raises(ConfigError, match="'papr-100', did you mean 'paper-100'"):
        preset("papr-100")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("use_fp16", "off", False),
        ("use_fp16", "1", True),
        ("use_fp16", 0, False),
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("epochs", "7", 7),
        ("global_crops_scale", [0.3, 1], (0.3, 1.0)),
        ("global_crops_scale", "0.3 1", (0.3, 1.0)),
        ("nb_knn", 10, (10,)),
        ("nb_knn", "10, 20", (10, 20)),
        ("batch_size", None, None),
        ("batch_size", "none", None),
        ("prescan", False, "off"),
        ("data_path", Path("images"), "images"),
        ("batch-size-per-gpu", 8, 8),
        ("logger", "none", ("none",)),
        ("logger", "tensorboard,wandb", ("tensorboard", "wandb")),
    ],
)
def test_values_from_yaml_and_python_are_converted(flag: str, value: Any, expected: Any) -> None:
    result = as_flags(with_flags(Config(), {flag: value}))[flag.replace("-", "_")]
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("use_fp16", "maybe", "expected true or false, got 'maybe'"),
        ("epochs", 1.5, "expected an integer, got 1.5"),
        ("epochs", True, "expected an integer, got True"),
        ("epochs", None, "expected an integer, got None"),
        ("lr", "fast", "expected a number, got 'fast'"),
        ("optimizer", "adam", "expected one of adamw, sgd, lars, lamb, got 'adam'"),
        ("global_crops_scale", [0.5], "expected 2 numbers, got [0.5]"),
        ("data_path", 3, "expected text, got 3"),
        ("epoch", 3, "unknown flag, did you mean 'epochs'?"),
    ],
)
def test_values_of_the_wrong_type_are_named(flag: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_flags(Config(), {flag: value})
    assert str(error.value) == f"--{flag}: {message}"
    assert error.value.flag == flag


def test_log_is_short_for_logger() -> None:
    assert with_flags(Config(), {"log": "none"}) == with_flags(Config(), {"logger": "none"})


def test_with_flags_leaves_the_original_alone() -> None:
    config = Config()
    assert with_flags(config, {"lr": 1.0}).optim.lr == 1.0
    assert config == Config()


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    traps = {"prescan": "on", "logger": "none", "resume": "none", "nb_knn": [5]}
    config = with_flags(layered(name, None), traps)
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    assert layered(None, path) == config
    assert set(yaml.safe_load(path.read_text())) == set(as_flags(config))


def test_stored_dictionary_round_trip() -> None:
    config = with_flags(Config(), preset("paper-100"))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert config_from_dict({"optim": {"lr": 1.0}}).optim.lr == 1.0
    with pytest.raises(ConfigError, match="unknown flag in the stored configuration, did you mean 'lr'"):
        config_from_dict({"optim": {"lrr": 1.0}})


def test_yaml_may_group_flags_and_name_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: paper-100\noptim:\n  lr: 1e-3\nlocal_crops_number: 4\n")
    config = layered(None, path)
    assert (config.optim.lr, config.crops.local_crops_number, config.optim.batch_size) == (1e-3, 4, 1024)
    assert layered("table8-2x224", path).crops.global_crops_scale == (0.14, 1.0)
    assert layered("table8-2x224", path).crops.local_crops_number == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\nlrr: 2\n", "--learning_rate: unknown flag in {path}"),
        ("batch_sise: 1\n", "--batch_sise: unknown flag in {path}, did you mean 'batch_size'?"),
        ("lr: fast\n", "--lr: expected a number, got 'fast' in {path}"),
        ("optim: 3\n", "--optim: expected the flags of this section in {path}, got 3"),
        ("- lr\n", "--config: {path}: expected lines 'flag: value', got list"),
        ("lr: [1\n", "--config: {path} is not YAML: "),
    ],
)
def test_yaml_errors_name_key_and_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        layered(None, path)
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config: cannot read .*nothing.yaml: No such file"):
        layered(None, tmp_path / "nothing.yaml")


def test_flags_from_python(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 50\nlr: 0.1\n")
    config = config_from_flags(preset="paper-300", config=path, lr=0.2, data_path=tmp_path)
    assert (config.optim.epochs, config.optim.lr, config.optim.batch_size) == (50, 0.2, 1024)
    with pytest.raises(ConfigError, match="--batchsize: unknown flag, did you mean 'batch_size'"):
        config_from_flags(batchsize=3)
    with pytest.raises(ConfigError, match="--out_dim: expected a positive integer, got 0"):
        config_from_flags(out_dim=0)


@pytest.mark.parametrize(
    ("flags", "blamed"),
    [
        ({"arch": "vit_smal"}, "arch"),
        ({"arch": "resnet51"}, "arch"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": 97}, "patch_size"),
        ({"patch_size": 225, "local_crops_number": 0}, "patch_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"embed_dim": 100}, "embed_dim"),
        ({"depth": 0}, "depth"),
        ({"in_chans": 1}, "in_chans"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"out_dim": 0}, "out_dim"),
        ({"head_layers": 5}, "head_layers"),
        ({"bottleneck_dim": -1}, "bottleneck_dim"),
        ({"momentum_teacher": 1.1}, "momentum_teacher"),
        ({"center_momentum": -0.1}, "center_momentum"),
        ({"warmup_teacher_temp": 0.0, "warmup_teacher_temp_epochs": 5}, "warmup_teacher_temp"),
        ({"teacher_temp": 0.0, "warmup_teacher_temp_epochs": 5}, "warmup_teacher_temp"),
        ({"teacher_temp": 0.0, "teacher_op": "sinkhorn"}, "teacher_temp"),
        ({"teacher_temp": -0.04}, "teacher_temp"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations"),
        ({"method": "byol", "loss": "mse"}, "loss"),
        ({"method": "mocov2", "teacher_op": "sinkhorn"}, "teacher_op"),
        ({"method": "swav", "teacher": "copy"}, "teacher"),
        ({"method": "swav", "predictor": "on"}, "predictor"),
        ({"loss": "mse", "teacher_op": "sinkhorn"}, "teacher_op"),
        ({"loss": "mse", "bottleneck_dim": 0}, "bottleneck_dim"),
        ({"predictor": "on", "bottleneck_dim": 0}, "bottleneck_dim"),
        ({"sk_joint": True}, "sk_joint"),
        ({"queue_length": 1024}, "queue_length"),
        ({"method": "swav", "queue_length": -64}, "queue_length"),
        ({"method": "swav", "queue_length": 1000}, "queue_length"),
        ({"method": "mocov2", "queue_length": 0}, "queue_length"),
        ({"method": "mocov2", "queue_length": 192}, "queue_length"),
        ({"loss": "infonce", "queue_length": 0}, "queue_length"),
        ({"method": "mocov2", "cuda_graph": True}, "cuda_graph"),
        ({"student_temp": float("nan")}, "student_temp"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_grad": -1.0}, "clip_grad"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 5}, "warmup_epochs"),
        ({"max_steps": 0}, "max_steps"),
        ({"freeze_last_layer": -1}, "freeze_last_layer"),
        ({"batch_size_per_gpu": 0}, "batch_size_per_gpu"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 100}, "batch_size"),
        ({"global_crops_scale": (0.0, 1.0)}, "global_crops_scale"),
        ({"global_crops_scale": (0.5, 1.1)}, "global_crops_scale"),
        ({"local_crops_scale": (0.5, 0.4)}, "local_crops_scale"),
        ({"local_crops_number": -1}, "local_crops_number"),
        ({"global_crops_size": 0}, "global_crops_size"),
        ({"nb_knn": ()}, "nb_knn"),
        ({"nb_knn": (0,)}, "nb_knn"),
        ({"seed": -1}, "seed"),
        ({"data_path": ""}, "data_path"),
        ({"use_fp16": False, "precision": "bf16"}, "precision"),
    ],
)
def test_impossible_values_are_refused(flags: dict[str, Any], blamed: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(with_flags(Config(), flags), world_size=1)
    assert error.value.flag == blamed
    assert str(error.value).startswith(f"--{blamed}: ") and "\n" not in str(error.value)
    assert "expected" in str(error.value) and "got" in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"patch_size": 96},
        {"patch_size": 5},
        {"patch_size": 224, "local_crops_number": 0},
        {"num_heads": 16},
        {"clip_grad": 0.0, "lr": 0.0, "momentum_teacher": 1.0},
        {"global_crops_scale": (1.0, 1.0)},
        {"epochs": 10},
        {"bottleneck_dim": 0},
        {"use_fp16": False, "precision": "fp32"},
    ],
)
def test_possible_extremes_are_allowed(flags: dict[str, Any]) -> None:
    validate(with_flags(Config(), flags), world_size=1)


@pytest.mark.parametrize(
    ("batch", "per_process", "world", "expected"),
    [
        (None, 64, 8, (512, 64, 1)),
        (1024, 64, 8, (1024, 64, 2)),
        (1024, 64, 1, (1024, 64, 16)),
        (32, 64, 1, (32, 32, 1)),
        (32, 64, 4, (32, 8, 1)),
    ],
)
def test_split_batch(batch: int | None, per_process: int, world: int, expected: tuple[int, int, int]) -> None:
    config = with_flags(Config(), {"batch_size": batch, "batch_size_per_gpu": per_process})
    assert split_batch(config, world) == expected


def test_split_batch_proposes_a_size_that_fits() -> None:
    config = with_flags(Config(), {"batch_size": 96})
    with pytest.raises(ConfigError, match="--batch_size_per_gpu 48 fits"):
        split_batch(config, 1)
    with pytest.raises(ConfigError, match="multiple of the 5 processes, got 96"):
        split_batch(config, 5)


def test_a_queue_that_fits_no_batch_is_told_which_length_does() -> None:
    flags = {"method": "mocov2", "queue_length": 1000, "batch_size": 96, "batch_size_per_gpu": 96}
    with pytest.raises(ConfigError, match=r"multiple of 2 x 96 .* got 1000; --queue_length 960 fits"):
        validate(with_flags(Config(), flags), world_size=1)
    validate(with_flags(Config(), flags | {"queue_length": 960}), world_size=1)
    validate(with_flags(Config(), {"method": "swav", "queue_length": 64 * 3}), world_size=3)


@pytest.mark.parametrize(
    ("flags", "blamed"),
    [
        ({"method": "byol"}, "method"),
        ({"method": "mocov2"}, "method"),
        ({"loss": "infonce"}, "loss"),
        ({"predictor": "on"}, "predictor"),
        ({"teacher": "prev_iter"}, "teacher"),
    ],
)
def test_what_other_methods_add_is_not_sharded(flags: dict[str, Any], blamed: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(with_flags(Config(), {**flags, "mesh": "shard"}), world_size=2)
    assert error.value.flag == blamed and "with --mesh shard" in str(error.value)
    validate(with_flags(Config(), {**flags, "mesh": "shard"}), world_size=1)


def test_sums_over_processes_are_not_recorded() -> None:
    flags = {"teacher_op": "sinkhorn", "cuda_graph": True}
    validate(with_flags(Config(), flags), world_size=1)
    with pytest.raises(ConfigError, match="--cuda_graph: expected false with 2 processes"):
        validate(with_flags(Config(), flags), world_size=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, None),
        ({"method": "byol"}, None),
        ({"method": "byol", "predictor": "off"}, "table 14"),
        ({"teacher": "copy"}, "figure 6"),
        ({"teacher": "copy", "teacher_op": "sinkhorn"}, None),
        ({"teacher": "copy", "loss": "mse"}, None),
        ({"teacher": "copy", "loss": "mse", "center_momentum": 1.0}, "nothing prevents collapse"),
        ({"center_momentum": 1.0}, "figure 7"),
    ],
)
def test_known_collapses_are_warned_of(flags: dict[str, Any], words: str | None) -> None:
    config = with_flags(Config(), flags)
    validate(config, world_size=1)
    found = method_warnings(config)
    assert [words in warning for warning in found] == ([True] if words else [])
