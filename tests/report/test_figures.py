"""Geometry of the charts, colours of the features."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from fastdino.report.figures import (
    Level,
    Series,
    _running_mean,
    _thin,
    _ticks,
    line_chart,
    principal_colors,
    short,
)


def points(path):
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_chart_by_hand():
    chart = line_chart([Series("loss", [0, 50, 100], [0.0, 4.0, 2.0])], levels=[Level(4.0, "top")])
    assert chart is not None
    assert [text for _, text in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert [place for place, _ in chart.y_ticks] == [100, 75, 50, 25, 0]
    assert chart.x_ticks == [(0, "0"), (25, "25"), (50, "50"), (75, "75"), (100, "100")]
    assert chart.paths == [("M0.0 400.0L500.0 0.0L1000.0 200.0", "line c1")]
    assert chart.levels == [(0, "top", "quiet", False)]
    assert chart.summary == "loss: from 0 to 2"
    assert [stop.left for stop in chart.stops] == [0, 25, 75] and sum(
        stop.width for stop in chart.stops
    ) == 100
    assert chart.stops[1].heading == "step 50" and chart.stops[1].values == [(0, 1, "loss", "4")]


def test_tick_texts_differ():
    """Small steps on a large value keep their digits."""
    for ys in ([0.99, 0.990026], [0.04, 0.0404], [1e-6, 2e-5], [120.0, 121.0], [3e4, 9e4]):
        chart = line_chart([Series("s", [0, 1], ys)])
        assert chart is not None
        texts = [text for _, text in chart.y_ticks]
        assert len(set(texts)) == len(texts) and max(map(len, texts)) <= 8, texts


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-3.0, 5.0], [float("nan"), 1.0, float("inf"), 2.0]]
)
def test_any_values_stay_inside(values, scale):
    ys = [v * scale for v in values]
    chart = line_chart([Series("s", range(len(ys)), ys)], levels=[Level(1.5 * scale, "level")])
    assert chart is not None
    assert all(
        -1 <= x <= 1001 and -1 <= y <= 401
        for path, _ in chart.paths
        for x, y in points(path.replace("h0.1", ""))
    )
    assert all(math.isfinite(place) for place, _ in chart.x_ticks + chart.y_ticks) and len(chart.y_ticks) >= 2


def test_nothing_to_draw():
    assert line_chart([]) is None
    assert line_chart([Series("s", [1, 2], [float("nan")] * 2)]) is None


def test_smoothing_and_thinning():
    noise = np.random.default_rng(0).normal(size=5000)
    noise[1234] = 50.0
    xs, ys = _thin(np.arange(5000.0), noise)
    assert len(xs) <= 400 and 50.0 in ys and noise.min() in ys and xs[0] == 0 and xs[-1] == 4999
    assert np.allclose(_running_mean(np.array([1.0, 2.0, 6.0, 8.0]), 3), [1.5, 3.0, 16 / 3, 7.0])
    chart = line_chart([Series("s", range(5000), noise, smooth=True)])
    assert chart is not None and [style for _, style in chart.paths] == ["line c1 faint", "line c1"]
    assert len(chart.stops) <= 48


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.0123, 0.0124), (-7, 13), (0, 1e6), (5, 5), (0, 0), (-1e-12, 1e-12)]
)
def test_ticks_are_round_and_cover(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high) and 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_short_numbers():
    values = {
        0: "0",
        0.01234567: "0.01235",
        12.3: "12.3",
        4567: "4567",
        12345: "12.35k",
        2.5e6: "2.5M",
        1e-6: "1.00e-6",
    }
    assert {value: short(value) for value in values} == values


def test_principal_colors_separate_and_share_their_meaning():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 20))
    kind = rng.integers(0, 3, (4, 30))  # four images with the same three kinds of patches
    features = 5 * parts[kind] + 0.1 * rng.normal(size=(4, 30, 20))
    attention = (kind == 0).astype(float)
    colors = principal_colors(features, attention)
    assert colors.shape == (4, 30, 3) and 0 <= colors.min() and colors.max() <= 1
    means = np.array([[colors[i][kind[i] == k].mean(0) for k in range(3)] for i in range(4)])
    assert np.abs(means[..., :2] - means[:1, :, :2]).max() < 0.1  # a kind has one colour in all images
    assert (
        np.abs(means[0, 0, :2] - means[0, 1, :2]).max() > 0.3
        and np.abs(means[0, 1, :2] - means[0, 2, :2]).max() > 0.3
    )
    weight = attention - attention.mean()
    assert all((weight * colors[..., c]).sum() > 0 for c in range(2))
    assert np.isfinite(principal_colors(np.zeros((1, 4, 2)), np.ones((1, 4)))).all()
