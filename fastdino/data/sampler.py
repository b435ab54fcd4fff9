"""Which samples a step sees: pure functions of (seed, step), the same on every process.

The order is that of `torch.utils.data.DistributedSampler` with shuffling and ``drop_last``: each epoch is a
fresh permutation, cut into global batches, of which every process takes every world-size-th sample. Nothing
has to be saved for a resume, and a run may continue with another number of processes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_STREAM = 0x5A4D504C  # keeps the order independent of every other use of the seed


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Whole global batches in `n` samples; the rest of an epoch is left out (another rest each epoch).

    Raises ValueError if there are fewer samples than one batch.
    """
    if global_batch < 1:
        raise ValueError(f"--batch_size: expected at least 1, got {global_batch}")
    if n < global_batch:
        raise ValueError(
            f"--data_path: {n} usable images, expected at least one global batch of {global_batch}"
        )
    return n // global_batch


@lru_cache(maxsize=2)  # the epoch under way and, while batches are prefetched across its end, the next one
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of all `n` samples in an epoch: int64 [n], read-only."""
    bits = np.random.Philox(np.random.SeedSequence((_STREAM, seed, epoch)))
    order = np.random.Generator(bits).permutation(n)
    order.flags.writeable = False
    return order


def step_ids(seed: int, step: int, n: int, global_batch: int) -> np.ndarray:
    """The samples of optimizer step `step`, counted from the start of training: int64 [global_batch]."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, global_batch))
    return permutation(seed, epoch, n)[step_in_epoch * global_batch : (step_in_epoch + 1) * global_batch]


def local_ids(ids: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The part of a global batch that process `rank` of `world` computes: int64 [len(ids) / world]."""
    return ids[rank::world]
