"""`python train_mlx.py --tune`: the fastest way to compute a step on this machine, by trying.

The search begins where MEMORY_MODE auto does and continues as long as one of its neighbours is
faster. The winner is kept in CHECKPOINT_DIR/.tune, and auto takes it for new runs of the same shape
on the same machine. A run continues as it began: another way adds up in another order, and draws
other dropout.
"""

import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from bdh_lib import files
from bdh_lib.compute import memory
from bdh_lib.compute.device import on_cuda, on_gpu
from bdh_lib.compute.layer import Compute, default_chunk, segments
from bdh_lib.errors import UserError, warn
from bdh_lib.progress import heartbeat
from bdh_lib.script.interrupts import default_signals
from bdh_lib.settings import Settings
from bdh_lib.tables import format_table
from bdh_lib.training import checkpoints, memory_plan
from bdh_lib.training.distributed import World
from bdh_lib.training.schedule import blocks_per_step
from bdh_lib.training.step import compile_steps
from bdh_lib.training.train_state import init_train_state

SECONDS = 120  # that a search may take
GAIN = 1.02  # how many times as fast another way must be for the search to continue from it
SLOW = 1.25  # times the fastest one's seconds, from which on a candidate is not timed again
FINAL_ROUNDS = 8  # of two steps each, in which the best are compared, as far as time is left
PROBE = 512  # bytes of the block that foretells the time of a step
# parameters x bytes of a long run: about an hour on two CPU cores or on an H100, and by estimate
# half an hour to an hour on a Mac
LONG_CPU, LONG_METAL, LONG_CUDA = 10**13, 5 * 10**14, 10**16

# -------------------------------------------------------------------------------------- the choice


# sizes that a saved choice has: their names in its file, and as fields of a Compute
SIZES = {"chunk": "chunk", "rows": "segment_rows"}


def choice_dict(compute: Compute) -> dict:
    """Return a Compute as JSON: its mode by name, its chunk and its segment, sizes in bytes."""
    names = {mode.saved_activations: name for name, mode in memory.MODES.items()}
    mode = names[compute.saved_activations]
    sizes = {name: getattr(compute, field) for name, field in SIZES.items()}
    return {"mode": mode} | sizes


def is_choice(value: dict) -> bool:
    """Tell whether a dict read from a file is a choice as choice_dict gives it."""
    sizes = [value.get(name) for name in SIZES]
    are_sizes = all(type(size) is int and 0 < size < 2**40 for size in sizes)
    return are_sizes and value.get("mode") in [*memory.MODES]


def conditions(s: Settings) -> dict:
    """Return what a saved choice holds for: a shape, a machine, a version of MLX."""
    config = asdict(s.BDH_CONFIG)
    shape = config | {name: config[name] > 0 for name in ("dropout", "dropout_v")}
    shape |= {name: getattr(s, name) for name in ("BATCH_SIZE", "BLOCK_SIZE")}
    shape["dtype"] = str(memory.compute_for(s.BDH_CONFIG, "fast", s.DTYPE).dtype)
    machine = [mx.device_info().get("device_name"), str(mx.default_device()), os.cpu_count()]
    return shape | {"machine": machine, "mlx": mx.__version__}


def choice_file(s: Settings) -> Path:
    """Return the file that holds the choice for these settings here, if --tune has saved one."""
    key = files.sha256_text(json.dumps(conditions(s), sort_keys=True))[:16]
    return Path(s.CHECKPOINT_DIR, ".tune", f"{key}.json")


def saved_choice(s: Settings) -> tuple[str, dict]:
    """Return ("by --tune", the choice saved for these settings here), ("", {}) without one.

    A damaged file is ignored, with a warning.
    """
    try:
        choice = files.read_json_object(choice_file(s))
        if not choice:
            return "", {}
        if is_choice(choice) and choice.get("conditions") == conditions(s):
            return "by --tune", choice
        reason = f"{choice_file(s)} is damaged"
    except UserError as error:
        reason = str(error)
    warn(f"{reason}; it is ignored, and --tune writes it anew")
    return "", {}


def initial_choice(s: Settings, run: Path, step: int, world: World) -> tuple[str, dict]:
    """Return who chose how this run computes, in words, and the choice.

    A run that continues takes the choice of its checkpoint of `step`: ("as before", choice). A new
    run, of step 0, takes what --tune saved: ("by --tune", choice). Without a choice both are empty.
    """
    source = ""
    choice = {}
    if world.is_main and step:
        info = checkpoints.read_info(run, step)
        versions = info.get("versions")
        compute = info.get("compute")
        is_here = isinstance(versions, dict) and versions.get("device") == str(mx.default_device())
        if is_here and isinstance(compute, dict) and is_choice(compute):
            source = "as before"
            choice = compute
    elif world.is_main:
        source, choice = saved_choice(s)
    return world.broadcast_object([source, choice])


class Selection(NamedTuple):
    """How a run computes."""

    label: str  # the memory mode, who chose it, and sizes that differ from the mode's: for display
    source: str  # who chose: "as before", "by --tune"; "" if MEMORY_MODE alone decided
    compute: Compute
    peak: float  # estimated, in bytes


def select(s: Settings, source: str, choice: dict) -> Selection:
    """Return how a run computes.

    MEMORY_MODE auto takes `choice`, if there is one and it fits. In every mode a resumed run keeps
    its number of head groups, which on a CPU decides the order of a sum and the dropout masks.
    Raises UserError as memory_plan.select_mode does.
    """
    groups = choice.get("groups")
    is_divisor = type(groups) is int and groups > 0 and s.BDH_CONFIG.n_head % groups == 0
    as_before = {"groups": groups} if is_divisor else {}
    if choice and s.MEMORY_MODE == "auto":
        of_mode = memory.compute_for(s.BDH_CONFIG, choice["mode"], s.DTYPE)
        of_mode = replace(of_mode, **as_before)
        compute = replace(of_mode, **{field: choice[name] for name, field in SIZES.items()})
        sizes = f" (chunk {compute.chunk:,}, segment {compute.segment_rows:,})"
        label = f"{choice['mode']} {source}{sizes if compute != of_mode else ''}"
        peak = memory_plan.step_peak(s, compute)
        if peak <= memory.available_bytes() or s.IGNORE_MEMORY_CHECK:
            return Selection(label, source, compute, peak)
        print(f"memory: {label} needs {peak / 1e9:,.2f} GB, too much; taking what fits")
    mode, compute, peak = memory_plan.select_mode(s)
    return Selection(mode, "", replace(compute, **as_before), peak)


def hint(s: Settings, source: str, n_steps: int) -> str:
    """Return a line on --tune for a long run that computes as auto guesses; "" for others.

    `source` is that of its Selection.
    """
    work = s.BDH_CONFIG.n_parameters * n_steps * blocks_per_step(s) * s.BLOCK_SIZE
    guessed = s.MEMORY_MODE == "auto" and not source
    is_long = work >= (LONG_CUDA if on_cuda() else LONG_METAL if on_gpu() else LONG_CPU)
    if not guessed or not is_long or memory_plan.slow_note(s):  # slow: --tune would refuse
        return ""
    return "note: --tune looks for a faster way to compute on this machine, in at most 2 minutes"


# -------------------------------------------------------------------------------------- the search


class TimedSteps:
    """Steps of one model on random bytes, computed in any way; `peaks`: bytes, by Compute."""

    def __init__(self, s: Settings, start: Compute):
        self.s = s
        self.state = init_train_state(s, start)
        self.compiled, self.peaks = {}, {}
        self.longest = 0.0
        self.deadline = time.monotonic() + SECONDS

    def has_time(self) -> bool:
        """Tell whether a trial as long as the longest one so far would end in time."""
        return time.monotonic() + self.longest < self.deadline

    def seconds(self, compute: Compute, B: int, T: int) -> float:
        """Return the seconds of the faster of two steps on blocks (B, T); the first compiles."""
        start = time.monotonic()
        memory.set_mlx_memory_limit(memory_plan.step_peak(self.s, compute), compute)
        mx.reset_peak_memory()
        best = min(self.step(compute, B, T) for _ in range(2))
        self.peaks[compute] = max(mx.get_peak_memory(), self.peaks.get(compute, 0))
        self.longest = max(self.longest, time.monotonic() - start)
        return best

    def step(self, compute: Compute, B: int, T: int) -> float:
        """Return the seconds of one step; the first in a way includes its compilation."""
        s = self.s
        self.state.model.compute = compute  # read when the step is traced
        if compute not in self.compiled:
            self.compiled[compute] = compile_steps(self.state, s)
        micro_step, apply_update = self.compiled[compute]
        batch = mx.random.randint(0, 256, (2, B, T))
        weights = mx.full((B, T), 1 / (B * T))
        mx.eval(batch, weights)
        start = time.perf_counter()
        with default_signals():
            loss, gradients = micro_step(*batch, weights, mx.random.key(0))
        mx.eval(loss, gradients)
        mx.eval(apply_update(loss, gradients), self.state.trees())
        return time.perf_counter() - start


def adjacent_sizes(n: int) -> tuple[int, int]:
    """Return the double and the half of a size, which are tried next."""
    return n * 2, n // 2


def neighbours(s: Settings, compute: Compute) -> list[Compute]:
    """Return the same with chunk or segment doubled or halved or another mode, what fits of it.

    On a GPU no segment is longer than that of a mode by itself, and on Metal no chunk than on CUDA:
    macOS ends GPU work that delays its display.
    """
    modes = [memory.compute_for(s.BDH_CONFIG, mode, s.DTYPE) for mode in memory.MODES]
    chunk = default_chunk(s.BDH_CONFIG.n_embd) if memory.on_metal() else s.BLOCK_SIZE
    rows = modes[0].segment_rows if memory.on_gpu() else s.BATCH_SIZE * s.BLOCK_SIZE
    near = [replace(compute, chunk=n) for n in adjacent_sizes(compute.chunk) if 0 < n <= chunk]
    near_rows = [n for n in adjacent_sizes(compute.segment_rows) if 0 < n <= rows]
    near += [replace(compute, segment_rows=n) for n in near_rows]
    near += [replace(mode, chunk=compute.chunk) for mode in modes]
    return [c for c in near if memory_plan.step_peak(s, c) <= memory.available_bytes()]


def equivalence_key(s: Settings, compute: Compute) -> tuple:
    """Return a key that is equal for two Computes that compute these blocks in the same way."""
    cuts = segments(s.BATCH_SIZE, s.BLOCK_SIZE, compute)
    return tuple(cuts), min(compute.chunk, s.BLOCK_SIZE), compute.saved_activations


def new_neighbours(s: Settings, compute: Compute, seen: set[tuple]) -> dict[tuple, Compute]:
    """Return the neighbours by equivalence_key, without those whose key is in `seen`."""
    keyed = {equivalence_key(s, c): c for c in neighbours(s, compute)}
    return {key: c for key, c in keyed.items() if key not in seen}


def time_candidates(
    s: Settings, candidates: list[Compute], timed: TimedSteps, rounds: int, timings: dict
) -> dict[Compute, float]:
    """Return the best seconds of each candidate that there was time for.

    Appends the seconds of each trial to the list of its Compute in `timings`. The candidates are
    timed in turn, because the speed of a machine drifts. The slow ones drop out of `candidates`,
    but not the first, which the others must beat.
    """
    best = {}
    for _ in range(rounds):
        for compute in candidates:
            if not timed.has_time():
                return best
            seconds = timed.seconds(compute, s.BATCH_SIZE, s.BLOCK_SIZE)
            timings.setdefault(compute, []).append(seconds)
            best[compute] = min(seconds, best.get(compute, math.inf))
        candidates[1:] = [c for c in candidates[1:] if best[c] < SLOW * min(best.values())]
    return best


def search(s: Settings, start: Compute, timed: TimedSteps) -> tuple[Compute, dict[Compute, list]]:
    """Return the Compute to keep, and the seconds of the steps of each one that was timed."""
    best = start
    seen = {equivalence_key(s, start)}
    timings = {}
    while candidates := new_neighbours(s, best, seen):
        seen |= candidates.keys()
        times = time_candidates(s, [best, *candidates.values()], timed, 2, timings)
        if len(times) < 2 or times[best] < GAIN * min(times.values()):
            break
        best = min(times, key=times.get)
    least = min(map(min, timings.values()), default=0)
    finalists = [c for c in timings if c != start and min(timings[c]) < SLOW * least]
    final = {}
    if finalists:
        time_candidates(s, [start, *finalists], timed, FINAL_ROUNDS, final)
    latest = timings | final  # the last comparison alone counts, as far as there was time for it
    faster = [compute for compute in finalists if is_faster(latest[compute], latest[start])]
    timings = {compute: [*times, *final.get(compute, [])] for compute, times in timings.items()}
    return min(faster, key=lambda compute: min(timings[compute]), default=start), timings


def is_faster(seconds: list[float], baseline: list[float]) -> bool:
    """Tell whether three quarters of two or more `seconds` beat the best of `baseline`.

    On a busy machine a single lucky time is noise.
    """
    usual = sorted(seconds)[(3 * len(seconds) - 1) // 4]
    return min(len(seconds), len(baseline)) > 1 and usual < min(baseline)


def tune(s: Settings) -> int:
    """Search, print a table and keep the winner.

    Returns the exit code, 0. Raises UserError if a search is of no use.
    """
    if s.MEMORY_MODE != "auto":
        raise UserError(f"MEMORY_MODE is {s.MEMORY_MODE!r}; --tune is for 'auto': set it to that")
    start = memory_plan.select_mode(s)[1]
    file = choice_file(s)
    checkpoints.check_writable(file.parent)
    print(f"tuning: {s.BDH_CONFIG.n_parameters:,} parameters, batches of {s.BATCH_SIZE:,} x "
          f"{s.BLOCK_SIZE:,} bytes, on {mx.default_device()}, in at most {SECONDS} s")  # fmt: skip
    with heartbeat("tuning"):
        timed = TimedSteps(s, start)
        expect_time(s, start, timed)
        best, timings = search(s, start, timed)
    if len(timings) < 2:
        print("nothing kept: no other way was timed; if compiling took the time, run --tune again")
        return 0
    print(timings_table(s, timings, timed.peaks, start, best))
    content = choice_dict(best) | {"conditions": conditions(s)}
    files.atomic_write_text(file, json.dumps(content, indent=1))
    if best == start and min(map(min, timings.values())) < min(timings[start]):
        print("no other way was clearly faster; to try again, close other programs")
    print(f"kept in {file}: MEMORY_MODE auto takes it for new runs of this shape")
    return 0


def expect_time(s: Settings, start: Compute, timed: TimedSteps) -> None:
    """Time a short block, and set how long a first trial will take.

    Raises UserError if there is no time for several.
    """
    short = min(s.BLOCK_SIZE, PROBE)  # time is linear in T
    expected = timed.seconds(start, 1, short) * s.BATCH_SIZE * s.BLOCK_SIZE / short
    timed.longest = 6 * expected  # two trials at least, and some room
    if not timed.has_time():
        raise UserError(
            f"an iteration of this shape takes about {expected:,.0f} s here, too long to try "
            "several ways; lower BLOCK_SIZE or BATCH_SIZE"
        )
    timed.longest = 2.5 * expected  # of a trial: two steps, and some room


def timings_table(s: Settings, timings: dict, peaks: dict, start: Compute, best: Compute) -> str:
    """Return a table of the Computes that were timed: their speed, and their peak memory."""
    rows = [("MEMORY_MODE", "chunk", "segment", "bytes/s", "peak GB", "")]
    for compute, times in timings.items():
        marks = [mark for c, mark in ((best, "kept"), (start, "auto by itself")) if c == compute]
        speed = f"{s.BATCH_SIZE * s.BLOCK_SIZE / min(times):,.0f}"
        sizes = [f"{getattr(compute, field):,}" for field in SIZES.values()]
        gb = f"{peaks[compute] / 1e9:,.2f}"
        rows.append((choice_dict(compute)["mode"], *sizes, speed, gb, ", ".join(marks)))
    return format_table(rows)
