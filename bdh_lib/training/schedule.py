"""How long a run is, in steps, epochs and bytes, and its learning rate."""

import math

from bdh_lib.settings import Settings


def blocks_per_step(s: Settings) -> int:
    """Return the blocks that a step reads, over all processes."""
    return s.BATCH_SIZE * s.GRAD_ACCUM * s.PROCESSES


def total_steps(s: Settings, n_bytes: int) -> int:
    """Return the number of steps of the run: up to MAX_ITERS or the end of EPOCHS; one is set."""
    return min(s.MAX_ITERS or math.inf, steps_of_epochs(s, n_bytes))


def steps_of_epochs(s: Settings, n_bytes: int) -> int | float:
    """Return the number of steps that EPOCHS take, infinity without EPOCHS."""
    blocks = math.ceil(n_bytes / s.BLOCK_SIZE)
    return math.ceil(s.EPOCHS * blocks / blocks_per_step(s)) if s.EPOCHS else math.inf


def end_setting(s: Settings, n_steps: int) -> str:
    """Return the name of the setting that ends a run of n_steps."""
    return "MAX_ITERS" if n_steps == s.MAX_ITERS else "EPOCHS"


def schedule_summary(s: Settings, n_bytes: int) -> str:
    """Say how long the run is, and whether MAX_ITERS or EPOCHS ends it before the other."""
    total = total_steps(s, n_bytes)
    bytes_per_step = s.BLOCK_SIZE * blocks_per_step(s)
    epochs = total * bytes_per_step / n_bytes
    cut = ""
    if s.EPOCHS and total < steps_of_epochs(s, n_bytes):
        cut = f"; MAX_ITERS ends it before EPOCHS ({s.EPOCHS:,g})"
    elif total < (s.MAX_ITERS or 0):
        cut = f"; EPOCHS ({s.EPOCHS:,g}) ends it before MAX_ITERS ({s.MAX_ITERS:,})"
    if s.EPOCHS and epochs > 1.05 * s.EPOCHS:
        cut += "; each epoch is rounded up to whole blocks, and the run to whole iterations"
    coverage = f"{total * bytes_per_step:,} bytes or {epochs:,.2f} epochs"
    return f"{total:,} iterations of {bytes_per_step:,} bytes are {coverage}{cut}"


def must_read_loss(completed: int, total: int, s: Settings) -> bool:
    """Tell whether a log line, an evaluation or the end needs the loss after `completed` steps."""
    return completed == total or completed % s.LOG_FREQ == 0 or completed % s.EVAL_FREQ == 0


def learning_rate(step: int, total: int, s: Settings) -> float:
    """Return the rate of step number `step` (from 0): a linear rise, then half a cosine down."""
    if step < s.WARMUP_ITERS:
        return s.LEARNING_RATE * (step + 1) / s.WARMUP_ITERS
    end = s.LR_DECAY_ITERS or total
    done = min(1.0, (step - s.WARMUP_ITERS) / max(1, end - s.WARMUP_ITERS))
    low = s.MIN_LR_RATIO
    return s.LEARNING_RATE * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
