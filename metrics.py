"""A run's metrics.jsonl, one JSON object per line that the trainer prints; which neurons fire."""

import json
import math
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

import files
from bdh_mlx import BDH
from errors import UserError
from fast_layer import forward_segment, ln
from processes import Processes

WATCHED, PIECE = 4096, 256  # validation bytes whose neurons are counted; of them at once


def read(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are as they were written; none without a file."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            m = json.loads(line)
            if m.pop("crc32", crc32(m)) == crc32(m) and m["step"] >= 0:
                lines.append(m)
    return lines


def crc32(m: dict) -> int:
    """Of a line without it: a flipped bit may leave JSON that means something else."""
    m = {name: value for name, value in m.items() if name != "crc32"}
    return zlib.crc32(json.dumps(m).encode())


def sealed(m: dict) -> str:
    return json.dumps(m | {"crc32": crc32(m)}) + "\n"


def evaluations(history: list[dict]) -> list[int]:
    """The steps that were evaluated, in order."""
    return [m["step"] for m in history if "val_loss" in m]


def open_log(
    run: Path, step: int, together: Processes, json_to=None
) -> tuple[Callable, list[dict]]:
    """A function that logs to metrics.jsonl and the terminal, and all that was logged, a list to
    which it adds.

    The terminal gets them as text, or the file `json_to` as they are. Lines after `step`, of work
    that was lost, are dropped, so that each step is told once; all are where a run begins.
    """
    path = run / "metrics.jsonl"
    history = together.share([m for m in read(path) if step and m["step"] <= step])
    if together.first:
        files.write_whole(path, "".join(map(sealed, history)))

    def log(**m):
        for name, value in m.items():
            if isinstance(value, float) and not math.isfinite(value):
                m[name] = None  # JSON knows no NaN
        history.append(m)
        if not together.first:
            return
        try:
            with path.open("a") as file:
                file.write(sealed(m))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        if json_to:
            print(sealed(m), end="", file=json_to, flush=True)
        else:
            bold = "val_loss" in m and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            tqdm.write(f"\x1b[1m{told(m)}\x1b[0m" if bold else told(m))

    return log, history


def told(m: dict) -> str:
    """A line of metrics.jsonl as the terminal shows it."""
    if "samples" in m:
        return "\n".join(f"--- sample at iteration {m['step']}\n{text}" for text in m["samples"])
    if "val_loss" in m:
        fields = ", ".join(f"{k} {v:.2f}" for k, v in m["val_bpb_fields"].items())
        loss = f"validation {m['val_loss']:.4f} | bits/byte {m['val_bpb']:.4f} ({fields})"
        return "\n".join(
            [f"iter {m['step']:>6} | {loss}", *map("advice: {}".format, m["advice"].values())]
        )
    norm = math.nan if m["grad_norm"] is None else m["grad_norm"]
    return (
        f"iter {m['step']:>6} | loss {m['loss']:.4f} | lr {m['lr']:.1e} | norm {norm:.2f} | "
        f"{m['bytes_per_s']:,.0f} bytes/s | peak {m['peak_gb']:.2f} GB | "
        f"{duration(m['seconds_left'])} left"
    )


def duration(seconds: float) -> str:
    """In minutes, hours or days."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 72 else f"{hours // 24:,} days"


def printing(json_to, together: Processes):
    """A context for print: to stderr beside lines of JSON, nowhere but in the first process."""
    if not together.first:
        return redirect_stdout(Path(os.devnull).open("w"))
    return redirect_stdout(sys.stderr) if json_to else nullcontext()


def activity(model: BDH, val: np.ndarray, T: int) -> dict[str, list[float] | int]:
    """Share of the neurons that are not 0 in each layer, `active_x` and `active_y`, and how many
    are `dead`, excited in no layer: over the first WATCHED bytes of val in blocks of T, without
    dropout. The paper names 5 % for x, less for y.
    """
    watched, L = val[:WATCHED].astype(np.int32), model.config.n_layer
    weights = (model.encoder, model.encoder_v, model.decoder.reshape(*model.encoder.shape[::2], -1))
    active, excited = np.zeros((2, L)), mx.array(False)
    for begin in range(0, len(watched), T):
        block, S = watched[begin : begin + T], [None] * L
        for position in range(0, len(block), PIECE):
            v = ln(model.embed(mx.array(block[None, position : position + PIECE])))
            for i in range(L):
                v, S[i], kept = forward_segment(v, S[i], weights, position, PIECE)
                x, y = kept[5], kept[8]
                active[:, i] += [mx.mean(of > 0).item() * v.shape[1] for of in (x, y)]
                excited = excited | mx.any(x > 0, -2)
            mx.eval(excited)  # or each x would be kept to the end
    x, y = (active / len(watched)).tolist()
    return {"active_x": x, "active_y": y, "dead": excited.size - excited.sum().item()}
