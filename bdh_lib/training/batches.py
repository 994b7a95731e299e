"""Which bytes each batch of a run holds, and how much each of them counts in the loss."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_lib.data.formats import FIELDS
from bdh_lib.data.split import Split
from bdh_lib.settings import Settings
from bdh_lib.training.distributed import World
from bdh_lib.training.schedule import blocks_per_step


class Batch(NamedTuple):
    """What a micro-step takes."""

    idx: mx.array  # bytes, (B, T)
    targets: mx.array  # the bytes that follow them, (B, T)
    loss_weights: mx.array  # the weight of each target in the loss of the step, (B, T)
    key: mx.array  # PRNG key of dropout and noise


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
    """Return the ends and the offsets of an epoch's records in their shuffled order, (R,) each.

    `ends` are positions in the epoch. A byte at position p of the epoch lies at p + offsets[i] in
    `split`, where record i is the first whose end is above p. Records of 2, 3 and 4 bytes end at
    2, 5 and 9 in `split`; in the order third, first, second they end at 4, 6 and 9 in the epoch,
    and the offsets are 5, -4 and -4.
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
            ends, offsets = epoch_order(split, s.SEED, epoch)
            ring += offsets[np.searchsorted(ends, ring, side="right")]
        blocks.append(ring)
    return np.stack(blocks)


def target_mask(split: Split, positions: np.ndarray, s: Settings) -> np.ndarray:
    """Return which targets (B, T) of the blocks at `positions` (B, T + 1) count in the loss."""
    if s.LOSS_ON == "all":
        return np.ones_like(positions[:, 1:], bool)
    return split.fields[positions[:, 1:]] == FIELDS.index(s.LOSS_ON)


def get_batch(split: Split, batch_index: int, s: Settings, n_targets: int) -> Batch:
    """Return a run's batch number `batch_index`, one of those of a step.

    The loss of the step is the mean over the `n_targets` targets that count in its batches, on
    all processes: the weight of each is 1 / n_targets, that of the others 0.
    """
    positions = batch_positions(split, batch_index, s)
    blocks = split.bytes[positions].astype(np.int32)
    mask = target_mask(split, positions, s).astype(np.float32)
    return Batch(
        idx=mx.array(blocks[:, :-1]),
        targets=mx.array(blocks[:, 1:]),
        loss_weights=mx.array(mask / np.float32(max(1, n_targets))),
        key=mx.random.key(s.SEED * 2**32 + batch_index),
    )


def batch_indices(s: Settings, step: int) -> range:
    """Return the numbers, in the run, of the batches of step number `step`."""
    n_batches = blocks_per_step(s) // s.BATCH_SIZE
    return range(step * n_batches, (step + 1) * n_batches)


def micro_batch_indices(s: Settings, step: int, world: World) -> range:
    """Return the numbers, in the run, of this process's batches of a step."""
    return batch_indices(s, step)[world.rank :: world.size]


def step_batches(split: Split, step: int, s: Settings, world: World) -> tuple[int, Iterator[Batch]]:
    """Return how many targets count in a step, on all processes, and this process's batches."""
    n_targets = n_targets_in_step(split, step, s)
    indices = micro_batch_indices(s, step, world)
    return n_targets, (get_batch(split, i, s, n_targets) for i in indices)


def n_targets_in_step(split: Split, step: int, s: Settings) -> int:
    """Return how many targets count in the loss of step number `step`, over all its batches."""
    if s.LOSS_ON == "all":
        return blocks_per_step(s) * s.BLOCK_SIZE
    masks = (target_mask(split, batch_positions(split, i, s), s) for i in batch_indices(s, step))
    return sum(int(mask.sum()) for mask in masks)


def divergence_message(split: Split, step: int, s: Settings) -> str:
    """Say why a run ends, and where in the data the blocks of its last step begin."""
    count = blocks_per_step(s)
    shown = batch_indices(s, step)[: math.ceil(64 / s.BATCH_SIZE)]
    starts = [int(n) for i in shown for n in batch_positions(split, i, s)[:, 0]][:64]
    more = f" and {count - len(starts):,} others" if count > len(starts) else ""
    is_shuffled = s.SHUFFLE_RECORDS and split.record_ends is not None
    note = "; shuffled, a block continues in other records" if is_shuffled else ""
    return (
        f"no finite update in {s.MAX_CONSECUTIVE_SKIPS:,} iterations; the blocks of the last one "
        f"begin at {starts}{more} of the training bytes, {s.BLOCK_SIZE:,} bytes each{note}"
    )
