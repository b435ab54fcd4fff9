"""Goal 15: no checkpoint with a value that is not finite is ever the newest, nor any at all."""

import math
from functools import partial

import pytest
import torch

from fastdino.engine import checkpoint, exits
from fastdino.engine.checkpoint import NotFiniteError, Piece, Saver, latest, save, step_of
from reliability import toy
from reliability.promises import promise
from reliability.toy_state import META, assert_holds, contents, part, save_all, save_whole

VALUES = (math.nan, math.inf, -math.inf)


def poisoned(value: float, kind: str, name: str, row: int = -1):
    """The state of step 2 with one value that is not finite."""
    model, optimizer = contents(2.0)
    tensor = (model if kind == "model" else optimizer)[name]
    tensor.view(-1)[row] = value
    return model, optimizer


def test_a_state_that_is_not_finite_is_not_saved(memory):
    save_whole(memory, 1, 1.0)
    places = [("model", name) for name in contents(1.0)[0]] + [
        ("optimizer", name) for name in contents(1.0)[1]
    ]
    with promise(15, "NaN or infinity in each tensor of a save") as cases:
        for value in VALUES:
            for kind, name in places:
                with cases.case(f"{value} in {name}"):
                    with pytest.raises(NotFiniteError) as caught:
                        save(memory, 2, *poisoned(value, kind, name), META)
                    assert f"checkpoint of step 2 refused: {name} ({kind}): 1 of" in str(caught.value)
                    assert [p.name for p in memory.iterdir()] == ["step-00000001"]
                    assert_holds(latest(memory), 1.0)


def test_of_a_save_of_several_processes_all_are_told(memory):
    save_all(memory, 1, 1.0, 2)
    with promise(15, "NaN or infinity in the piece of one of two processes") as cases:
        for value in VALUES:
            for row, rank in ((0, 0), (-1, 1)):
                with cases.case(f"{value} on rank {rank}"):
                    attempt = f"{value}{rank}"
                    for writer in (1, 0):
                        state = [part(s, writer, 2) for s in poisoned(value, "model", "w", row)]
                        settings = dict(rank=writer, world_size=2, attempt=attempt, timeout=60)
                        if writer == 1 and rank == 0:
                            save(memory, 2, *state, META, **settings)
                            continue
                        with pytest.raises(NotFiniteError, match="step 2 refused: w .model.: 1 of") as caught:
                            save(memory, 2, *state, META, **settings)
                        assert ("rank 1: " in str(caught.value)) == (writer == 0 and rank == 1)
                    assert_holds(latest(memory), 1.0)
                    assert step_of(latest(memory)) == 1


def test_what_is_finite_is_saved(memory):
    whole = {
        "count": torch.tensor([2**62]),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "large": torch.tensor([3e38, -3e38]),
        "half": torch.tensor([65504.0]).half(),
    }
    with promise(15, "finite states are saved") as cases:
        for name, tensor in whole.items():
            with cases.case(name):
                model, _, _ = checkpoint.load(save(memory / name, 1, {name: tensor}, {}, {}))
                assert torch.equal(model[name], tensor)
        with cases.case("a process without rows"):
            empty = {"w": Piece(torch.zeros(0, 2), 0, 0)}
            save(memory / "empty", 1, empty, {}, {}, rank=0, world_size=1, attempt="a")


def test_a_background_save_tells_it_at_the_next_step(memory):
    with promise(15, "a refused save in the background stops the run") as cases, cases.case("check"):
        saver = Saver(memory)
        saver.start(2, *poisoned(math.nan, "model", "center"), META)
        saver._thread.join()
        with pytest.raises(NotFiniteError, match="center"):
            saver.check()
        saver.wait()  # told once


def poison(rank: int, save_number: int) -> None:
    """From this save on, a weight of the teacher is infinite when it is saved, and at no other time."""
    start, calls = Saver.start, iter(range(1, 1000))

    def poisoned_start(self, step, model, *arguments, **settings):
        if next(calls) >= save_number:
            name = next(name for name in model if name.startswith("teacher"))
            model = dict(model) | {name: torch.full_like(model[name], math.inf)}
        start(self, step, model, *arguments, **settings)

    Saver.start = poisoned_start


def test_a_run_whose_state_is_not_finite_ends_with_the_checkpoint_before(images, tmp_path):
    with promise(15, "a run with weights that are not finite") as cases:
        for number in (2, 4):  # in the middle, and the last one
            with cases.case(f"save {number} of 4"):
                out = tmp_path / f"run{number}"
                job = toy.train(
                    images, out, "--save_every", "3", "--max_steps", "12",
                    code=exits.NOT_FINITE, hook=partial(poison, save_number=number),
                )  # fmt: skip
                assert f"checkpoint of step {3 * number} refused: teacher" in job.text, job.text
                assert "Traceback" not in job.text
                path = latest(out / "checkpoints")
                assert path is not None and step_of(path) == 3 * (number - 1)
                model, optimizer, _ = checkpoint.load(path)
                assert all(tensor.isfinite().all() for tensor in [*model.values(), *optimizer.values()])
