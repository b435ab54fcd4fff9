import json
import resource
from pathlib import Path

import pytest
import torch

from fastdino.engine import checkpoint
from fastdino.engine.checkpoint import CheckpointError, Disk, latest, load, prune, save
from fastdino.engine.stored import seal


def contents(value: float):
    model = {"student.w": torch.full((5, 3), value), "center": torch.arange(4.0) + value}
    optimizer = {"exp_avg.w": torch.full((5, 3), -value), "step.w": torch.tensor(value)}
    return model, optimizer, {"epoch": 0, "note": "é"}


def assert_holds(path, value):
    model, optimizer, meta = load(path)
    expected = contents(value)
    for got, want in ((model, expected[0]), (optimizer, expected[1])):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)
    assert meta["note"] == "é" and meta["format"] == checkpoint.FORMAT


def test_round_trip_and_latest(tmp_path):
    assert latest(tmp_path) is None
    for step in (3, 12):
        save(tmp_path, step, *contents(float(step)))
    newest = latest(tmp_path)
    assert newest is not None and checkpoint.step_of(newest) == 12
    assert_holds(newest, 12.0)


def test_non_contiguous_and_16_bit_tensors_survive(tmp_path):
    tensors = {"t": torch.arange(12.0).reshape(3, 4).t(), "h": torch.randn(3).bfloat16()}
    model, _, _ = load(save(tmp_path, 1, tensors, {}, {}))
    assert torch.equal(model["t"], tensors["t"]) and torch.equal(model["h"], tensors["h"])


def test_every_damage_is_detected_and_the_older_checkpoint_is_used(tmp_path):
    save(tmp_path, 1, *contents(1.0))
    newest = save(tmp_path, 2, *contents(2.0))
    generator = torch.Generator().manual_seed(0)
    for file in sorted(newest.iterdir()):
        original = file.read_bytes()
        positions = torch.randint(len(original) * 8, (40,), generator=generator).tolist()
        damaged = [_flip(original, bit) for bit in positions] + [
            original[:-1],
            original[: len(original) // 2],
            b"",
            original + b" ",
        ]
        for data in damaged:
            file.write_bytes(data)
            with pytest.raises(CheckpointError, match=file.name):
                load(newest)
        with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT"):
            assert_holds(latest(tmp_path), 1.0)
        file.write_bytes(original)
    (newest / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        load(newest)


def _flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def test_saving_over_a_damaged_checkpoint_sets_it_aside(tmp_path):
    path = save(tmp_path, 5, *contents(5.0))
    (path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="set aside"):
        save(tmp_path, 5, *contents(6.0))
    assert_holds(path, 6.0)
    assert (tmp_path / "damaged-step-00000005" / "model.safetensors").read_bytes() == b"nonsense"


def test_prune_keeps_the_newest_valid_ones_and_the_marked_ones(tmp_path):
    for step in range(1, 7):
        model, optimizer, meta = contents(float(step))
        save(tmp_path, step, model, optimizer, meta | {"keep": step == 2})
    (tmp_path / "step-00000006" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT.*kept as damaged-step-00000006"):
        prune(tmp_path, keep_last=2)
    left = [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)]
    assert left == [5, 4, 2]  # 6 is damaged: evidence, and not counted among the two newest
    assert (tmp_path / "damaged-step-00000006" / "optimizer.safetensors").exists()
    with pytest.raises(ValueError, match="keep_last: expected at least 1, got 0"):
        prune(tmp_path, keep_last=0)


def test_format_of_another_version_is_refused(tmp_path):
    path = save(tmp_path, 1, *contents(1.0))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    (path / "manifest.json").write_bytes(seal(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load(path)


def test_a_checkpoint_of_the_first_release_loads(tmp_path):
    golden = Path(__file__).parent / "format1" / "step-00000007"
    model, optimizer, meta = load(golden)
    rows = (torch.arange(15.0) / 7).reshape(5, 3)
    assert torch.equal(model["student.w"], rows) and torch.equal(optimizer["exp_avg.student.w"], -rows)
    assert torch.equal(model["student.h"], (torch.arange(6.0) / 3).bfloat16())
    assert torch.equal(model["center"], torch.arange(4.0) + 7)
    assert torch.equal(optimizer["step.student.w"], torch.tensor(7.0))
    assert meta == {"epoch": 0, "format": 1, "keep": True, "note": "é", "step": 7}
    again = save(tmp_path, 7, model, optimizer, {"epoch": 0, "keep": True, "note": "é"})
    for file in golden.iterdir():  # and what one process writes has not changed
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_a_file_that_does_not_fit_on_the_disk_is_named(tmp_path):
    save(tmp_path, 1, *contents(1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*optimizer\.safetensors"):
            save(tmp_path, 2, {}, {"large": torch.zeros(2000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_holds(latest(tmp_path), 1.0)


def test_disk_errors_name_the_path_and_leave_the_previous_checkpoint(tmp_path):
    class Full(Disk):
        pauses = (0.0,)

        def write(self, path, data):
            raise OSError(28, "No space left on device", str(path))

    save(tmp_path, 1, *contents(1.0))
    with pytest.raises(OSError, match="No space left on device.*model.safetensors"):
        save(tmp_path, 2, *contents(2.0), disk=Full())
    assert_holds(latest(tmp_path), 1.0)
