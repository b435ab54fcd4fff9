"""Goal 3: a disk that fails in any operation costs no checkpoint, and says what happened. Goal 24: an output
directory that cannot be written is told at once, and one that is lost at its next use."""

import contextlib
import errno
import os
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from fastdino.engine import exits
from fastdino.engine.checkpoint import CheckpointError, Saver, latest, load, prune, step_of
from fastdino.engine.stored import SAVING
from reliability.fault_fs import CHANGES, READS, FaultDisk
from reliability.promises import cases_of, promise
from reliability.toy_state import META, assert_holds, contents, save_all, save_part, save_whole
from runs import command, environment

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
LASTS = {errno.ENOSPC: "there", errno.EDQUOT: "there", errno.EIO: "there", errno.EROFS: "everywhere"}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def mounted(at: Path, *arguments: str):
    """``mount`` with these arguments on ``at``; skips where that is refused."""
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def save_2(root: Path, world: int, rank: int, disk: FaultDisk) -> None:
    if world == 1:
        save_whole(root, 2, 2.0, disk=disk)
        return
    for writer in (1, 0):
        save_part(root, 2, 2.0, writer, 2, "b", timeout=0, disk=disk if writer == rank else None)


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_an_error_that_stays(memory, world, rank):
    save = save_all if world == 2 else save_whole
    counting = FaultDisk(of=CHANGES + READS)
    save(memory / "count", 1, 1.0, *([2] if world == 2 else []))
    save_2(memory / "count", world, rank, counting)
    with promise(3, f"an error that stays, in process {rank} of {world}") as cases:
        for number in ERRORS:
            for point in range(1, counting.count + 1):
                operation = counting.log[point - 1]
                name = errno.errorcode[number]
                with cases.case(f"{name} in {operation[:3]}"):
                    root = memory / f"{name}{point}"
                    save(root, 1, 1.0, *([2] if world == 2 else []))
                    disk = FaultDisk(point, error=number, lasts=LASTS[number], of=CHANGES + READS)
                    with pytest.raises(OSError) as caught:
                        save_2(root, world, rank, disk)
                    text = str(caught.value)
                    assert name in text and str(root) in text, text
                    assert " bytes" in text or operation.name in READS, text
                    assert caught.value.errno == number
                    if number != errno.EROFS:  # does not pass
                        assert disk.failures >= 4 and "tried 4 times" in text, text
                    path = latest(root)
                    flushed = operation.name == "sync_directory" and operation.path.name == "count"
                    assert path is not None and step_of(path) == (2 if flushed else 1)
                    assert_holds(path, float(step_of(path)))
                    if world == 1 and number != errno.EROFS and operation.name != "unlink":
                        assert not list(root.glob(f"{SAVING}*")), "it takes up the room that is missing"
                    save(root, 3, 3.0, *([2] if world == 2 else []))  # the disk is well again
                    assert_holds(latest(root), 3.0)


def test_an_error_that_passes(memory):
    counting = FaultDisk(of=CHANGES + READS)
    save_whole(memory / "count", 2, 2.0, disk=counting)
    with promise(3, "an error that passes before the fourth try") as cases:
        for number in ERRORS[:3]:
            for point in range(1, counting.count + 1):
                for times in (1, 3):
                    with cases.case(
                        f"{errno.errorcode[number]} {times} times at {counting.log[point - 1][:3]}"
                    ):
                        root = memory / f"{number}-{point}-{times}"
                        disk = FaultDisk(point, error=number, lasts=times, of=CHANGES + READS)
                        save_whole(root, 2, 2.0, disk=disk)
                        assert disk.failures == times
                        assert_holds(latest(root), 2.0)
                        assert not list(root.glob(".*"))


def test_errors_while_removing_are_no_reason_to_stop(memory):
    for step in (1, 2):
        save_whole(memory / "count", step, float(step))
    counting = FaultDisk()
    prune(memory / "count", keep_last=1, disk=counting)
    with promise(3, "errors while old checkpoints are removed") as cases:
        for point in range(1, counting.count + 1):
            with cases.case(str(counting.log[point - 1][:2])):
                root = memory / f"{point}"
                for step in (1, 2):
                    save_whole(root, step, float(step))
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    prune(root, keep_last=1, disk=FaultDisk(point, error=errno.EIO, lasts="there"))
                assert any("EIO" in str(w.message) and str(root) in str(w.message) for w in told)
                assert_holds(latest(root), 2.0)
                save_whole(root, 3, 3.0)
                assert not list(root.glob(".*"))


def test_a_disk_that_cannot_be_read_is_not_an_empty_one(memory):
    path = save_whole(memory, 1, 1.0)
    with promise(3, "errors while reading") as cases:
        for point in range(1, 7):
            with cases.case(f"read {point}"):
                disk = FaultDisk(point, error=errno.EIO, lasts="there", of=READS)
                with pytest.raises((OSError, CheckpointError), match="EIO"):
                    latest(memory, quarantine=True, disk=disk)
                assert path.is_dir()
                disk = FaultDisk(point, error=errno.EIO, lasts=3, of=READS)
                assert latest(memory, disk=disk) == path


def test_a_background_save_that_cannot_succeed_is_told_at_once(memory):
    with promise(3, "a failed save stops the run") as cases, cases.case("EROFS"):
        saver = Saver(memory, disk=FaultDisk(1, error=errno.EROFS, lasts="everywhere"))
        saver.start(1, *contents(1.0), META)
        with pytest.raises(OSError, match="EROFS"):
            for _ in range(1000):
                saver.check()
                time.sleep(0.01)
    with promise(3, "a failed save is made up for by the next") as cases, cases.case("ENOSPC"):
        saver = Saver(memory, disk=FaultDisk(1, error=errno.ENOSPC, lasts=4))
        saver.start(1, *contents(1.0), META)
        saver._thread.join()
        saver.check()
        saver.start(2, *contents(2.0), META)
        saver.wait()
        assert_holds(latest(memory), 2.0)


def test_a_file_system_of_one_mebibyte(tmp_path):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as root:
        save_whole(root, 1, 1.0)
        with promise(3, "a real tmpfs that is full") as cases:
            for room in range(0, 40_960, cases_of(ci=4096, nightly=1024)):
                with cases.case(f"{room} bytes are free"):
                    filler = root / "filler"
                    free = os.statvfs(root).f_bavail * os.statvfs(root).f_bsize
                    filler.write_bytes(bytes(free - room // 4096 * 4096))
                    disk = FaultDisk()
                    try:
                        save_whole(root, 2, 2.0, disk=disk)
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error
                        assert "ENOSPC: No space left on device" in str(error) and " bytes" in str(error)
                        assert f"'{root}/" in str(error)
                        assert not list(root.glob("step-00000002")) and not list(root.glob(f"{SAVING}*"))
                        assert_holds(latest(root), 1.0)
                    filler.unlink()
                    assert_holds(save_whole(root, 2, 2.0), 2.0)
                    assert_holds(latest(root), 2.0)
                    subprocess.run(["rm", "-r", str(root / "step-00000002")], check=True)


# -- the training command ------------------------------------------------------------------------------------


def start(data: Path, out: Path, *flags: str, processes: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        command(data, out, *flags, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=Path(__file__).parent,
    )


def test_a_full_disk_ends_training_with_74(images, tmp_path):
    with mounted(tmp_path / "out", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as out:
        (out / ".filler").write_bytes(bytes(300_000))
        with promise(3, "the training command on a disk that is too small") as cases, cases.case("tmpfs"):
            done = start(images, out, "--epochs", "200", "--save_every", "3", "--log_every", "100")
            text = "".join(done.communicate(timeout=120))
            assert done.returncode == exits.DISK, text
            assert "ENOSPC: No space left on device" in text and "tried 4 times" in text, text
            assert str(out / "checkpoints") in text and "Traceback" not in text, text
            assert all(load(path) for path in (out / "checkpoints").glob("step-*"))


def test_a_lost_output_directory_ends_training_with_74(images, tmp_path):
    out = tmp_path / "out"
    with promise(24, "the output directory is removed during training") as cases, cases.case("removed"):
        process = start(images, out, "--epochs", "200", "--log_every", "1")
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        out.rename(tmp_path / "gone")
        text = "".join(process.communicate(timeout=120))
        assert process.returncode == exits.DISK, text
        assert "removed or replaced" in text and str(out) in text and "Traceback" not in text, text
        assert not out.exists()


@pytest.mark.parametrize("kind", ["read-only", "full", "a file", "below a file"])
def test_an_output_directory_that_cannot_be_written_is_told_before_anything_else(tmp_path, kind):
    with contextlib.ExitStack() as stack:
        out = tmp_path / "out"
        if kind == "read-only":
            (tmp_path / "writable").mkdir()
            stack.enter_context(mounted(out, "--bind", str(tmp_path / "writable")))
            subprocess.run(["mount", "-o", "remount,ro,bind", str(out)], check=True)
        elif kind == "full":
            stack.enter_context(mounted(out, "-t", "tmpfs", "-o", "size=1m", "tmpfs"))
            (out / ".filler").write_bytes(bytes(1 << 20))
        else:
            out.write_text("a file")
            out = out / "run" if kind == "below a file" else out
        with promise(24, "an output directory that cannot be written") as cases, cases.case(kind):
            process = start(Path("/nonexistent/data"), out)
            text = process.stderr.read()
            _, status, used = os.wait4(process.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code == (exits.USAGE if "file" in kind else exits.OUTPUT), text
            assert f"--output_dir {out}" in text and len(text.strip().splitlines()) == 1, text
            assert used.ru_utime + used.ru_stime < 2, "torch was imported before"
