"""The loss of each byte, and its mean on held out bytes, whole and by the field of each byte."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bdh_lib.data.formats import FIELDS, LABEL_OF
from bdh_lib.data.split import Split
from bdh_lib.errors import UserError
from bdh_lib.progress import Progress, heartbeat
from bdh_lib.script.interrupts import default_signals
from bdh_mlx import BDH


def byte_losses(
    model: BDH, idx: mx.array, targets: mx.array, key: mx.array | None = None
) -> mx.array:
    """Return the loss of each target in nats, (B, T), in training and in evaluation.

    A `key` is passed in training alone. With another loss than the cross-entropy in evaluation,
    bits per byte mean nothing, nor does the advice, which compares them with entropies of the data.
    """
    return nn.losses.cross_entropy(model(idx, key=key)[0], targets)


def compile_losses(model: BDH) -> Callable:
    """Return byte_losses of the model, compiled: idx, targets (B, T) -> losses (B, T).

    It reads the weights that the model has at the call.
    """
    return mx.compile(partial(byte_losses, model), inputs=[model.state])


def evaluate(
    losses_fn: Callable, val: Split, shape: tuple[int, int], stop=None, world=None
) -> tuple[float, dict[str, float]]:
    """Return the mean nats per byte of val, and of the bytes of each field, without dropout.

    `losses_fn` maps idx and targets, both (B, T), to the loss of each target in nats, (B, T), as
    compile_losses makes it. val is read in batches of `shape`, (B, T); the last block may be
    shorter. In a training run the processes of its World `world` evaluate disjoint batches, and
    its StopSignal `stop` ends the evaluation early: where it is requested, the result means
    nothing.
    """
    n = len(val.bytes) - 1
    T = shape[1]
    rank, size = (world.rank, world.size) if world else (0, 1)
    nats = np.zeros(len(FIELDS))
    count = np.bincount(val.fields[1:], minlength=len(FIELDS))
    with heartbeat("evaluating"), Progress("evaluating", n // size, "bytes") as progress:
        for begin, end in batch_ranges(n, shape)[rank::size]:
            if stop and stop.requested:
                break
            rows = (max(1, (end - begin) // T), -1)
            idx, targets = (val.bytes[begin + i : end + i].astype(np.int32).reshape(rows)
                            for i in (0, 1))  # fmt: skip
            nats_by_byte = np.array(losses_fn(mx.array(idx), mx.array(targets))).ravel()
            nats += np.bincount(val.fields[begin + 1 : end + 1], nats_by_byte, len(FIELDS))
            progress.update(end - begin)
    if world:
        nats = np.sum(world.all_gather_object(nats.tolist()), 0)
    present = {LABEL_OF[name]: i for i, name in enumerate(FIELDS) if count[i]}
    return float(nats.sum()) / n, {f: float(nats[i] / count[i]) for f, i in present.items()}


def batch_ranges(n: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (begin, end) of the batches, up to B blocks of T bytes each, and of the rest of n."""
    B, T = shape
    cuts = sorted({*range(0, n - n % T, B * T), n - n % T, n})
    return [*pairwise(cuts)]


def compile_evaluation(model: BDH, n_bytes: int, shape: tuple[int, int]) -> Callable:
    """Return compile_losses of the model, traced with each shape that `evaluate` reads.

    `n_bytes` is the length of val in bytes, `shape` the (B, T) of `evaluate`. Nothing is computed.
    Raises UserError for a byte_losses that averages.
    """
    losses_fn = compile_losses(model)
    T = shape[1]
    sizes = {end - begin for begin, end in batch_ranges(n_bytes - 1, shape)}
    with default_signals():
        for size in sizes:
            zeros = mx.zeros(size, mx.int32).reshape(max(1, size // T), -1)
            losses = losses_fn(zeros, zeros)
            if losses.shape != zeros.shape:
                raise UserError(f"byte_losses in bdh_lib/loss.py returns shape {losses.shape}; it "
                                f"must be {zeros.shape}, that of targets")  # fmt: skip
    return losses_fn
