"""The loss of a checkpoint on a data set, whole and by the field each byte belongs to."""

import json
import math
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

from bdh_mlx import BDH, UserError  # before mlx.core, to which it gives a fast BLAS on Linux

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

import data
from formats import FIELDS

BLOCK_SIZE = 4096  # bytes read at once, where the checkpoint does not say what it was trained on


def settings_of(weights: Path) -> dict:
    """The trainer's settings, from config.json beside the weights; {} where there is none."""
    try:
        return dict(json.loads(weights.with_name("config.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def byte_losses(model: BDH, stream: np.ndarray, B: int, T: int) -> np.ndarray:
    """Nats of each byte of a stream but the first, read as the trainer evaluates: in blocks of T,
    each begun without a state, B at once (the last block shorter), without dropout."""

    @partial(mx.compile, inputs=[model.state])
    def losses(idx, targets):
        return nn.losses.cross_entropy(model(idx)[0], targets, reduction="none")

    n = len(stream) - 1
    found = np.empty(n, np.float32)
    cuts = pairwise([*range(0, n - n % T, B * T), n - n % T, n])
    for begin, end in tqdm([c for c in cuts if c[1] > c[0]], disable=None, unit="batch"):
        rows = (max(1, (end - begin) // T), -1)
        idx, targets = (
            mx.array(stream[begin + i : end + i].astype(np.int32).reshape(rows)) for i in (0, 1)
        )
        found[begin:end] = np.array(losses(idx, targets)).ravel()
    return found


def by_field(nats: np.ndarray, fields: np.ndarray) -> dict[str, tuple[int, float]]:
    """Bytes and sum of nats of each of FIELDS that is there ("": `headers`), then of the whole."""
    count = np.bincount(fields, minlength=len(FIELDS)).tolist()
    total = np.bincount(fields, weights=nats, minlength=len(FIELDS)).tolist()
    parts = {name or "headers": (n, t) for name, n, t in zip(FIELDS, count, total, strict=True)}
    return {name: part for name, part in parts.items() if part[0]} | {
        "whole": (len(nats), nats.sum(dtype=np.float64).item())
    }


def report(model: BDH, dataset: str, mode: str | None, settings: dict) -> str:
    """A table of nats and bits per byte by field. Raises UserError."""
    if mode is None:
        raise UserError("the checkpoint names no training mode to format records in; give --mode")
    with tempfile.TemporaryDirectory() as folder:
        about, stream, fields = data.whole(dataset, mode, Path(folder))
    if len(stream) < 2:
        raise UserError(f"{dataset} has {len(stream)} byte; a loss needs at least 2")
    T, B = settings.get("BLOCK_SIZE", BLOCK_SIZE), settings.get("BATCH_SIZE", 1)
    parts = by_field(byte_losses(model, stream, B, T), fields[1:])
    lines = [
        f"{dataset}: {about['records']:,} records, mode {mode}, {len(stream):,} bytes in blocks of "
        f"{T:,}, as the trainer validates",
        *(f"  skipped {n:,}: {reason}" for reason, n in about["skipped"].items()),
        f"{'field':11} {'bytes':>12} {'share':>7} {'nats/byte':>10} {'bits/byte':>10}",
    ]
    for name, (n, nats) in parts.items():
        share, mean = n / parts["whole"][0], nats / n
        lines.append(f"{name:11} {n:12,} {share:7.1%} {mean:10.4f} {mean / math.log(2):10.4f}")
    return "\n".join(lines)
