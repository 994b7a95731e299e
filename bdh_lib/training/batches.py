"""Which bytes each batch of a run holds, and how much each of them counts in the loss."""

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from bdh_lib.data.formats import FIELDS
from bdh_lib.flags import Settings
from bdh_lib.training.dataset import Split
from bdh_lib.training.distributed import World
from bdh_lib.training.schedule import blocks_per_update


@lru_cache(maxsize=2)
def epoch_starts(n_bytes: int, T: int, seed: int, epoch: int) -> np.ndarray:
    """Return the first byte of each block of an epoch, in the order of the epoch.

    The blocks tile the stream, which is taken as a ring, from an offset that each epoch draws: each
    byte is a target once, and fewer than T of them twice.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = rng.integers(n_bytes) + T * np.arange(math.ceil(n_bytes / T))
    return rng.permutation(starts) % n_bytes


@lru_cache(maxsize=2)
def epoch_order(split: Split, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each record ends in a virtual stream, the records in the epoch's own order, and
    how far from there it lies in `split`.
    """
    lengths = np.diff(split.record_ends, prepend=0)
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    return ends, split.record_ends[order] - ends


def batch_positions(split: Split, batch_index: int, s: Settings) -> np.ndarray:
    """Return which bytes of `split` the blocks of a run's batch number `batch_index` hold.

    (B, T + 1) positions, of the inputs and of one target more. They are a function of the arguments
    alone, so that a resumed run reads on where it stopped.
    """
    B, T, n_bytes = s.BATCH_SIZE, s.BLOCK_SIZE, len(split.bytes)
    blocks = []
    for block in range(batch_index * B, (batch_index + 1) * B):
        epoch, i = divmod(block, math.ceil(n_bytes / T))
        ring = (epoch_starts(n_bytes, T, s.SEED, epoch)[i] + np.arange(T + 1)) % n_bytes
        if s.SHUFFLE_RECORDS and split.record_ends is not None:
            ends, distances = epoch_order(split, s.SEED, epoch)
            ring += distances[np.searchsorted(ends, ring, side="right")]
        blocks.append(ring)
    return np.stack(blocks)


def get_batch(split: Split, batch_index: int, s: Settings) -> tuple[mx.array, mx.array]:
    """Return a run's batch number `batch_index` as idx and targets (B, T)."""
    blocks = split.bytes[batch_positions(split, batch_index, s)].astype(np.int32)
    return mx.array(blocks[:, :-1]), mx.array(blocks[:, 1:])


def batch_indices(s: Settings, step: int) -> range:
    """Return the numbers, in the run, of the batches of update number `step`."""
    n_batches = blocks_per_update(s) // s.BATCH_SIZE
    return range(step * n_batches, (step + 1) * n_batches)


def micro_batch_indices(s: Settings, step: int, world: World) -> range:
    """Return the numbers, in the run, of this process's batches of an update."""
    return batch_indices(s, step)[world.rank :: world.size]


def target_mask(split: Split, batch_index: int, s: Settings) -> np.ndarray:
    """Return which targets (B, T) of a run's batch number `batch_index` count in its loss."""
    if s.LOSS_ON == "all":
        return np.ones((s.BATCH_SIZE, s.BLOCK_SIZE), bool)
    positions = batch_positions(split, batch_index, s)[:, 1:]
    return split.fields[positions] == FIELDS.index(s.LOSS_ON)


def n_targets_in_update(split: Split, step: int, s: Settings) -> int:
    """Return how many targets count in the loss of update number `step`, over all its batches."""
    if s.LOSS_ON == "all":
        return blocks_per_update(s) * s.BLOCK_SIZE
    return sum(int(target_mask(split, i, s).sum()) for i in batch_indices(s, step))


def loss_weights(split: Split, batch_index: int, count: int, s: Settings) -> np.ndarray:
    """Return the weight of each target (B, T) of a batch in the loss of its update.

    That loss is the mean over the `count` targets that count in all batches of the update, on all
    processes: their weights are 1 / count, those of the others 0.
    """
    return target_mask(split, batch_index, s).astype(np.float32) / np.float32(max(1, count))
