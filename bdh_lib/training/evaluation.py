"""The loss of a model on held out bytes, whole and by the field that each byte belongs to."""

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np

from bdh_lib.compute.layer import forward_segment, ln
from bdh_lib.data.describe import count_text, skip_lines
from bdh_lib.data.formats import FIELDS, LABEL_OF
from bdh_lib.data.prepare import load_unsplit
from bdh_lib.errors import UserError
from bdh_lib.flags import Settings
from bdh_lib.progress import Progress, heartbeat
from bdh_lib.tables import format_table
from bdh_lib.training.distributed import World
from bdh_lib.training.signals import default_signals
from bdh_lib.training.step import byte_losses
from bdh_lib.units import bits_per_byte
from bdh_mlx import BDH

ACTIVITY_BYTES = 4096  # validation bytes over which the active neurons are counted
ACTIVITY_CHUNK = 256  # of them at once
DEFAULT_BLOCK_SIZE = 4096  # where the checkpoint does not say what it was trained on


def evaluate(
    losses, val, fields, B: int, T: int, stop=None, world: World | None = None
) -> tuple[float, dict[str, float]]:
    """Return the mean nats per byte of val, and of the bytes of each field, without dropout.

    val is read in blocks of T, the last one shorter. `fields` is the index in FIELDS of each byte
    of val. The processes of `world` evaluate disjoint blocks.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    n = len(val) - 1
    nats, count = np.zeros(len(FIELDS)), np.bincount(fields[1:], minlength=len(FIELDS))
    parts = [*pairwise([*range(0, n - n % T, B * T), n - n % T, n])][rank::size]
    with heartbeat("evaluating"), Progress("evaluating", n // size, "bytes") as progress:
        for begin, end in parts:
            if end > begin and not (stop and stop.requested):
                rows = (max(1, (end - begin) // T), -1)
                idx, targets = (val[begin + i : end + i].astype(np.int32).reshape(rows)
                                for i in (0, 1))  # fmt: skip
                nats_by_byte = np.array(losses(mx.array(idx), mx.array(targets))).ravel()
                nats += np.bincount(fields[begin + 1 : end + 1], nats_by_byte, len(FIELDS))
                progress.update(end - begin)
    if world:
        nats = np.sum(world.all_gather_object(nats.tolist()), 0)
    present = {LABEL_OF[name]: i for i, name in enumerate(FIELDS) if count[i]}
    return float(nats.sum()) / n, {f: float(nats[i] / count[i]) for f, i in present.items()}


def neuron_activity(model: BDH, val: np.ndarray, T: int) -> dict[str, list[float] | int]:
    """Return the share of active neurons by layer (`active_x`, `active_y`), and the number of
    `dead` ones.

    A neuron is active where it is not 0, and dead where no layer excites it. They are counted over
    the first ACTIVITY_BYTES of val in blocks of T, without dropout. The paper names 5 % for x.
    """
    watched, L = val[:ACTIVITY_BYTES].astype(np.int32), model.config.n_layer
    active, excited = np.zeros((2, L)), mx.array(False)
    for begin in range(0, len(watched), T):
        block, S = watched[begin : begin + T], [None] * L
        for position in range(0, len(block), ACTIVITY_CHUNK):
            v = ln(model.embed(mx.array(block[None, position : position + ACTIVITY_CHUNK])))
            for i in range(L):
                v, S[i], saved = forward_segment(v, S[i], model.weights(), position, ACTIVITY_CHUNK)
                x, y = saved.x, saved.y
                active[:, i] += [mx.mean(neurons > 0).item() * v.shape[1] for neurons in (x, y)]
                excited = excited | mx.any(x > 0, -2)
            mx.eval(excited)  # or each x would be kept to the end
    x, y = (active / len(watched)).tolist()
    return {"active_x": x, "active_y": y, "dead": excited.size - excited.sum().item()}


def compile_shapes(losses: Callable, n_bytes: int, B: int, T: int) -> None:
    """Let mx.compile trace `losses` with each shape that `evaluate` reads. Nothing is computed."""
    n = n_bytes - 1
    rows = n // T
    for shape in {(B, T) if rows >= B else (0, T), (rows % B, T), (1, n % T)}:
        if 0 not in shape:
            zeros = mx.zeros(shape, mx.int32)
            losses(zeros, zeros)


def compile_evaluation(model: BDH, n_bytes: int, s: Settings) -> Callable:
    """Return byte_losses of the model, compiled for the shapes that an evaluation of n_bytes
    reads.
    """
    eval_losses = mx.compile(partial(byte_losses, model), inputs=[model.state])
    print("compiling the evaluation, once")
    with heartbeat("compiling"), default_signals():
        compile_shapes(eval_losses, n_bytes, s.BATCH_SIZE, s.BLOCK_SIZE)
    return eval_losses


def evaluation_table(
    model: BDH, dataset: str, mode: str | None, settings: dict, columns: str | None = None
) -> str:
    """Return a table of the loss by field, in nats and bits per byte. Raises UserError."""
    if mode is None:
        raise UserError("the checkpoint names no training mode to format records in; give --mode")
    print(f"reading {dataset}", file=sys.stderr)
    # the table alone is on stdout, not that large data are being read
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        about, stream, fields = load_unsplit(dataset, mode, Path(folder), columns)
    if len(stream) < 2:
        raise UserError(f"{dataset} has {len(stream)} byte; a loss needs at least 2")
    T, B = model.trained_length or DEFAULT_BLOCK_SIZE, settings.get("BATCH_SIZE", 1)
    print(f"evaluating {len(stream):,} bytes", file=sys.stderr)
    losses = mx.compile(partial(byte_losses, model))
    with default_signals():
        compile_shapes(losses, len(stream), B, T)
    with redirect_stdout(sys.stderr):
        whole, means = evaluate(losses, stream, fields, B, T)
    count = np.bincount(fields[1:], minlength=len(FIELDS)).tolist()
    counts = dict(zip(LABEL_OF.values(), count, strict=True))
    n_bytes = len(stream) - 1
    lines = [
        f"{about['dataset']}: {count_text(about['records'])}mode {mode}, "
        f"{len(stream):,} bytes in blocks of {T:,}, as the trainer validates",
        *(f"  {skip}" for skip in skip_lines(about)),
    ]
    rows = [("field", "bytes", "share", "nats/byte", "bits/byte")]
    for name, mean in (means | {"whole": whole}).items():
        n = counts.get(name, n_bytes)
        bits = bits_per_byte(mean)
        rows.append((name, f"{n:,}", f"{n / n_bytes:.1%}", f"{mean:.4f}", f"{bits:.4f}"))
    return "\n".join([*lines, format_table(rows)])
