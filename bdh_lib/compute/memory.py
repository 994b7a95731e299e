"""How much memory a training step takes, and which MEMORY_MODE fits.

The estimate adds what is kept from the forward pass for the backward one, what a segment needs
while it is computed, and the parameters with their gradients and averages.
"""

import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx

from bdh_lib.compute.layer import Compute, default_chunk, segments
from bdh_lib.compute.rope import on_gpu
from bdh_lib.errors import UserError

MODES = {
    "fast": (32768, 4),
    "balanced": (16384, 1),
    "small": (4096, 0),
}  # Compute.rows and Compute.saved_activations
LARGEST = 2**31  # bytes of one array: Macs limit a buffer to a few GB
CPU_ROWS = 1024  # a segment's activation stays near a CPU's caches


def compute_for(config, memory: str, dtype: str) -> Compute:
    """MEMORY_MODE and DTYPE for the layer; dtype "auto" is bfloat16 on a GPU, else float32."""
    rows, keep = MODES[memory]
    dtype = getattr(mx, ("bfloat16" if on_gpu() else "float32") if dtype == "auto" else dtype)
    bound = LARGEST // (config.n_head * config.neurons_per_head * dtype.size)
    rows = min(rows, bound if on_gpu() else CPU_ROWS)
    return Compute(dtype, default_chunk(config.n_embd), rows, keep)


CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # by version: limit, what is used, which of memory.stat can be taken back
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available() -> float:
    """Bytes a run may take: a Mac's recommended working set, a card's memory, else free RAM.

    Free RAM is what the machine has and what a container or a service manager leaves of it.
    """
    info = mx.device_info()
    if on_gpu():
        return info.get("max_recommended_working_set_size", 0.95 * info.get("total_memory", 0))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
        return 0.9 * max(0, min(free, *cgroup_rooms()))
    return 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_rooms(own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Bytes that each limit on this process's control groups leaves; infinity first."""
    rooms = [math.inf]
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)  # "0::/a/b" in version 2, "4:memory:/a/b" in 1
            if not kinds or "memory" in kinds.split(","):
                root = CGROUPS / ("memory" if kinds else "")
                at = root / path.strip("/")  # the host's in some containers: only the root is there
                groups = [group for group in (at, *at.parents) if group.is_relative_to(root)]
                rooms += [_room(group, *CGROUP_FILES[bool(kinds)]) for group in groups]
    return rooms


def _room(group: Path, limit: str, used: str, cached: str) -> float:
    """Bytes that a group's limit leaves; infinity without one. Page cache counts as free."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        most, now = (float((group / name).read_text()) for name in (limit, used))
        return most - now + int(stat[cached])
    except (OSError, ValueError, KeyError):  # ValueError: "max"
        return math.inf


# Fitted to measured peaks (docs/log.md): how many copies of each are alive at the worst moment.
PARAMETERS, SEGMENT, STATES = 13.4, 5.7, 3.55
CPU_AHEAD = 1.2  # MLX allocates on a CPU before it computes, and nothing holds it back there


def estimate(config, B: int, T: int, compute: Compute) -> float:
    """Peak bytes of a training step on blocks (B, T), within 20 % of those in docs/log.md."""
    D, H, N = config.n_embd, config.n_head, config.neurons_per_head
    V, L, e, C, rows = config.vocab_size, config.n_layer, compute.dtype.size, compute.chunk, B * T
    activation = H * N * e  # of one row
    state = activation * D if T > C else 0  # of one sequence, after a chunk that another follows
    parts = segments(B, T, compute)
    segment = max(end - begin for begin, end in parts) * B
    saved = rows * (4 * D * (H + 2) + H * min(C, T) * e)
    saved += (rows // C if compute.saved_activations else 4 // e * B * (len(parts) - 1)) * state
    # of the last layer they are the working set
    activations = (L - 1) * max(0, compute.saved_activations - 1) * rows * activation
    working = SEGMENT * segment * activation + STATES * max(B, segment // C) * state
    peak = PARAMETERS * 4 * config.n_parameters + L * saved + activations + working + 16 * rows * V
    return peak * (1 if on_gpu() else CPU_AHEAD)


def extra_state_bytes(s: SimpleNamespace) -> int:
    """Bytes of the weights' average (EMA), which an update holds twice."""
    return 8 * s.BDH_CONFIG.n_parameters if s.EMA_DECAY else 0


def select_mode(s: SimpleNamespace) -> tuple[str, Compute, float]:
    """The setting of MEMORY_MODE that is to be used, as a Compute, and its estimated peak in bytes.

    "auto" is the fastest that fits. Raises UserError with settings that fit where none does.
    """
    names = list(MODES) if s.MEMORY_MODE == "auto" else [s.MEMORY_MODE]
    for name in names:
        compute = compute_for(s.BDH_CONFIG, name, s.DTYPE)
        peak = estimate(s.BDH_CONFIG, s.BATCH_SIZE, s.BLOCK_SIZE, compute) + extra_state_bytes(s)
        if peak <= available() or (s.IGNORE_MEMORY_CHECK and name == names[-1]):
            return name, compute, peak
    raise UserError(oom_advice(s, peak))


def set_limit(peak: float) -> None:
    """Keep MLX from running ahead of a GPU beyond `peak` bytes; on a CPU that only costs time.

    MLX goes some 5 % over the limit before it waits.
    """
    if on_gpu():
        mx.set_memory_limit(int(0.95 * peak))


def slow_note(s: SimpleNamespace) -> str:
    """A warning where a block takes minutes: a large model on a CPU."""
    large = not on_gpu() and s.BDH_CONFIG.n_parameters * s.BLOCK_SIZE > 10**10
    return " (minutes for each block: the model is large for a CPU)" if large else ""


def is_exhausted(error: RuntimeError) -> bool:
    """Whether it is how Metal or CUDA says that memory is out; a CPU just ends the process."""
    messages = (
        "out of memory",
        "Unable to allocate",
        "Insufficient Memory",
        "maximum allowed buffer",
    )
    return any(text in str(error) for text in (*messages, "Resource limit"))


def oom_advice(s: SimpleNamespace, peak: float) -> str:
    """What does not fit, by how much, and the nearest settings that do."""
    fits = []
    B, T, config = s.BATCH_SIZE, s.BLOCK_SIZE, s.BDH_CONFIG
    tries = [("MEMORY_MODE small", B, T, config)]
    tries += [
        (f"BATCH_SIZE {b}, GRAD_ACCUM {s.GRAD_ACCUM * B // b}", b, T, config) for b in halvings(B)
    ]
    tries += [(f"BLOCK_SIZE {t}", B, t, config) for t in halvings(T)]
    tries += [(f"BATCH_SIZE 1, BLOCK_SIZE {t}", 1, t, config) for t in halvings(T)]
    for d in halvings(config.n_embd):
        tries.append((f"n_embd {d}", B, T, replace(config, n_embd=d)))
    for change, b, t, c in tries:
        ways = change.split(" ")[0], change
        if ways[0] not in {w.split(" ")[0] for w in fits}:
            tried = SimpleNamespace(**vars(s) | {"BDH_CONFIG": c, "BATCH_SIZE": b})
            need = estimate(c, b, t, compute_for(c, "small", s.DTYPE)) + extra_state_bytes(tried)
            if need <= available():
                fits.append(f"{change} (with MEMORY_MODE small: {need / 1e9:.1f} GB)")
    return (
        f"a step on {B} blocks of {T:,} bytes needs about {peak / 1e9:.1f} GB, "
        f"{available() / 1e9:.1f} GB can be had. What fits: {'; '.join(fits) or 'nothing near'}. "
        "--ignore-memory-check starts all the same"
    )


def halvings(n: int) -> list[int]:
    """n/2, n/4, ... down to 1, where whole."""
    return [n >> i for i in range(1, n.bit_length()) if n % (1 << i) == 0]
