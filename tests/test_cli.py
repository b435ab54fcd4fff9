"""Command line: official launch lines, booleans, precedence, actions, errors, start-up time."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastdino.cli import _show_log, main, parse, presets_table
from fastdino.config import Config, as_flags, with_flags

ROOT = Path(__file__).resolve().parents[1]


def flags_of(line: str) -> dict[str, object]:
    """What ``line`` changes against the defaults."""
    config, default = as_flags(parse(line.split())[0]), as_flags(Config())
    return {name: value for name, value in config.items() if default[name] != value}


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a line that must exit with 2, boxes and line breaks removed."""
    with pytest.raises(SystemExit) as stop:
        parse(line.split())
    assert stop.value.code == 2
    out = capsys.readouterr()
    return " ".join((out.err + out.out).replace("│", " ").split())


def images(folder: Path, number: int) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        Image.new("RGB", (64, 48), (index * 20, 100, 200)).save(folder / f"{index}.jpg")


# What the documentation and the logs of the official code pass to main_dino.py.
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--arch vit_small --data_path /data/imagenet/train --output_dir /runs/dino",
            {"data_path": "/data/imagenet/train", "output_dir": "/runs/dino"},
        ),
        ("--local-rank=0 --arch deit_small", {"arch": "deit_small"}),
        ("--local_rank=3 --dist_url tcp://localhost:1", {"local_rank": 3, "dist_url": "tcp://localhost:1"}),
        (
            "--epochs 300 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer false",
            {"epochs": 300, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False},
        ),
        ("--use_fp16 false", {"use_fp16": False}),
        ("--use_fp16 off --norm_last_layer 0", {"use_fp16": False, "norm_last_layer": False}),
        ("--use_fp16 on --use_bn_in_head 1", {"use_bn_in_head": True}),
        ("--use_fp16=False --use_bn_in_head TRUE", {"use_fp16": False, "use_bn_in_head": True}),
        ("--use_bn_in_head --epochs 200", {"use_bn_in_head": True, "epochs": 200}),
        (
            "--global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14",
            {"global_crops_scale": (0.14, 1.0), "local_crops_scale": (0.05, 0.14)},
        ),
        (
            "--arch vit_base --patch_size 8 --out_dim 4096 --momentum_teacher 0.9995 --batch_size_per_gpu 6 "
            "--clip_grad 0.3 --freeze_last_layer 3 --min_lr 2e-06 --lr 0.00075 --local_crops_number 10",
            {
                "arch": "vit_base",
                "patch_size": 8,
                "out_dim": 4096,
                "momentum_teacher": 0.9995,
                "batch_size_per_gpu": 6,
                "clip_grad": 0.3,
                "freeze_last_layer": 3,
                "min_lr": 2e-6,
                "lr": 0.00075,
                "local_crops_number": 10,
            },
        ),
        (
            "--optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4 --saveckp_freq 5 --seed 7 "
            "--num_workers 4 --drop_path_rate 0 --warmup_epochs 0 --warmup_teacher_temp 0.03",
            {
                "optimizer": "sgd",
                "lr": 0.03,
                "weight_decay": 1e-4,
                "weight_decay_end": 1e-4,
                "saveckp_freq": 5,
                "seed": 7,
                "num_workers": 4,
                "drop_path_rate": 0.0,
                "warmup_epochs": 0,
                "warmup_teacher_temp": 0.03,
            },
        ),
        (
            "--arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4 "
            "--global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14",
            {
                "arch": "resnet50",
                "optimizer": "sgd",
                "lr": 0.03,
                "weight_decay": 1e-4,
                "weight_decay_end": 1e-4,
                "global_crops_scale": (0.14, 1.0),
                "local_crops_scale": (0.05, 0.14),
            },
        ),
    ],
)
def test_official_lines_parse(line: str, expected: dict[str, object]) -> None:
    assert flags_of(line) == expected


def test_hyphens_equal_underscores_and_the_last_flag_counts() -> None:
    assert flags_of("--batch-size 128 --lr 1 --lr 2") == {"batch_size": 128, "lr": 2.0}
    assert flags_of("--preset paper-100 --batch_size none")["local_crops_number"] == 10
    assert "batch_size" not in flags_of("--preset paper-100 --batch_size none")
    assert flags_of("--nb_knn 5 --eval_data_path x") == {"nb_knn": (5,), "eval_data_path": "x"}


@pytest.mark.parametrize(
    "order",
    [
        "--preset paper-100 --config {yaml} --lr 3",
        "--lr 3 --config {yaml} --preset paper-100",
        "--config={yaml} --lr=3 --preset=paper-100",
    ],
)
def test_precedence_does_not_depend_on_position(order: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 2\nclip_grad: 2\n")
    flags = flags_of(order.format(yaml=path))
    assert (flags["lr"], flags["clip_grad"], flags["batch_size"]) == (3.0, 2.0, 1024)


def test_print_config_reparses_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--preset table8-2x224-6x96 --lr 1e-3 --nb_knn 5 10 --prescan on --output_dir out".split()
    with pytest.raises(SystemExit) as stop:
        parse([*line, "--print_config"])
    assert stop.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse(["--config", str(path)])[0] == parse(line)[0]


def test_list_presets_prints_figures_and_reparsable_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--list_presets"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == presets_table()
    assert "linear 74.6" in text and "k-NN 74.5" in text and "15.4 GB" in text
    entry = text[text.index("paper-300\n") : text.index("paper-800\n")]
    assert parse(entry[entry.index("--") :].split())[0] == parse(["--preset", "paper-300"])[0]


def test_preset_list_is_list_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--preset", "list"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == presets_table()
    for entry in presets_table().split("\n"):
        assert len(entry) <= 110


def test_actions() -> None:
    _, actions = parse("--dry_run --preview_crops 6".split())
    assert (actions.dry_run, actions.preview_crops) == (True, 6)
    assert not parse([])[1].dry_run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch_size_per_gp 4", "--batch_size_per_gpu"),
        ("--lr fast", "--lr"),
        ("--use_fp16 maybe", "--use_fp16: expected true or false, got 'maybe'"),
        ("--depth three", "--depth: expected an integer, got 'three'"),
        ("--optimizer adam", "--optimizer"),
        ("--global_crops_scale 0.4", "--global_crops_scale"),
        ("stray", "stray"),
        ("--preset papr-100", "error: --preset: unknown name 'papr-100', did you mean 'paper-100'?"),
        ("--config no.yaml", "error: --config: cannot read no.yaml: No such file or directory"),
        ("--out_dim 0", "train.py: error: --out_dim: expected a positive integer, got 0"),
        ("--student_temp 0", "error: --student_temp: expected a number > 0, got 0.0"),
        ("--lr -1", "error: --lr: expected a number >= 0, got -1.0"),
        ("--patch_size 128", "--patch_size: expected at most --local_crops_size (96 pixels), got 128"),
        ("--ngpus 8 --nodes 2", "error: --ngpus: no flag of train.py; torchrun --nproc_per_node=GPUS"),
        ("--pretrained_weights=a.pth", "python -m fastdino.evaluation PROTOCOL --weights FILE"),
        ("--preview_crops -1", "error: --preview_crops: expected a number >= 0, got -1"),
        (
            "--arch resnet50 --optimizer sgd --lr 0.03 --attention math",
            "--attention: expected auto with --arch resnet50, got math",
        ),
    ],
)
def test_mistakes_exit_with_2_and_name_the_flag(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(line, capsys)


def test_only_the_first_process_complains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert refused("--out_dim 0", capsys) == ""
    assert refused("--no_such_flag 0", capsys) == ""


def test_batch_is_checked_against_the_launched_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused("--batch_size 64", capsys)
    assert "--batch_size: expected a multiple of the 3 processes, got 64" in message


def test_every_flag_is_documented_and_grouped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for section in ("model", "loss", "optim", "crops", "data", "eval", "run", "start"):
        assert f" {section} options " in text
    for name in as_flags(Config()):
        assert f"--{name} " in text
    # A flag without a docstring would show nothing but its default.
    entries = [entry.split() for entry in re.split(r"(?m)^\W{0,2}(?=--\w)", text)[1:]]
    assert len(entries) == len(as_flags(Config())) + 6
    assert [entry for entry in entries if "(default:" in entry[:4]] == []


def test_help_shows_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--preset", "paper-800", "--help"])
    assert "(default: 800)" in capsys.readouterr().out


def test_help_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys, fastdino.cli\n"
        "try: fastdino.cli.parse(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'nvidia', 'triton', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    seconds = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        seconds.append(used.ru_utime + used.ru_stime)
    assert min(seconds) < 1.5  # of the processor; 0.3 s on a machine of one's own


def test_importing_fastdino_imports_no_torch() -> None:
    modules = "fastdino, fastdino.config, fastdino.cli, fastdino.dryrun"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dry_run_without_data(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "train.py"), "--dry_run", "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "21,665,664 parameters" in result.stdout and "113.4 G" in result.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_counts_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path, 7)
    assert main(["--data_path", str(tmp_path), "--batch_size", "2", "--epochs", "10", "--dry_run"]) == 0
    assert "30 (10 epochs of 3 steps)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--data_path", str(tmp_path), "--batch_size", "8", "--dry_run"])
    assert stop.value.code == 2
    assert f"--data_path {tmp_path}: fewer images than a batch of 8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--data_path", str(tmp_path), "--eval_data_path", "nowhere", "--dry_run"])
    assert stop.value.code == 2
    assert "--eval_data_path: no such file or folder: nowhere" in capsys.readouterr().err


def test_missing_packages_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\")")
    line = [sys.executable, str(ROOT / "train.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "tyro" in result.stderr and ".venv/bin/activate" in result.stderr


def test_without_dali_the_command_ends_before_it_begins(tmp_path: Path) -> None:
    images(tmp_path / "photos", 4)
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    words = ["--data_path", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out")]
    line = [sys.executable, str(ROOT / "train.py"), *words]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "NVIDIA DALI reads the images but is not installed" in result.stderr


def test_preview_crops_writes_a_contact_sheet_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path / "data", 3)
    out = tmp_path / "out"
    line = ["--data_path", str(tmp_path / "data"), "--output_dir", str(out), "--preview_crops", "2"]
    assert main(line) == 0
    assert capsys.readouterr().out.split()[-1] == str(out / "crops.png")
    assert [path.name for path in out.iterdir()] == ["crops.png"]


def test_wandb_is_asked_for_only_when_it_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flag in ("--log", "--logger"):
        message = refused(f"{flag} wandb", capsys)
        assert "--logger: wandb is not installed (pip install wandb)" in message


def test_torchrun_passes_the_flags_on(tmp_path: Path) -> None:
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py"
    line = [*launch.split(), *"--batch_size 128 --logger none --print_config".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *line], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("batch_size: 128\n") == 1  # the first process alone prints


def test_bad_data_path_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for action in (["--dry_run"], []):
        line = [sys.executable, str(ROOT / "train.py"), "--data_path", str(tmp_path / "none"), *action]
        result = subprocess.run([*line, "--output_dir", str(tmp_path)], capture_output=True, text=True)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert str(tmp_path / "none") in result.stderr.strip().splitlines()[-1]


def test_with_flags_and_argv_agree() -> None:
    line = ["--lr", "0.1", "--global_crops_scale", "0.3", "0.9", "--prescan", "off", "--num_heads", "3"]
    values = {"lr": 0.1, "global_crops_scale": [0.3, 0.9], "prescan": False, "num_heads": 3}
    assert parse(line)[0] == with_flags(Config(), values)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_log_of_the_first_process_and_what_only_another_one_knows(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logging.getLogger("fastdino"), "handlers", [])
    _show_log()
    logging.getLogger("fastdino.data.loader").info("decoded")
    logging.getLogger("fastdino.data.prescan").warning("3 bad files")
    logging.getLogger("fastdino.data.loader").warning("a.jpg replaced")
    for name in ("fastdino", "fastdino.data.prescan"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    expected = ["decoded", "3 bad files", "a.jpg replaced"] if rank == "0" else ["process 1: a.jpg replaced"]
    assert capsys.readouterr().err.splitlines() == expected
