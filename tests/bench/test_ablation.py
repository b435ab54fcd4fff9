"""The ablation bench: presets brought to the demo's size, and what it says of results."""

from __future__ import annotations

import argparse

import pytest

from bench.ablation import ROWS, delta, learned, paper, picture, report, title
from bench.harness import Transcript
from fastdino import presets
from fastdino.config import config_from_flags


def test_presets_at_the_size_of_the_demo():
    assert delta("table7-1") == {} and delta("fig6-momentum") == {}
    assert delta("table7-2") == delta("fig6-copy") == {"teacher": "copy"}
    assert delta("table7-4") == {"local_crops_number": 0}
    assert delta("table7-9") == {"teacher": "copy", "teacher_op": "sinkhorn", "local_crops_number": 1}
    assert delta("appendix-k-4096") == {"local_crops_number": 1, "out_dim": 64}
    assert delta("fig7-no-sharpening")["teacher_temp"] == pytest.approx(0.018 / 0.7)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_runs_that_the_trainer_accepts(name):
    assert {"k-NN"} <= paper(name).keys() and title(name)
    changes = delta(name) | ({"queue_length": 2048} if delta(name).get("method") == "mocov2" else {})
    config_from_flags(preset="demo", **changes)


def test_table_and_picture(tmp_path):
    def seeds(*knn, **signs):
        return [{"knn": value, "linear": value + 1, **signs} for value in knn]

    untrained = seeds(18.0, 20.0, kl=5.0, teacher_entropy=1.0)
    results = {
        "table7-1": seeds(31.0, 33.0, kl=0.6, teacher_entropy=6.0),
        "table7-2": seeds(19.0, 22.0, kl=0.01, teacher_entropy=0.0),
        "table7-7": seeds(25.0, 27.0, spread=0.8),
    }
    assert learned(results["table7-1"], untrained) and not learned(results["table7-2"], untrained)
    say = Transcript()
    report(say, results, untrained, argparse.Namespace(epochs=3, seeds=[0, 1], save=False))
    rows = {line.split()[0]: line for line in say.lines[2:]}
    assert "32.0   31.0-  33.0    33.0" in rows["table7-1"] and "72.8, 76.1" in rows["table7-1"]
    assert rows["table7-2"].endswith("not learned") and not rows["table7-7"].endswith("not learned")
    assert "0.800" in rows["table7-7"] and rows["rank"].endswith("1.00")
    picture(results, untrained, tmp_path / "a" / "ablation.png")
    assert (tmp_path / "a" / "ablation.png").stat().st_size > 10_000


def test_every_row_is_a_preset():
    assert set(ROWS) <= presets.PRESETS.keys() and len(ROWS) == 13
