"""The closing table of ``make train`` comes from a real, if very short, run of the whole command."""

import json

import pytest

from fastdino import demo


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    short = {"max_steps": 3, "batch_size_per_gpu": 8, "num_workers": 1, "device": "cpu", "logger": "none"}
    violent = {
        "lr": 0.3,
        "warmup_epochs": 0,
        "momentum_teacher": 0.0,
    }  # three steps must visibly change the teacher
    return demo.run(out, n_train=80, n_val=30, **short, **violent)


def test_the_whole_command_ends_in_a_report(figures):
    assert figures["steps"] == 3 and figures["images"] == 80
    page = figures["report"].read_text()
    assert "raw pixels" in page.lower() and "Jaccard" in page
    assert len(page) < 5_000_000


def test_figures_are_those_of_the_log(figures):
    records = [
        json.loads(line) for line in (figures["report"].parent / "eval.jsonl").read_text().splitlines()
    ]
    assert records[0]["step"] == 0 and "raw_pixels" in records[0]
    assert figures["knn"]["trained"] == [r for r in records if "knn" in r][-1]["knn"]
    assert figures["jaccard"][0.6] == [r for r in records if "jaccard" in r][-1]["jaccard"]
    for scores in [*figures["knn"].values(), *figures["jaccard"].values()]:
        assert all(0.0 <= value <= 100.0 for value in scores.values())
    wide = figures["jaccard"][0.8]
    assert wide["trained"] != wide["untrained"]  # two networks


def test_the_table_shows_every_figure(figures, capsys):
    demo.show(figures)
    text = capsys.readouterr().out
    for scores in figures["knn"].values():
        assert all(f"{value:.1f} %" in text for value in scores.values())
    assert all(f"{scores['trained']:.1f} %" in text for scores in figures["jaccard"].values())
    assert str(figures["report"]) in text
