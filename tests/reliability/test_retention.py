"""Goal 26: whatever sequence of saves, crashes, errors, damage and removals, the last valid one stays."""

import random
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from fastdino.engine.checkpoint import (
    CheckpointError,
    checkpoints,
    latest,
    prune,
    save,
    set_aside,
    step_of,
)
from reliability.fault_fs import CHANGES, READS, Crash, FaultDisk
from reliability.promises import cases_of, promise
from reliability.toy_state import META, assert_holds, contents, save_all, save_part


class Run:
    """A run that dies and goes on, and what has been its newest valid checkpoint."""

    def __init__(self, root: Path, dice: random.Random):
        self.root, self.dice, self.step, self.history = root, dice, 0, list[str]()
        self.before: list[int] = []  # steps of the valid checkpoints
        self.keep_last, self.world = dice.choice((1, 2, 3)), dice.choice((1, 1, 2))

    def valid(self) -> list[int]:
        """Steps of the valid checkpoints, newest first, loaded one by one."""
        steps = []
        for path in checkpoints(self.root):
            with suppress(CheckpointError):
                assert_holds(path, float(step_of(path)))
                steps.append(step_of(path))
        return steps

    def do(self) -> None:
        """One event; the program's own never cost the newest valid checkpoint, nor those to keep."""
        before = self.before
        event = self.dice.choices(
            (self.save, self.prune, self.restart, self.harm, self.start_before), (8, 3, 3, 3, 0.5)
        )[0]
        self.history.append(event.__name__)
        try:
            event()
        except (Crash, OSError) as error:
            self.history[-1] += f" ({type(error).__name__})"
            self.restart()
        self.before = after = self.valid()
        if event == self.harm or not before:
            return
        everything = sorted({*before, *after}, reverse=True)
        if event == self.start_before:
            later = [step for step in everything if step > self.step]
            assert all(list(self.root.glob(f"old-step-{step:08d}*")) for step in later)
            everything = [step for step in everything if step <= self.step]
        assert set(everything[: self.keep_last]) <= set(after), f"{before} -> {after} after {self.history}"

    def disk(self) -> FaultDisk:
        """A well one, or one that dies or fails in one of the next operations."""
        point, kind = self.dice.randrange(1, 40), self.dice.choice(("well", "well", "crash", "once", "there"))
        if kind == "well":
            return FaultDisk()
        if kind == "crash":
            return FaultDisk(point, after=self.dice.random() < 0.5)
        return FaultDisk(point, error=5, lasts=1 if kind == "once" else kind, of=CHANGES + READS)

    def save(self) -> None:
        self.step += self.dice.choice((0, 1, 1, 1))  # 0: saved before, as after an epoch and a signal
        disk, value = self.disk(), float(self.step)
        meta = META | {"keep": self.dice.random() < 0.1}
        if self.world == 1:
            save(self.root, self.step, *contents(value), meta, disk=disk)
        else:
            attempt = f"{self.dice.random()}"[2:]
            save_part(self.root, self.step, value, 1, 2, attempt, timeout=0, disk=self.disk())
            save_part(self.root, self.step, value, 0, 2, attempt, timeout=0, disk=disk)
        prune(self.root, keep_last=self.keep_last, disk=disk)

    def prune(self) -> None:
        prune(self.root, keep_last=self.keep_last, disk=self.disk())

    def restart(self) -> None:
        newest = latest(self.root, quarantine=True)
        self.step = step_of(newest) if newest else 0
        set_aside(self.root, self.step if newest else -1)

    def start_before(self) -> None:
        """--resume with an older checkpoint: the later ones are set aside."""
        self.step = self.dice.choice(self.before or [0])
        set_aside(self.root, self.step)

    def harm(self) -> None:
        """A bit, a file or half a file of some checkpoint is lost."""
        files = [file for path in checkpoints(self.root) for file in sorted(path.iterdir())]
        if not files:
            return
        file, kind = self.dice.choice(files), self.dice.choice(("bit", "file", "half"))
        data = bytearray(file.read_bytes())
        if kind == "file" or not data:
            file.unlink()
        elif kind == "half":
            file.write_bytes(data[: len(data) // 2])
        else:
            data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
            file.write_bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_sequence_of_events_loses_the_last_valid_checkpoint(memory):
    with promise(26, "random sequences of saves, crashes, errors, damage and removals") as cases:
        for seed in range(cases_of(ci=60, nightly=10_000)):
            root = memory / str(seed)
            root.mkdir()
            with cases.case(f"seed {seed}"):
                run = Run(root, random.Random(seed))
                for _ in range(12):
                    run.do()
            shutil.rmtree(root)


def test_what_stays_after_pruning(memory):
    with promise(26, "pruning keeps the newest valid ones and those marked to be kept") as cases:
        for keep_last in (1, 2, 3):
            for damaged in ((), (6,), (6, 5), (3,), (6, 5, 4, 3, 2, 1)):
                with cases.case(f"keep {keep_last}, damaged {damaged}"):
                    root = memory / f"{keep_last}{damaged}"
                    for step in range(1, 7):
                        save_all(root, step, float(step), 2)
                    for step in damaged:
                        (root / f"step-{step:08d}" / "rank-00002.json").write_bytes(b"")
                    with warnings.catch_warnings(record=True) as told:
                        warnings.simplefilter("always")
                        prune(root, keep_last=keep_last)
                    intact = [step for step in range(6, 0, -1) if step not in damaged]
                    assert [step_of(p) for p in checkpoints(root)] == intact[:keep_last]
                    seen = [step for step in damaged if step > (intact[keep_last - 1 :] or [0])[0]]
                    assert len(told) == len(seen) == len(list(root.glob("damaged-*")))
