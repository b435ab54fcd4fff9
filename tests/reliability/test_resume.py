"""Runs cut into pieces: every sample of every step once and in order, and the same bits at the end."""

from __future__ import annotations

import json
from functools import partial

from reliability import toy
from reliability.promises import cases_of, promise

STEPS, EPOCH = 24, 12


def batches_of(notes, out, flags, images):
    """Train once more and return the ids of its steps."""
    toy.train(images, out, *flags, hook=partial(noting, notes=notes))
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def noting(rank, notes):
    toy.note_batches(notes)


def plans() -> list[tuple[int, ...]]:
    """Steps after which a run ends and is started again."""
    chosen = [(EPOCH,), (1, 2, 5, 7, 11), (STEPS,)]
    draw = toy.seeded("resume")
    while len(chosen) < cases_of(ci=3, nightly=40):
        stops = draw.sample(range(1, STEPS), draw.randint(1, 5))
        chosen.append(tuple(sorted(stops)))
    return chosen


def test_a_run_in_pieces_sees_every_batch_once_and_ends_with_the_same_bits(images, tmp_path):
    whole = batches_of(tmp_path / "whole.notes", tmp_path / "whole", (), images)
    expected = toy.state_hash(tmp_path / "whole")
    assert len(whole) == STEPS
    with promise(6, "resumed 1 to 5 times in an epoch, at its end, after completion") as cases:
        for number, stops in enumerate(plans()):
            with cases.case(f"stops after {stops}"):
                out, seen = tmp_path / f"run{number}", []
                for piece, last in enumerate((*stops, STEPS)):
                    notes = tmp_path / f"{number}-{piece}.notes"
                    seen += batches_of(notes, out, ("--max_steps", str(last)), images)
                assert seen == whole
                assert toy.state_hash(out) == expected
                assert (out / "log.txt").read_bytes() == (tmp_path / "whole/log.txt").read_bytes()
    with promise(6, "stopped before its first step") as cases:
        with cases.case("0 steps"):
            out = tmp_path / "none"
            job = toy.start(images, out, hook=stopped_at_once)
            assert job.wait() == [143] and "after step 0" in job.text, job.text
            assert batches_of(tmp_path / "none.notes", out, (), images) == whole
            assert toy.state_hash(out) == expected


def stopped_at_once(rank):
    """SIGTERM as soon as it is handled."""
    import os
    import signal

    from fastdino.engine.trainer import Trainer

    prepare = Trainer._prepare_output

    def prepared(self, *arguments):
        prepare(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    Trainer._prepare_output = prepared
