from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import demo
from fastdino.data.demo import CLASS_NAMES, write_demo


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "set", n_train=33, n_val=20, size=64, num_threads=2)


def test_image_folder_layout(folder: Path) -> None:
    train, val = list(folder.glob("train/*/*.jpg")), list(folder.glob("val/*/*.jpg"))
    assert (len(train), len(val)) == (33, 20)
    assert {p.parent.name for p in train} == {p.parent.name for p in val} == set(CLASS_NAMES)
    counts = [len(list((folder / "train" / c).iterdir())) for c in CLASS_NAMES]
    assert max(counts) - min(counts) <= 1
    for path in train + val:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_every_val_image_has_its_mask(folder: Path) -> None:
    images = {(p.parent.name, p.stem) for p in folder.glob("val/*/*.jpg")}
    masks = {(p.parent.name, p.stem): p for p in folder.glob("masks/val/*/*.png")}
    assert images == set(masks)
    for path in masks.values():
        mask = np.asarray(Image.open(path))
        assert mask.shape == (64, 64) and set(np.unique(mask)) == {0, 255}
        assert 0.1 < (mask > 0).mean() < 0.9


def test_same_seed_same_bytes_for_any_number_of_threads_and_images(tmp_path: Path, folder: Path) -> None:
    other = write_demo(tmp_path / "again", n_train=50, n_val=20, size=64, num_threads=1)
    small, large = digest(folder), digest(other)
    del small["demo.json"]
    assert small.items() <= large.items()


def test_seed_and_split_change_every_image(tmp_path: Path, folder: Path) -> None:
    other = write_demo(tmp_path / "seed1", n_train=33, n_val=20, size=64, seed=1, num_threads=2)
    images = [*digest(folder).items(), *digest(other).items()]
    hashes = [h for name, h in images if name.endswith((".jpg", ".png"))]
    assert len(set(hashes)) == len(hashes)


def test_finished_folder_is_reused(tmp_path: Path) -> None:
    root = write_demo(tmp_path / "set", n_train=10, n_val=10, size=32)
    image = next(root.glob("train/*/*.jpg"))
    before = image.stat().st_mtime_ns
    assert write_demo(root, n_train=10, n_val=10, size=32) == root
    assert image.stat().st_mtime_ns == before


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    root = write_demo(tmp_path / "set", n_train=10, n_val=10, size=32)
    with pytest.raises(FileExistsError, match="not the demo data set"):
        write_demo(root, n_train=10, n_val=10, size=32, seed=7)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="mine"):
        write_demo(mine, n_train=10, n_val=10, size=32)
    assert (mine / "thesis.txt").read_text() == "do not delete"


def test_crash_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = demo._write_batch, []

    def fail_late(*args: object) -> None:
        calls.append(args)
        if len(calls) == 15:
            raise OSError("disk full")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "_write_batch", fail_late)
    with pytest.raises(OSError, match="disk full"):
        write_demo(tmp_path / "set", n_train=10, n_val=10, size=32, num_threads=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert (write_demo(tmp_path / "set", n_train=10, n_val=10, size=32) / "demo.json").is_file()


def test_an_error_stops_the_remaining_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*args: object) -> None:
        calls.append(args)
        raise OSError("disk full")

    monkeypatch.setattr(demo, "_write_batch", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo(tmp_path / "set", n_train=60_000, n_val=10, size=32, num_threads=1)
    assert len(calls) == 1  # of 10,010 batches


def test_remains_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", ""])
    writer.wait()
    dead, alive = tmp_path / f".set.{writer.pid}.part", tmp_path / f".set.{os.getppid()}.part"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "half.jpg").write_bytes(b"")
    write_demo(tmp_path / "set", n_train=10, n_val=10, size=32)
    assert not dead.exists()
    assert (alive / "half.jpg").exists()


@pytest.mark.parametrize("bad", [{"n_train": 9}, {"n_val": 0}, {"size": 8}, {"seed": -1}])
def test_bad_settings_name_the_argument(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        write_demo(tmp_path / "set", **bad)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_mask_covers_the_object_and_not_the_background() -> None:
    """Inside the mask is the material: its local contrast exceeds that of the blurred background."""
    for name in CLASS_NAMES:
        images, masks = demo._render(name, demo._streams(0, "val", name, range(8)), 96)
        gray = images.astype(np.float32).mean(-1)
        edges = np.abs(np.diff(gray, axis=1))[:, :, :-1] + np.abs(np.diff(gray, axis=2))[:, :-1]
        inside = masks[:, :-1, :-1] > 0
        assert edges[inside].mean() > 2 * edges[~inside].mean(), name


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "fresh"
    words = ["demo", str(root), "--seed", "1", "--n_train", "10", "--n_val", "10", "--size", "16"]
    monkeypatch.setattr("sys.argv", words)
    demo.main()
    assert capsys.readouterr().out == f"{root}\n" and len(list(root.glob("train/*/*.jpg"))) == 10
    monkeypatch.setattr("sys.argv", [*words[:3], "2"])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "is not the demo data set asked for" in capsys.readouterr().err
