"""How much memory is free, and what a training step needs in each MEMORY_MODE.

The estimate of a step is the sum of what the forward pass saves, what one segment needs while it
is computed, and the parameters with their gradients and moments.
"""

import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from bdh_lib.compute.device import on_gpu, on_metal
from bdh_lib.compute.layer import CPU_ROWS, Compute, default_chunk, default_groups, segments
from bdh_lib.rules import CheckedConfig
from bdh_lib.script import limits


class MemoryMode(NamedTuple):
    """A MEMORY_MODE: the two fields of Compute that it sets."""

    segment_rows: int
    saved_activations: int


MODES = {
    "fast": MemoryMode(32768, 4),
    "balanced": MemoryMode(16384, 1),
    "small": MemoryMode(4096, 0),
}
MAX_ARRAY_BYTES = 2**31  # Macs limit a buffer to a few GB
METAL_ROWS = 2048  # 34 GFLOP a product by default: macOS ends GPU work that delays its display
CACHE_BYTES = 2 * 10**9  # of freed buffers that generation keeps on Metal


def keep_float32_exact(dtype: str) -> None:
    """Let Metal's products of float32 have all their bits where this DTYPE is float32.

    An M5 would round to 11 bits. MLX reads the environment at its first product.
    """
    if dtype == "float32" and on_metal():
        os.environ.setdefault("MLX_ENABLE_TF32", "0")


def compute_for(config: CheckedConfig, mode: str, dtype: str) -> Compute:
    """Return the Compute of a MEMORY_MODE for a BDHConfig.

    dtype is DTYPE; "auto" is bfloat16 on a GPU and float32 on a CPU.
    """
    rows, saved_activations = MODES[mode]
    dtype = getattr(mx, ("bfloat16" if on_gpu() else "float32") if dtype == "auto" else dtype)
    max_segment_rows = MAX_ARRAY_BYTES // (config.n_head * config.neurons_per_head * dtype.size)
    chunk = default_chunk(config.n_embd)
    if on_metal():  # a Mac before M5 has fewer FLOP for a byte of traffic, so small squares pay
        rows, chunk = min(rows, METAL_ROWS), max(128, chunk // 2)
    rows = min(rows, max_segment_rows if on_gpu() else CPU_ROWS)
    groups = default_groups(config.n_head)
    return Compute(dtype, chunk, rows, max_segment_rows, saved_activations, groups)


CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = {  # by version: limit, usage, the reclaimable field of memory.stat
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> float:
    """Return the bytes a run may use: a GPU's memory, else free RAM.

    Free RAM respects the limits of a container or a service manager. A Mac's GPU uses its RAM, up
    to a working set.
    """
    info = mx.device_info()
    if sys.platform == "darwin":
        return min(mac_free_memory(), info.get("max_recommended_working_set_size", math.inf))
    if on_gpu():
        return 0.95 * info.get("total_memory", 0)
    meminfo = Path("/proc/meminfo").read_text()
    fields = dict(line.split(":") for line in meminfo.splitlines())
    free = 1024 * int(fields["MemAvailable"].split()[0])
    return 0.9 * max(0, min(free, *cgroup_headroom(), *ulimit_headroom()))


def ulimit_headroom() -> list[float]:
    """Return the bytes that limits on this process leave for arrays: its threads take the rest."""
    return [max(0, size - least) for _, size, least in limits.memory_limits()]


@lru_cache(maxsize=1)
def mac_free_memory() -> float:
    """Return the bytes that a Mac's programs leave by `vm_stat`, else 0.6 of its memory.

    They are read once, before the model takes any.
    """
    try:
        # without close_fds Python need not fork, which can hang once Metal is at work
        options = {"capture_output": True, "text": True, "timeout": 10, "close_fds": False}
        output = subprocess.run(["/usr/bin/vm_stat"], **options).stdout
        page = int(re.search(r"page size of (\d+)", output)[1])
        counts = re.findall(r"^Pages (?:free|inactive|speculative): +(\d+)", output, re.M)
        free, inactive, speculative = map(int, counts)
        return 0.9 * page * (free + inactive + speculative)
    except (OSError, subprocess.SubprocessError, TypeError, ValueError):
        return 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_headroom(cgroup: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Return the free bytes under each memory limit on this process's control groups.

    The first item is infinity, so that the list has a minimum where there is no limit.
    """
    headroom = [math.inf]
    with suppress(OSError, ValueError):
        for line in cgroup.read_text().splitlines():
            _, kinds, path = line.split(":", 2)  # "0::/a/b" in version 2, "4:memory:/a/b" in 1
            if not kinds or "memory" in kinds.split(","):
                root = CGROUPS / ("memory" if kinds else "")
                # some containers see the host's path, of which only the root exists
                folder = root / path.strip("/")
                groups = [
                    group for group in (folder, *folder.parents) if group.is_relative_to(root)
                ]
                names = CGROUP_FILES[1 if kinds else 2]
                headroom += [_group_headroom(group, *names) for group in groups]
    return headroom


def _group_headroom(group: Path, limit: str, used: str, cached: str) -> float:
    """Return the free bytes under a group's limit, or infinity. Page cache counts as free."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        maximum, usage = (float((group / name).read_text()) for name in (limit, used))
        return maximum - usage + int(stat[cached])
    except (OSError, ValueError, KeyError):  # ValueError: "max"
        return math.inf


# Copies that are alive at the peak, fitted to measured peaks (docs/log.md).
PARAMETER_COPIES = 13.4  # weights, gradients, moments, their new and old values in an update
SEGMENT_COPIES = 5.7  # the activations of a segment and their gradients
STATE_COPIES = 3.55  # the states of a segment's chunks and their gradients
LOGIT_BYTES = 16  # of each logit: four copies in float32
CPU_AHEAD = 1.2  # MLX allocates before it computes


def estimate_step_bytes(config: CheckedConfig, B: int, T: int, compute: Compute) -> float:
    """Estimate the peak bytes of a step on blocks (B, T) of a model of this BDHConfig.

    A test checks that it is within 20 % of the peak that a CPU measures. docs/log.md has those of
    an H100: without a memory limit fast took 26.7 GB where 15.6 were estimated (2026-11-27).
    """
    D, H, N = config.n_embd, config.n_head, config.neurons_per_head
    V, L, C = config.vocab_size, config.n_layer, compute.chunk
    itemsize = compute.dtype.size
    rows = B * T
    if on_gpu() and B * min(C, T) * H * N >= 2**31:  # elements of an array: kernels fail
        return math.inf
    activation = H * N * itemsize  # of one row
    state = activation * D if T > C else 0  # of one sequence; the last chunk needs none
    parts = segments(B, T, compute)
    segment = max(end - begin for begin, end in parts) * B
    saved = rows * (4 * D * (H + 2) + H * min(C, T) * itemsize)
    # of each chunk, in dtype; or before each segment but the first, in float32
    n_states = rows // C if compute.saved_activations else B * (len(parts) - 1) * 4 // itemsize
    saved += n_states * state
    # `working` includes the activations of the last layer
    activations = (L - 1) * max(0, compute.saved_activations - 1) * rows * activation
    working = SEGMENT_COPIES * segment * activation + STATE_COPIES * max(B, segment // C) * state
    parameters = PARAMETER_COPIES * 4 * config.n_parameters
    logits = LOGIT_BYTES * rows * V
    peak = parameters + L * saved + activations + working + logits
    return peak * (1 if on_gpu() else CPU_AHEAD)


def set_mlx_memory_limit(peak: float, compute: Compute) -> None:
    """Limit MLX to about `peak` bytes where it runs ahead: on a GPU, and in one stream of a CPU.

    MLX exceeds the limit by about 5 % before it waits. Where a GPU has room, the limit is higher.
    Near it, Metal frees all cached buffers and makes them anew in each step, and CUDA waits, which
    costs a small model in mode "fast" a third of its time (docs/log.md). On CUDA the other modes
    keep the tight limit: whoever chooses them wants the memory.
    """
    if not on_gpu():
        if compute.groups == 1:  # several streams wait for one another
            mx.set_memory_limit(int(peak / CPU_AHEAD))
        return
    if not math.isfinite(peak):  # started all the same, by IGNORE_MEMORY_CHECK
        return
    room = 0
    if on_metal():
        room = min(1.5 * peak, 0.7 * available_bytes())
    elif compute.saved_activations == MODES["fast"].saved_activations:
        room = min(3 * peak, 0.5 * available_bytes())
    mx.set_memory_limit(int(max(0.95 * peak, room)))


def limit_cache() -> None:
    """Limit MLX's cache on Metal: texts of different lengths leave buffers that none reuses."""
    if on_metal():
        mx.set_cache_limit(CACHE_BYTES)


def is_exhausted(error: RuntimeError) -> bool:
    """Test for an error of Metal or CUDA that says memory is out; a CPU's system sends none."""
    texts = ("out of memory", "Unable to allocate", "Insufficient Memory", "maximum allowed buffer")
    return any(text in str(error) for text in (*texts, "Resource limit"))


def is_gpu_fault(error: RuntimeError) -> bool:
    """Test for an error of Metal that says macOS ended the GPU's work, with memory left."""
    return "[METAL] Command buffer execution failed" in str(error) and not is_exhausted(error)
