"""A run's metrics.jsonl: one JSON object per line that the trainer prints."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

import checkpoints
from bdh_mlx import UserError


def evaluations(history: list[dict]) -> list[int]:
    """The steps that were evaluated, in order."""
    return [m["step"] for m in history if "val_loss" in m]


def open_log(run: Path, step: int) -> tuple[Callable, list[dict]]:
    """A function that logs to metrics.jsonl and the terminal, and all that was logged, a list to
    which it adds.

    Lines after `step`, of work that was lost, are dropped, so that each step is told once.
    """
    path, kept = run / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
            kept += [m for m in [json.loads(line)] if m["step"] <= step]
    checkpoints.write_whole(path, "".join(json.dumps(m) + "\n" for m in kept))

    def log(**m):
        kept.append(m)
        try:
            with path.open("a") as file:
                file.write(json.dumps(m) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        tqdm.write(
            f"iter {m['step']:>6} | validation {m['val_loss']:.4f} | bits/byte {m['val_bpb']:.4f}"
            f" ({', '.join(f'{k} {v:.2f}' for k, v in m['val_bpb_fields'].items())})"
            if "val_loss" in m
            else f"iter {m['step']:>6} | loss {m['loss']:.4f} | lr {m['lr']:.1e} | "
            f"norm {m['grad_norm']:.2f} | {m['bytes_per_s']:,.0f} bytes/s | "
            f"peak {m['peak_gb']:.2f} GB | {m['seconds_left'] / 60:.1f} min left"
        )

    return log, kept
