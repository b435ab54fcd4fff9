"""Checkpoints of several writers, and saves in the background."""

import json
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdino.engine import checkpoint
from fastdino.engine.checkpoint import CheckpointError, Disk, Piece, Saver, latest, load, save
from fastdino.engine.stored import seal
from reliability.toy_state import META, assert_holds, contents, part, save_all, save_part


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_pieces_become_whole_tensors(tmp_path, world):
    path = save_all(tmp_path, 3, 3.0, world)
    assert_holds(path, 3.0)
    assert latest(tmp_path) == path and checkpoint.read_meta(path)["format"] == checkpoint.SHARDED_FORMAT
    assert (path / f"model-{world:05d}-of-{world:05d}.safetensors").exists()
    assert not list(tmp_path.glob(".saving-*")) and not list(path.glob(".*"))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_cut_is_put_together(tmp_path_factory, data):
    world, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=world - 1, max_size=world - 1)))
    order = data.draw(st.permutations(range(world)))  # which process holds which chunk
    whole, edges = torch.randn(rows, 2), [0, *cuts, rows]
    root = tmp_path_factory.mktemp("cut")
    for rank in reversed(range(world)):
        start, stop = edges[order[rank]], edges[order[rank] + 1]
        model = {"w": Piece(whole[start:stop], start, rows)}
        path = save(root, 1, model, {}, {}, rank=rank, world_size=world, attempt="a", timeout=0)
    assert torch.equal(load(path)[0]["w"], whole)


def test_writers_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for step in (1, 2, 3):
            jobs = [
                pool.submit(save_part, tmp_path, step, float(step), rank, 4, f"attempt{step}", timeout=60)
                for rank in range(4)
            ]
            assert {job.result() for job in jobs} == {tmp_path / f"step-{step:08d}"}
    for step in (1, 2, 3):
        assert_holds(tmp_path / f"step-{step:08d}", float(step))


def test_one_replica_writes_and_whole_tensors_are_written_once(tmp_path):
    model, optimizer = contents(1.0)
    for rank in (None, 1):  # nothing is in pieces: rank 0 alone writes, in the format of one process
        path = save(tmp_path, 1, model, optimizer, META, rank=rank, world_size=2, attempt="a")
        assert not path.exists() and not list(tmp_path.iterdir())
    save(tmp_path, 1, model, optimizer, META, rank=0, world_size=2, attempt="a", timeout=0)
    names = {"model.safetensors", "optimizer.safetensors", "meta.json", "manifest.json"}
    assert {p.name for p in path.iterdir()} == names
    assert checkpoint.read_meta(path)["format"] == checkpoint.FORMAT
    assert_holds(path, 1.0)
    pieces = part(model, 0, 2)
    assert not save(tmp_path, 2, pieces, {}, META, rank=None, world_size=2, attempt="b").exists()


def test_what_a_crashed_attempt_left_is_not_taken(tmp_path):
    save_part(tmp_path, 1, 1.0, 1, 2, "crashed")
    with pytest.raises(TimeoutError):
        save_part(tmp_path, 1, 2.0, 0, 2, "new", timeout=0)
    save_part(tmp_path, 1, 3.0, 1, 2, "newer")
    assert_holds(save_part(tmp_path, 1, 3.0, 0, 2, "newer", timeout=0), 3.0)
    checkpoint.remove_unfinished(tmp_path, "new")
    assert [p.name for p in tmp_path.glob(".saving-*")] == [".saving-00000001-new"]


def test_a_writer_that_never_comes_is_named(tmp_path):
    save_part(tmp_path, 1, 1.0, 1, 4, "a")
    with pytest.raises(TimeoutError, match=r"rank 2, 3 has not written .* within 0\.1 s.*rank-00003\.json"):
        save_part(tmp_path, 1, 1.0, 0, 4, "a", timeout=0.1)
    assert latest(tmp_path) is None


def test_an_existing_checkpoint_is_left_and_a_damaged_one_replaced(tmp_path):
    path = save_all(tmp_path, 1, 1.0, 2, "a")
    save_all(tmp_path, 1, 2.0, 2, "b")
    assert_holds(path, 1.0)
    assert not list(tmp_path.glob(".saving-*"))
    (path / "optimizer-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="set aside"):
        save_all(tmp_path, 1, 3.0, 2, "c")
    assert_holds(path, 3.0)


def test_every_damage_is_detected_and_the_older_checkpoint_is_used(tmp_path):
    save_all(tmp_path, 1, 1.0, 2)
    newest = save_all(tmp_path, 2, 2.0, 2)
    generator = torch.Generator().manual_seed(0)
    files = sorted(newest.iterdir())
    assert len(files) == 7
    for file in files:
        original = file.read_bytes()
        positions = torch.randint(len(original) * 8, (20,), generator=generator).tolist()
        flipped = [bytearray(original) for _ in positions]
        for data, bit in zip(flipped, positions, strict=True):
            data[bit // 8] ^= 1 << (bit % 8)
        for data in [*flipped, original[:-1], original[: len(original) // 2], b"", original + b" ", None]:
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            with pytest.raises(CheckpointError, match=file.name):
                load(newest)
            with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT"):
                assert checkpoint.step_of(latest(tmp_path)) == 1
            file.write_bytes(original)
    assert_holds(newest, 2.0)


def test_swapped_and_unlisted_files_are_detected(tmp_path):
    path = save_all(tmp_path, 1, 1.0, 2)
    one, two = (path / f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))
    pair = one.read_bytes(), two.read_bytes()
    one.write_bytes(pair[1])
    two.write_bytes(pair[0])
    with pytest.raises(CheckpointError, match=one.name):
        load(path)
    one.write_bytes(pair[0])
    two.write_bytes(pair[1])
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"], manifest["files"][two.name]
    (path / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(CheckpointError, match=f"{two.name}: does not belong here"):
        load(path)
    two.unlink()
    with pytest.raises(
        CheckpointError, match=f"{one.name}: [wh] has a gap: rows [34] to [57] are in no file"
    ):
        checkpoint.verify(path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Piece(torch.ones(2, 2), 0, 5), Piece(torch.ones(2, 2), 3, 5), "00002-of-00002.*: w has a gap"),
        (Piece(torch.ones(3, 2), 0, 4), Piece(torch.ones(2, 2), 2, 4), "00002-of-00002.*: w has an overlap"),
        (Piece(torch.ones(2, 2), 1, 4), Piece(torch.ones(1, 2), 3, 4), "00001-of-00002.*: w has a gap"),
        (Piece(torch.ones(2, 2), 0, 5), Piece(torch.ones(2, 2), 2, 5), "w has a gap: rows 4 to 5 are in no"),
        (Piece(torch.ones(2, 2), 0, 4), Piece(torch.ones(2, 2), 2, 6), "w is F32 .*6, 2.*in another file"),
        (Piece(torch.ones(2, 2), 0, 4), Piece(torch.ones(2, 3), 2, 4), "w is F32 .*4, 3.*in another file"),
        (Piece(torch.ones(2, 2), 0, 4), Piece(torch.ones(2, 2).half(), 2, 4), "w is F16"),
        (torch.ones(4, 2), Piece(torch.ones(2, 2), 2, 4), "w has an overlap"),
    ],
)
def test_pieces_that_do_not_fit_together_are_refused(tmp_path, first, second, message):
    model = {"v": Piece(torch.ones(1), 0, 1)}
    save(tmp_path, 1, {"w": second}, {}, {}, rank=1, world_size=2, attempt="a")
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, model | {"w": first}, {}, {}, rank=0, world_size=2, attempt="a", timeout=0)
    assert latest(tmp_path) is None


def test_hopeless_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without dimensions"):
        Piece(torch.tensor(1.0), 0, 1)
    for start in (-1, 3):
        with pytest.raises(ValueError, match=f"start: expected 0 to 2 for 2 of 4 rows, got {start}"):
            Piece(torch.ones(2), start, 4)
    with pytest.raises(ValueError, match="attempt"):
        save_part(tmp_path, 1, 1.0, 0, 2, "")
    with pytest.raises(ValueError, match="rank: expected None or 0 to 1, got 2"):
        save_part(tmp_path, 1, 1.0, 2, 2, "a")


def test_prune_and_set_aside_know_checkpoints_in_pieces(tmp_path):
    for step in range(1, 6):
        save_all(tmp_path, step, float(step), 2)
    (tmp_path / "step-00000005" / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT"):
        checkpoint.prune(tmp_path, keep_last=2)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [4, 3]
    assert (tmp_path / "damaged-step-00000005").is_dir()
    checkpoint.set_aside(tmp_path, 3)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [3]


# -- in the background ---------------------------------------------------------------------------------------


class GatedDisk(Disk):
    """Writes nothing before ``open`` is set."""

    def __init__(self):
        self.open = threading.Event()

    def write(self, path, data):
        assert self.open.wait(60)
        super().write(path, data)


def start(saver, step, value, rank=0, world=1, sharded=False, attempt=""):
    model, optimizer = contents(value)
    if sharded:
        model, optimizer = part(model, rank, world), part(optimizer, rank, world)
    saver.start(step, model, optimizer, META, rank=rank, world_size=world, attempt=attempt)
    return model, optimizer


@pytest.mark.parametrize("world", [1, 3])
def test_the_background_writes_the_same_bytes(tmp_path, world):
    sharded = world > 1
    for rank in reversed(range(world)):
        model, optimizer = (part(s, rank, world) if sharded else s for s in contents(1.0))
        path = save(
            tmp_path / "front", 1, model, optimizer, META,
            rank=rank, world_size=world, attempt="a", timeout=0,
        )  # fmt: skip
    savers = [Saver(tmp_path / "back") for _ in range(world)]
    for rank, saver in enumerate(savers):
        start(saver, 1, 1.0, rank, world, sharded, "b")
    for saver in savers:
        saver.wait()
    back = tmp_path / "back" / path.name
    assert {p.name for p in back.iterdir()} == {p.name for p in path.iterdir()}
    assert all((back / p.name).read_bytes() == p.read_bytes() for p in path.iterdir())


def test_training_may_change_the_tensors_at_once(tmp_path):
    disk = GatedDisk()
    saver = Saver(tmp_path, disk=disk)
    model, optimizer = contents(1.0)
    meta = META | {"counters": {"bad_steps": 0}}
    saver.start(1, model, optimizer, meta)
    for tensor in (*model.values(), *optimizer.values()):
        tensor.fill_(-7.0)
    meta["counters"]["bad_steps"] = 9
    assert not list(tmp_path.glob("step-*"))
    disk.open.set()
    saver.wait()
    assert_holds(latest(tmp_path), 1.0)
    assert load(latest(tmp_path))[2]["counters"] == {"bad_steps": 0}
    addresses = {t.data_ptr() for t in saver._copies._buffers.values()}
    assert len(addresses) == 7  # one per tensor, kept
    start(saver, 2, 2.0)
    saver.wait()
    assert {t.data_ptr() for t in saver._copies._buffers.values()} == addresses
    assert_holds(tmp_path / "step-00000001", 1.0)
    assert_holds(tmp_path / "step-00000002", 2.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_may_change_cuda_tensors_at_once(tmp_path):
    disk = GatedDisk()
    saver = Saver(tmp_path, disk=disk)
    large = torch.arange(50_000_000, device="cuda")
    torch.cuda._sleep(50_000_000)  # the copy is still in the queue when it is asked for
    large += 1
    saver.start(1, {"large": large}, {}, META)
    large.zero_()
    disk.open.set()
    saver.wait()
    assert torch.equal(load(latest(tmp_path))[0]["large"], torch.arange(1, 50_000_001))


def test_errors_come_out_of_wait_and_start(tmp_path):
    class Full(Disk):
        full, pauses = True, (0.0,)

        def write(self, path, data):
            if self.full:
                raise OSError(28, "No space left on device", str(path))
            super().write(path, data)

    disk = Full()
    saver = Saver(tmp_path, disk=disk)
    start(saver, 1, 1.0)
    with pytest.raises(OSError, match="No space left on device.*model.safetensors"):
        saver.wait()
    saver.wait()  # told once
    start(saver, 1, 1.0)
    with pytest.warns(UserWarning, match="NO CHECKPOINT, .*No space left on device"):
        start(saver, 2, 2.0)  # the next one is tried
    with pytest.raises(OSError, match="No space left on device"):
        start(saver, 3, 3.0)
    disk.full = False
    start(saver, 3, 3.0)
    saver.wait()
    assert_holds(latest(tmp_path), 3.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_rank_0_prunes_after_the_new_one_is_in_place(tmp_path):
    savers = [Saver(tmp_path), Saver(tmp_path)]
    for step in (1, 2, 3, 4):
        for rank, saver in enumerate(savers):
            start(saver, step, float(step), rank, 2, True, f"attempt{step}")
    for saver in savers:
        saver.wait()
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [4, 3]
    assert_holds(latest(tmp_path), 4.0)


EXITING = """
import sys, torch
from fastdino.engine.checkpoint import Piece, Saver
piece = {"w": Piece(torch.ones(1), 0, 2)}
Saver(sys.argv[1]).start(1, piece, {}, {}, rank=0, world_size=2, attempt="a")
"""


def test_a_process_that_ends_does_not_wait_for_the_others(tmp_path):
    subprocess.run(
        [sys.executable, "-c", EXITING, str(tmp_path)],
        check=True, timeout=60, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert latest(tmp_path) is None and len(list(tmp_path.glob(".saving-*"))) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from fastdino.engine.checkpoint import Saver
from reliability.fault_fs import FaultDisk
from reliability.toy_state import META, contents, save_whole

class KillingDisk(FaultDisk):
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

point, signals = 0, []
while not signals or signals[-1] == signal.SIGKILL:
    point += 1
    root = Path(sys.argv[1]) / str(point)
    save_whole(root, 1, 1.0)
    child = os.fork()
    if child == 0:
        saver = Saver(root, disk=KillingDisk((point + 1) // 2, after=point % 2 == 0))
        saver.start(2, *contents(2.0), META)
        saver.wait()
        os._exit(0)
    signals.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1)
print(len(signals))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_during_a_background_save_leaves_the_old_or_the_new(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    assert points == 33  # before and after each of 16 operations, and one save that went through
    steps = []
    for point in range(1, points + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = latest(tmp_path / str(point))
        steps.append(checkpoint.step_of(found))
        assert_holds(found, float(steps[-1]))
    assert steps == sorted(steps) and set(steps) == {1, 2}
