"""The order of samples is complete, without repeats, and depends on nothing but the seed and the step."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fastdino.data.sampler import local_ids, permutation, step_ids, steps_per_epoch


@pytest.mark.parametrize(("n", "global_batch", "world"), [(96, 24, 3), (100, 24, 4), (64, 64, 8), (7, 2, 1)])
def test_an_epoch_shows_no_sample_twice_over_all_processes(n, global_batch, world):
    steps = steps_per_epoch(n, global_batch)
    for epoch in range(3):
        seen = np.concatenate(
            [
                local_ids(step_ids(5, step, n, global_batch), rank, world)
                for rank in range(world)
                for step in range(epoch * steps, (epoch + 1) * steps)
            ]
        )
        assert len(seen) == steps * global_batch == len(set(seen.tolist()))
        assert seen.min() >= 0 and seen.max() < n


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_batch_of_a_step_does_not_depend_on_the_number_of_processes(world):
    ids = step_ids(0, 11, 50, 12)
    parts = [local_ids(ids, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {12 // world}
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(ids))


def test_every_sample_is_left_out_at_times_only():
    dropped = [
        set(range(10)) - set(np.concatenate([step_ids(0, 3 * e + s, 10, 3) for s in range(3)]))
        for e in range(60)
    ]
    assert all(len(left_out) == 1 for left_out in dropped)
    assert set.union(*dropped) == set(range(10))


def test_epochs_and_seeds_are_unrelated_permutations():
    n = 2000
    orders = [permutation(seed, epoch, n) for seed in (0, 1) for epoch in range(4)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    correlations = np.corrcoef(np.stack(orders))[np.triu_indices(len(orders), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)
    same_place = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]  # 1 expected each
    assert max(same_place) < 10


def test_positions_are_uniform():
    n = 8
    counts = np.zeros((n, n))
    for epoch in range(4000):
        counts[np.arange(n), permutation(7, epoch, n)] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()  # about (n - 1)**2 = 49 degrees of freedom
    assert 20 < chi_square < 95


def test_the_order_is_pinned():
    """A change would break the resume of every running training."""
    np.testing.assert_array_equal(permutation(0, 0, 8), PINNED_0)
    np.testing.assert_array_equal(permutation(123, 45, 8), PINNED_1)
    assert permutation(0, 0, 8).dtype == np.int64


PINNED_0 = [6, 7, 5, 0, 2, 3, 1, 4]
PINNED_1 = [5, 4, 3, 7, 1, 6, 2, 0]


def test_the_order_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        step_ids(0, 0, 10, 5)[0] = 3


def test_fewer_images_than_a_batch_is_an_error_that_says_so():
    with pytest.raises(
        ValueError, match="--data_path: 63 usable images, expected at least one global batch of 64"
    ):
        steps_per_epoch(63, 64)
    with pytest.raises(ValueError, match="--batch_size: expected at least 1, got 0"):
        steps_per_epoch(10, 0)
    assert steps_per_epoch(64, 64) == 1


def test_lists_orders_and_augmentation_need_no_torch():
    code = (
        "import sys; import fastdino.data.manifest, fastdino.data.sampler, fastdino.data.augment; "
        "sys.exit('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
