"""How long a run is, in steps, epochs and bytes, and its learning rate."""

import math

from bdh_lib.settings import Settings
from bdh_mlx import BDHConfig


def blocks_per_step(s: Settings) -> int:
    """Return the blocks that a step reads, over all processes."""
    return s.BATCH_SIZE * s.GRAD_ACCUM * s.PROCESSES


def total_steps(s: Settings, n_bytes: int) -> int:
    """Return the number of steps of the run: up to MAX_ITERS or the end of EPOCHS; one is set."""
    blocks = math.ceil(n_bytes / s.BLOCK_SIZE)
    by_epochs = math.ceil(s.EPOCHS * blocks / blocks_per_step(s)) if s.EPOCHS else math.inf
    return min(s.MAX_ITERS or math.inf, by_epochs)


def end_setting(s: Settings, n_steps: int) -> str:
    """Return the name of the setting that ends a run of n_steps."""
    return "MAX_ITERS" if n_steps == s.MAX_ITERS else "EPOCHS"


def schedule_summary(s: Settings, n_bytes: int) -> str:
    """Say how long the run is, and whether MAX_ITERS or EPOCHS ends it before the other."""
    total = total_steps(s, n_bytes)
    bytes_per_step = s.BLOCK_SIZE * blocks_per_step(s)
    epochs = total * bytes_per_step / n_bytes
    cut = ""
    if epochs < (s.EPOCHS or 0):
        cut = f"; MAX_ITERS ends it before EPOCHS ({s.EPOCHS:,g})"
    elif total < (s.MAX_ITERS or 0):
        cut = f"; EPOCHS ({s.EPOCHS:,g}) ends it before MAX_ITERS ({s.MAX_ITERS:,})"
    coverage = f"{total * bytes_per_step:,} bytes or {epochs:,.2f} epochs"
    return f"{total:,} iterations of {bytes_per_step:,} bytes are {coverage}{cut}"


RECIPE_BYTES = 4_200_000
MEASURED_PASSES = {  # by the bytes of records that were trained on (docs/log.md, 2026-11-27, -28)
    100_000: "the default settings were best after 12 to 16 passes",
    500_000: "the default settings were best after 9 to 10 passes",
    RECIPE_BYTES: "the default settings were best at the end of 13 passes",
    46_000_000: "the default settings until 2026-11-28 still gained after 0.4 passes; "
    "--dropout 0.1 took 0.06 bits per byte off",
}


def passes_note(s: Settings, n_bytes: int) -> str | None:
    """Say how many passes were best where the data are far smaller or larger than the recipe's.

    None for another size of the model, and for data of about the recipe's size.
    """
    if s.BDH_CONFIG.n_parameters != BDHConfig().n_parameters or 0.5 <= n_bytes / RECIPE_BYTES <= 2:
        return None
    passes = total_steps(s, n_bytes) * s.BLOCK_SIZE * blocks_per_step(s) / n_bytes
    near = min(MEASURED_PASSES, key=lambda size: abs(math.log(size / n_bytes)))
    more = "; more bytes were not measured" if n_bytes > max(MEASURED_PASSES) else ""
    return (
        f"{passes:,.1f} passes over {n_bytes / 1e6:,.2f} MB; "
        f"on {near / 1e6:g} MB {MEASURED_PASSES[near]}{more}"
    )


def is_read(completed: int, total: int, s: Settings) -> bool:
    """Tell whether a log line, an evaluation or the end needs the loss after `completed` steps."""
    return not (completed % s.LOG_FREQ and completed % s.EVAL_FREQ and completed < total)


def learning_rate(step: int, total: int, s: Settings) -> float:
    """Return the rate of step number `step` (from 0): a linear rise, then half a cosine down."""
    if step < s.WARMUP_ITERS:
        return s.LEARNING_RATE * (step + 1) / s.WARMUP_ITERS
    end = s.LR_DECAY_ITERS or total
    done = min(1.0, (step - s.WARMUP_ITERS) / max(1, end - s.WARMUP_ITERS))
    low = s.MIN_LR_RATIO
    return s.LEARNING_RATE * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
