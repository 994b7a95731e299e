"""The loss of a checkpoint on a data set, whole and by the field each byte belongs to."""

import math
import tempfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

import data
from bdh_mlx import BDH
from errors import UserError
from formats import FIELDS
from train_mlx import byte_losses, evaluate

BLOCK_SIZE = 4096  # bytes read at once, where the checkpoint does not say what it was trained on


def report(model: BDH, dataset: str, mode: str | None, settings: dict) -> str:
    """A table of nats and bits per byte by field. Raises UserError."""
    if mode is None:
        raise UserError("the checkpoint names no training mode to format records in; give --mode")
    with tempfile.TemporaryDirectory() as folder:
        about, stream, fields = data.whole(dataset, mode, Path(folder))
    if len(stream) < 2:
        raise UserError(f"{dataset} has {len(stream)} byte; a loss needs at least 2")
    T, B = model.trained_length or BLOCK_SIZE, settings.get("BATCH_SIZE", 1)
    losses = mx.compile(partial(byte_losses, model))
    whole, means = evaluate(losses, stream, fields, B, T)
    count = np.bincount(fields[1:], minlength=len(FIELDS)).tolist()
    counts = {name or "headers": n for name, n in zip(FIELDS, count, strict=True)}
    n_bytes = len(stream) - 1
    lines = [
        f"{about['dataset']}: {data.counted(about['records'])}mode {mode}, {len(stream):,} bytes "
        f"in blocks of {T:,}, as the trainer validates",
        *(f"  {skip}" for skip in data.skips(about)),
        f"{'field':11} {'bytes':>12} {'share':>7} {'nats/byte':>10} {'bits/byte':>10}",
    ]
    for name, mean in (means | {"whole": whole}).items():
        n = counts.get(name, n_bytes)
        bits = mean / math.log(2)
        lines.append(f"{name:11} {n:12,} {n / n_bytes:7.1%} {mean:10.4f} {bits:10.4f}")
    return "\n".join(lines)
