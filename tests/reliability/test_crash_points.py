"""Goal 2: whenever a save dies, whatever a power cut leaves of it, the old or the new checkpoint loads."""

import copy
import random
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from fastdino.engine.checkpoint import Saver, checkpoints, latest, prune, set_aside, step_of
from reliability.fault_fs import Crash, FaultDisk, Operation, PowerCut
from reliability.promises import cases_of, promise
from reliability.toy_state import META, assert_holds, contents, part, save_all, save_part, save_whole


def found(root: Path) -> int:
    """Step of the newest checkpoint, which must be whole; nothing damaged may stand under a final name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = latest(root)
    assert path is not None, "no checkpoint is left"
    for each in checkpoints(root):
        assert_holds(each, float(step_of(each)))
    return step_of(path)


def save_any(root: Path, step: int, value: float, world: int) -> Path:
    return save_whole(root, step, value) if world == 1 else save_all(root, step, value, world)


def save_2(root: Path, world: int, disk: FaultDisk, rank: int = 0) -> None:
    """The save of step 2 with ``disk`` under process ``rank``, and the pruning that follows it."""
    for writer in reversed(range(world)):
        mine = disk if writer == rank else None
        if world == 1:
            save_whole(root, 2, 2.0, disk=mine)
        else:
            save_part(root, 2, 2.0, writer, world, "b", timeout=0, disk=mine)
    prune(root, keep_last=1, disk=disk)


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_crash_point_of_a_save(memory, world, rank):
    save_any(memory / "count", 1, 1.0, world)
    counting = FaultDisk()
    save_2(memory / "count", world, counting, rank)
    seen = set()
    with promise(2, f"crash points of a save of process {rank} of {world} and its pruning") as cases:
        for point in range(1, counting.count + 1):
            for after in (False, True):
                with cases.case(f"{'after' if after else 'before'} {counting.log[point - 1][:3]}"):
                    root = memory / f"{point}{after}"
                    save_any(root, 1, 1.0, world)
                    with pytest.raises(Crash):
                        save_2(root, world, FaultDisk(point, after=after), rank)
                    if rank == 1:  # the other process waits for it, and has its part or not
                        with suppress(TimeoutError):
                            save_part(root, 2, 2.0, 0, world, "b", timeout=0)
                    step = found(root)
                    seen.add(step)
                    run_again(root, world, step)
    assert seen == {1, 2}


def run_again(root: Path, world: int, step: int) -> None:
    """The run starts from ``step``; what it saves next is in place, and nothing of the crash is left."""
    for writer in reversed(range(world)):
        state = [part(s, writer, world) if world > 1 else s for s in contents(3.0)]
        saver = Saver(root, timeout=0)
        saver.start(3, *state, META, rank=writer, world_size=world, attempt="c")
        saver.wait()
    assert found(root) == 3
    assert not list(root.glob(".*")), "left-overs"
    assert_holds(root / f"step-{step:08d}", float(step))


def test_every_crash_point_of_setting_aside(memory):
    with promise(2, "crash points of setting a damaged or later checkpoint aside") as cases:
        for number in range(1, 5):
            for after in (False, True):
                root = memory / f"{number}{after}"
                for step in (1, 2, 3):
                    save_whole(root, step, float(step))
                (root / "step-00000003" / "model.safetensors").write_bytes(b"nonsense")
                with cases.case(f"operation {number}, after: {after}"):
                    with pytest.raises(Crash), pytest.warns(UserWarning):
                        disk = FaultDisk(number, after=after)
                        latest(root, quarantine=True, disk=disk)
                        set_aside(root, 1, disk=disk)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        path = latest(root, quarantine=True)
                    assert path is not None and step_of(path) in (1, 2)
                    assert_holds(path, float(step_of(path)))
                    kept = {path.read_bytes() for path in root.glob("*/model.safetensors")}
                    assert len(kept) == 3, "a checkpoint is lost"


def logged(root: Path, world: int, dice: random.Random) -> list[Operation]:
    """All operations of a save of step 2, those of the processes mixed as they may come."""
    disks = [FaultDisk() for _ in range(world)]
    for writer in reversed(range(1, world)):
        save_part(root, 2, 2.0, writer, world, "b", timeout=0, disk=disks[writer])
    if world == 1:
        save_whole(root, 2, 2.0, disk=disks[0])
    else:
        save_part(root, 2, 2.0, 0, world, "b", timeout=0, disk=disks[0])
    own = disks[0].log
    waits = next(n for n, o in enumerate(own) if o.name == "create" and o.path.name == "manifest.json")
    before, mixed = [own[:waits], *(disk.log for disk in disks[1:])], []
    while any(before):
        mixed.append(dice.choice([log for log in before if log]).pop(0))
    return mixed + own[waits:]


@pytest.mark.parametrize(
    "scene", ["one process", "two processes", "first save", "over a damaged one", "pruning"]
)
def test_power_cuts(memory, scene):
    dice = random.Random(scene)
    root, world = memory / "run" / "checkpoints", 2 if scene == "two processes" else 1
    root.parent.mkdir()
    if scene != "first save":
        save_any(root, 1, 1.0, world)
    if scene == "pruning":
        save_any(root, 0, 0.0, world)
    if scene == "over a damaged one":
        save_any(root, 2, 2.0, world)
        (root / "step-00000002" / "model.safetensors").write_bytes(b"nonsense")
    start = PowerCut(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = logged(root, world, dice)
    saved = len(log)
    if scene == "pruning":
        disk = FaultDisk()
        prune(root, keep_last=1, disk=disk)
        log += disk.log
    assert log
    seen = set()
    with promise(2, f"states after a power cut, {scene}") as cases:
        for number in range(cases_of(ci=100, nightly=2000)):
            point = number % (len(log) + 1)
            with cases.case(f"state {number}, after {point} of {len(log)} operations"):
                seen.add(
                    check_state(start, log[:point], memory / f"state{number}", dice, point >= saved, scene)
                )
    assert seen == {None if scene == "first save" else 1, 2}


def check_state(
    before: PowerCut, log: list[Operation], at: Path, dice: random.Random, saved: bool, scene: str
) -> int | None:
    """Make a state after ``log`` at ``at`` and check what loads from it; returns its step."""
    cut = copy.deepcopy(before)
    for operation in log:
        cut.apply(operation)
    cut.write_state(at, dice)
    root = at / "run" / "checkpoints"
    if scene == "over a damaged one":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = latest(root)
        kept = [path.read_bytes() for path in root.glob("*/model.safetensors")]
        assert b"nonsense" in kept, "the evidence is lost"
        assert path is not None
        step = step_of(path)
        assert_holds(path, float(step))
    elif scene == "first save" and latest(root) is None:
        step = None
    else:
        step = found(root)
    assert not saved or step == 2, "the save had returned"
    save_whole(root, 3, 3.0)
    assert_holds(latest(root), 3.0)
    return step
