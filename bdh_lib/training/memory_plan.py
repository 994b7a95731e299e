"""Which MEMORY_MODE fits a run, and which smaller settings would."""

import math
from collections.abc import Iterator
from dataclasses import replace

from bdh_lib.compute import memory
from bdh_lib.compute.device import on_gpu
from bdh_lib.compute.layer import Compute
from bdh_lib.errors import UserError
from bdh_lib.settings import Settings


def step_peak(s: Settings, compute: Compute) -> float:
    """Estimate the peak bytes of a training step with these settings and this Compute."""
    ema = 8 * s.BDH_CONFIG.n_parameters if s.EMA_DECAY else 0  # a step needs two copies
    return memory.estimate_step_bytes(s.BDH_CONFIG, s.BATCH_SIZE, s.BLOCK_SIZE, compute) + ema


def select_mode(s: Settings) -> tuple[str, Compute, float]:
    """Select a memory mode: its name, its Compute, and its estimated peak in bytes.

    "auto" selects the fastest mode that fits. Raises UserError, with settings that fit, if none
    does.
    """
    names = list(memory.MODES) if s.MEMORY_MODE == "auto" else [s.MEMORY_MODE]
    for name in names:
        compute = memory.compute_for(s.BDH_CONFIG, name, s.DTYPE)
        peak = step_peak(s, compute)
        if peak <= memory.available_bytes() or (s.IGNORE_MEMORY_CHECK and name == names[-1]):
            return name, compute, peak
    need = f"about {peak / 1e9:,.1f} GB" if math.isfinite(peak) else "arrays of 2^31 elements"
    raise UserError(
        f"a step on {s.BATCH_SIZE:,} blocks of {s.BLOCK_SIZE:,} bytes needs {need}, "
        f"{memory.available_bytes() / 1e9:,.1f} GB are available. {what_fits(s)}. "
        "--ignore-memory-check starts all the same"
    )


def is_small(s: Settings) -> bool:
    """Tell whether MEMORY_MODE is small, or auto where no other mode fits."""
    if s.MEMORY_MODE != "auto":
        return s.MEMORY_MODE == "small"
    balanced = memory.compute_for(s.BDH_CONFIG, "balanced", s.DTYPE)
    return step_peak(s, balanced) > memory.available_bytes()


def slow_note(s: Settings) -> str:
    """Return a warning if a batch takes several seconds: a large model on a CPU."""
    seconds = forward_seconds(s)
    if on_gpu() or seconds < 3:
        return ""
    return f" (a batch takes about {seconds:,.0f} s on two CPU cores)"


def forward_seconds(s: Settings) -> float:
    """Return the seconds of a forward pass on two busy cores, measured with six layers."""
    c = s.BDH_CONFIG
    return 3e-10 * c.n_parameters * c.n_layer / 6 * s.BATCH_SIZE * s.BLOCK_SIZE


def what_fits(s: Settings) -> str:
    """Name the nearest settings that need less memory and that the available memory holds."""
    fits = {}  # by the first setting that changes
    for change, changed in smaller_settings(s):
        smaller = Settings(**vars(s) | changed)
        need = step_peak(smaller, memory.compute_for(smaller.BDH_CONFIG, "small", s.DTYPE))
        if need <= memory.available_bytes():
            mode = "with MEMORY_MODE small: " if changed else ""
            fits.setdefault(change.split(" ")[0], f"{change} ({mode}{need / 1e9:,.1f} GB)")
    return f"What fits: {'; '.join(fits.values()) or 'nothing near'}"


def smaller_settings(s: Settings) -> Iterator[tuple[str, dict]]:
    """Yield changes that need less memory in words and as settings, the nearest first."""
    B, T, config = s.BATCH_SIZE, s.BLOCK_SIZE, s.BDH_CONFIG
    if not is_small(s):
        yield "MEMORY_MODE small", {}
    for b in halvings(B):
        yield f"BATCH_SIZE {b}, GRAD_ACCUM {s.GRAD_ACCUM * B // b}", {"BATCH_SIZE": b}
    for t in halvings(T):
        yield f"BLOCK_SIZE {t}", {"BLOCK_SIZE": t}
    for t in halvings(T):
        yield f"BATCH_SIZE 1, BLOCK_SIZE {t}", {"BATCH_SIZE": 1, "BLOCK_SIZE": t}
    for d in halvings(config.n_embd):
        yield f"n_embd {d}", {"BDH_CONFIG": replace(config, n_embd=d)}


def halvings(n: int) -> list[int]:
    """List the integers among n/2, n/4, ... down to 1."""
    return [n >> i for i in range(1, n.bit_length()) if n % (1 << i) == 0]
