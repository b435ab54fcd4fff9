import numpy as np
import pytest

from fastdino.config import Config
from fastdino.engine.schedules import Schedule, cosine, teacher_temperature


def official_cosine(base, final, total, warmup):
    """The schedule array as the official code defines it."""
    ramp = np.linspace(0, base, warmup) if warmup else np.array([])
    steps = np.arange(total - warmup)
    return np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))])


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
def test_cosine_is_the_official_array(warmup):
    expected = official_cosine(0.3, 1e-6, 23, warmup)
    got = [cosine(i, base=0.3, final=1e-6, total=23, warmup=warmup) for i in range(23)]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_beyond_the_end_the_last_value_stays():
    last = cosine(22, base=1.0, final=0.0, total=23)
    assert cosine(23, base=1.0, final=0.0, total=23) == last == cosine(500, base=1.0, final=0.0, total=23)


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_teacher_temperature_is_linspace_then_constant(warmup):
    expected = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(10 - warmup, 0.07)])
    got = [teacher_temperature(e, warmup_value=0.04, value=0.07, warmup_epochs=warmup) for e in range(10)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_schedule_scales_lr_freezes_and_ends():
    config = Config()
    config.optim.epochs, config.optim.warmup_epochs, config.optim.freeze_last_layer = 4, 1, 2
    schedule = Schedule(config, steps_per_epoch=5, global_batch=512)
    assert schedule.total_steps == 20
    assert schedule(0).lr == 0.0
    assert schedule(5).lr == pytest.approx(0.0005 * 2)  # 512 / 256
    assert [schedule(s).freeze_last_layer for s in (0, 9, 10, 19)] == [True, True, False, False]
    assert schedule(0).momentum == pytest.approx(0.996)
    assert schedule(19).momentum < 1.0
    assert schedule(0).weight_decay == pytest.approx(0.04)
    assert schedule(19).weight_decay == pytest.approx(official_cosine(0.04, 0.4, 20, 0)[-1])
