"""Foreign files are opened without running them, and damage is found."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdino.engine import checkpoint
from fastdino.interop.files import WeightsError, find_checkpoint, read_pickle, write_pickle


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_namespaces_and_numpy_numbers(tmp_path, legacy) -> None:
    contents = {
        "weight": torch.arange(6.0).view(2, 3),
        "args": argparse.Namespace(lr=0.1, crops=(0.4, 1.0), none=None),
        "numbers": [np.float64(1 / 3), np.float32(0.1), np.int64(-5), np.bool_(True)],
    }
    torch.save(contents, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = read_pickle(tmp_path / "a.pth")
    assert torch.equal(found["weight"], contents["weight"])
    assert found["args"] == contents["args"]
    assert found["numbers"] == contents["numbers"]
    assert [type(n) for n in found["numbers"]] == [float, float, int, bool]


def test_other_byte_order(tmp_path) -> None:
    torch.save([np.dtype(">f8").type(0)], tmp_path / "a.pth")
    big = np.array([1 / 3], dtype=">f8")[0]
    torch.save({"lr": big}, tmp_path / "b.pth")
    assert read_pickle(tmp_path / "b.pth") == {"lr": 1 / 3}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "posix.system"),
        (eval, ("open({marker!r}, 'w')",), "builtins.eval"),
        (exec, ("open({marker!r}, 'w')",), "builtins.exec"),
        (open, ("{marker}", "w"), "io.open"),
        (subprocess.Popen, (["touch", "{marker}"],), "subprocess.Popen"),
        (getattr, (os, "system"), "builtins.getattr"),
        (np.load, ("{marker}",), "numpy.load"),
    ],
)
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, function, arguments, name, legacy) -> None:
    marker = tmp_path / "marker"
    if function is getattr:
        arguments = ("os", "system")
    filled = [
        [word.format(marker=str(marker)) for word in a]
        if isinstance(a, list)
        else a.format(marker=str(marker))
        for a in arguments
    ]
    path = tmp_path / "evil.pth"
    torch.save({"teacher": Call(function, *filled)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="refused, it wants to call") as error:
        read_pickle(path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(Call(function, *filled), protocol=2))
    with pytest.raises(WeightsError, match="evil.pth"):
        read_pickle(path)
    assert not marker.exists()


def test_reading_a_malicious_pickle_starts_nothing(tmp_path) -> None:
    """An audit hook in a process of its own sees every call to the system."""
    torch.save({"x": torch.ones(2)}, tmp_path / "good.pth")
    torch.save(
        {"x": torch.ones(2), "y": Call(os.system, f"touch {tmp_path / 'marker'}")}, tmp_path / "evil.pth"
    )
    program = """
import sys
from fastdino.interop.files import WeightsError, read_pickle
read_pickle(sys.argv[2])  # so that what torch imports on first use is imported
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
try:
    read_pickle(sys.argv[1])
except WeightsError as error:
    print("refused:", error)
bad = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "exec")
print("events:", sorted({e for e in seen if e in bad}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "evil.pth"), str(tmp_path / "good.pth")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "refused:" in result.stdout and "posix.system" in result.stdout
    assert "events: []" in result.stdout
    assert not (tmp_path / "marker").exists()


def test_objects_with_harmless_looking_classes_are_refused(tmp_path) -> None:
    torch.save({"path": Path("/etc")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="refused, it wants to call pathlib"):
        read_pickle(tmp_path / "a.pth")


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.randn(64, 64), "bias": torch.randn(64)}, path)
    intact = path.read_bytes()
    generator = np.random.default_rng(0)
    silent = 0
    want = read_pickle(path)
    for position in generator.integers(0, len(intact), 300):
        data = bytearray(intact)
        data[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        try:
            found = read_pickle(path)
        except WeightsError as error:
            assert str(path) in str(error)
            continue
        # Bits of the archive's own bookkeeping may be without effect; the contents must then be intact.
        assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
        silent += 1
    assert silent < 100


def test_truncated_empty_and_foreign_files(tmp_path) -> None:
    torch.save({"weight": torch.randn(64, 64)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "bad.pth"
    for contents in (
        b"",
        data[:100],
        data[:-1],
        data[: len(data) // 2],
        b"\x89PNG\r\n",
        b"not a pickle",
        b"\x80\x02",
    ):
        path.write_bytes(contents)
        with pytest.raises(WeightsError, match="bad.pth"):
            read_pickle(path)


def test_missing_file_and_directory(tmp_path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            read_pickle(path)


def test_write_is_atomic(tmp_path) -> None:
    path = tmp_path / "a.pth"
    write_pickle(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        write_pickle(path, {"x": lambda: None})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]
    write_pickle(path, {"x": torch.zeros(3)})
    assert not read_pickle(path)["x"].any()


def test_find_checkpoint(tmp_path) -> None:
    tensors = {"x": torch.ones(2)}
    root = tmp_path / "run" / "checkpoints"
    first = checkpoint.save(root, 1, tensors, tensors, {})
    second = checkpoint.save(root, 2, tensors, tensors, {})
    assert find_checkpoint(first) == first
    assert find_checkpoint(root) == find_checkpoint(tmp_path / "run") == second
    (second / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="DAMAGED"):
        assert find_checkpoint(tmp_path / "run") == first
    with pytest.raises(WeightsError, match="neither a checkpoint nor a run directory"):
        find_checkpoint(tmp_path)
