"""`python train_mlx.py --plan`: what a run would be, and problems of its data, without training."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from bdh_lib import runs
from bdh_lib.compute import memory
from bdh_lib.compute.layer import Compute
from bdh_lib.data import hub, problems
from bdh_lib.data.describe import describe
from bdh_lib.data.formats import FIELDS, LABEL_OF, REQUIRED_FIELDS
from bdh_lib.data.split import Split
from bdh_lib.errors import escape_controls
from bdh_lib.loss import compile_losses
from bdh_lib.progress import heartbeat
from bdh_lib.script.interrupts import default_signals
from bdh_lib.settings import Settings
from bdh_lib.tables import format_table
from bdh_lib.training import checkpoints, memory_plan, tuning
from bdh_lib.training.advice import epochs_note
from bdh_lib.training.batches import get_batch
from bdh_lib.training.dataset import open_run_data
from bdh_lib.training.resume import changes_on_resume, check_chain, resolve_init_from
from bdh_lib.training.runlog import duration
from bdh_lib.training.schedule import blocks_per_step, schedule_summary, total_steps
from bdh_lib.training.step import compile_steps
from bdh_lib.training.train_settings import phase_settings
from bdh_lib.training.train_state import init_train_state

SHOWN = 600  # bytes of a record that are printed
MEASURING_SECONDS = 60
MAX_EXAMPLES = 10  # of structures, a record each


def peak_bytes(s: Settings) -> dict[str, float]:
    """Return the estimated peak memory of a step in bytes, by the setting of MEMORY_MODE."""
    computes = {mode: memory.compute_for(s.BDH_CONFIG, mode, s.DTYPE) for mode in memory.MODES}
    return {mode: memory_plan.step_peak(s, compute) for mode, compute in computes.items()}


def preset_table(presets: dict[str, Settings | None], sizes: dict[str, int]) -> str:
    """Return a table: each preset's parameters, length, memory by MEMORY_MODE, and what fits.

    `presets` are settings, None for a preset that does not go with the constants; `sizes` the bytes
    of the training data, by TRAINING_MODE.
    """
    rows = [("preset", "mode", "parameters", "iterations", "epochs", *memory.MODES, "memory mode")]
    for name, s in presets.items():
        if s is None:
            rows.append((name, "does not go with the constants", *[""] * (len(rows[0]) - 2)))
            continue
        n_bytes = sizes[s.TRAINING_MODE]
        total = total_steps(s, n_bytes) if n_bytes else 0
        read = total * s.BLOCK_SIZE * blocks_per_step(s)
        peaks = peak_bytes(s)
        fits = [mode for mode, peak in peaks.items() if peak <= memory.available_bytes()] or ["no"]
        epochs = f"{read / n_bytes:,.2f}" if n_bytes else "no data"
        size = f"{s.BDH_CONFIG.n_parameters / 1e6:,.1f}M"
        memories = [f"{peak / 1e9:,.2f} GB" for peak in peaks.values()]
        fit = fits[0] if n_bytes else ""
        rows.append((name, s.TRAINING_MODE, size, f"{total:,}", epochs, *memories, fit))
    return format_table(rows, "  ")


def shortened(s: Settings, compute: Compute) -> Settings:
    """Return the settings with a short batch where a machine is slow: two chunks of one block."""
    if not memory_plan.slow_note(s):
        return s
    T = min(s.BLOCK_SIZE, 2 * compute.chunk)
    return Settings(**vars(s) | {"BATCH_SIZE": 1, "BLOCK_SIZE": T})


def measure(s: Settings, train: Split, compute: Compute) -> tuple[float, float]:
    """Return the seconds of a step and of an evaluation's batch, medians of three after a first.

    On a slow machine they are scaled up from a short batch: time is about linear in the bytes.
    """
    short = shortened(s, compute)
    n_bytes = short.BATCH_SIZE * short.BLOCK_SIZE
    scale = s.BATCH_SIZE * s.BLOCK_SIZE / n_bytes
    expected = duration(4 * 4 * memory_plan.forward_seconds(short))  # an iteration is about four
    about = f" of {n_bytes:,} bytes, about {expected} on two busy CPU cores"
    part = about if scale > 1 else ""
    print(f"\nmeasuring the speed: compiling, then 4 iterations{part}")
    seconds = np.array([*time_iterations(short, train, compute)])[1:]
    batch, update, evaluation = seconds.T
    step = batch * scale * s.GRAD_ACCUM + update
    return float(np.median(step)), float(np.median(evaluation * scale))


def time_iterations(s: Settings, train: Split, compute: Compute) -> Iterator[tuple]:
    """Yield the seconds of a batch, of an update, and of an evaluation's batch, four times.

    It stops after MEASURING_SECONDS, but not before the second time: the first one compiles.
    """
    state = init_train_state(s, compute)
    micro_step, apply_update = compile_steps(state, s)
    losses_fn = compile_losses(state.model)
    begin = time.perf_counter()
    for i in range(4):
        batch = get_batch(train, i, s, s.BATCH_SIZE * s.BLOCK_SIZE)
        start = time.perf_counter()
        with default_signals():
            loss, gradients = micro_step(*batch)
        mx.eval(loss, gradients)
        computed = time.perf_counter()
        mx.eval(apply_update(loss, gradients), state.trees())
        updated = time.perf_counter()
        with default_signals():
            losses = losses_fn(batch.idx, batch.targets)
        mx.eval(losses)
        ended = time.perf_counter()
        print(f"  iteration {i + 1} of 4: {updated - start:,.1f} s", flush=True)
        yield computed - start, updated - computed, ended - updated
        if i and time.perf_counter() - begin > MEASURING_SECONDS:
            print("  enough: this machine is slow or busy")
            return


def print_plan(base: Settings, presets: dict[str, Settings | None]) -> int:
    """Print the plan of each of PHASES in turn, or of the one run.

    Returns the exit code, 0. Raises UserError for unusable data.
    """
    checkpoints.check_writable(Path(base.CHECKPOINT_DIR))  # the prepared data are kept there
    print_origin(base)  # of a chain, that of its first run
    chain = phase_settings(base)
    with notes_of_refusal():
        check_chain(chain)
    for s in chain:
        if s.PHASES:
            after = f", from the best weights of {s.INIT_FROM}" if s.INIT_FROM else ""
            print(f"\n=== phase {s.RUN_NAME}{after}\n")
        print_run(s, presets)
    return 0


def print_records(s: Settings, train_share: float) -> dict[str, int]:
    """Print what the records hold. Returns an estimate of the training bytes of each mode.

    `train_share` is the share of the bytes that train in the run's own mode.
    """
    with heartbeat(f"examining DATASET {s.DATASET}"):
        findings = problems.examine(s)
        lines = problems.issue_lines(findings)
    print("\nthe records that this mode trains on, their issues, and what validation shares:")
    print(escape_controls("\n".join(lines)))
    print(f"\nrecords and bytes by mode:\n{problems.mode_table(findings)}")
    for structure, text in list(findings.examples.items())[:MAX_EXAMPLES]:
        raw = text.encode()
        print(escape_controls(f"\nthe first record of structure {structure} as trained on, "
                              f"{len(raw):,} bytes, of which up to {SHOWN}:"))  # fmt: skip
        print(f"  {raw[:SHOWN]!r}")
    return {mode: round(n.total() * train_share) for mode, n in findings.of_mode.items()}


def print_split(stream: np.ndarray, fields: np.ndarray) -> dict[str, int]:
    """Print the training side of a ready split. Returns its bytes, the same for each mode."""
    rows = [("field", "training bytes")]
    for i, name in enumerate(FIELDS):
        if n := np.count_nonzero(fields == i):
            rows.append((LABEL_OF[name], f"{n:,}"))
    print("\na ready split, the same in every mode, without records to look at:")
    print(format_table(rows, "  "))
    print(f"\nthe first {min(SHOWN, len(stream)):,} bytes:\n  {stream[:SHOWN].tobytes()!r}")
    return dict.fromkeys(REQUIRED_FIELDS, len(stream))


def print_origin(s: Settings) -> None:
    """Print whose weights the run starts from, and where they are not there yet."""
    if s.INIT_FROM is None:
        return
    missing = not hub.is_model(s.INIT_FROM) and not resolve_init_from(s).exists()
    note = f", which is not there yet: no run in {s.CHECKPOINT_DIR}, and no such path"
    print(f"start: from the weights of {s.INIT_FROM}{note if missing else ''}")


@contextmanager
def notes_of_refusal() -> Iterator[None]:
    """Print why training would refuse, in place of an error: a plan may be of another run."""
    try:
        yield
    except (ValueError, OSError) as error:  # ValueError: a UserError, or a damaged config.json
        print(escape_controls(f"note: training would refuse this: {error}"))


def print_existing(s: Settings, data_report: dict, n_bytes: int) -> None:
    """Print what training on n_bytes would do with a run of this name that has checkpoints."""
    run = checkpoints.run_folder(s)
    if steps := runs.steps(run):
        with notes_of_refusal():
            changes_on_resume(run, checkpoints.read_info(run, steps[-1]), s, data_report)
            left = max(0, total_steps(s, n_bytes) - steps[-1])
            print(f"note: {run} has {steps[-1]:,} iterations; training would add up to {left:,}")


def print_run(s: Settings, presets: dict[str, Settings | None]) -> None:
    """Print the plan of one run: data, length, memory, disk, and its speed, which is measured."""
    data_report, train, val = open_run_data(s)
    print(escape_controls(describe(data_report)))
    train_share = len(train.bytes) / (len(train.bytes) + data_report["val"]["bytes"])
    is_ready = data_report["records"] is None
    sizes = print_split(train.bytes, train.fields) if is_ready else print_records(s, train_share)
    sizes[s.TRAINING_MODE] = len(train.bytes)
    print(f"\nrun: {schedule_summary(s, len(train.bytes))}")
    print_existing(s, data_report, len(train.bytes))
    if note := epochs_note(s, len(train.bytes)):
        print(f"epochs: {note}")
    print_needs(s, data_report, len(train.bytes))
    if not s.PHASES:
        print("\npresets on these data: estimated memory of a step, and the mode that fits here")
        print(preset_table(presets, sizes))
    print_speed(s, train, val)


def print_needs(s: Settings, data_report: dict, n_bytes: int) -> None:
    """Print the size of the model, and what a run needs of memory and disk."""
    n = s.BDH_CONFIG.n_parameters
    estimates = [f"{mode} {peak / 1e9:,.2f} GB" for mode, peak in peak_bytes(s).items()]
    each = 4 * n * (4 if s.EMA_DECAY else 3)  # weights and their averages
    all_bytes = checkpoints.max_checkpoints(s, total_steps(s, n_bytes)) * each
    print(f"model: {n:,} parameters, on {mx.default_device()}")
    print(f"memory: {', '.join(estimates)}; {memory.available_bytes() / 1e9:,.1f} GB available")
    prepared = 2 * (data_report["train"]["bytes"] + data_report["val"]["bytes"])  # and their fields
    print(f"disk: checkpoints {all_bytes / 1e6:,.0f} MB, prepared data {prepared / 1e6:,.1f} MB")


def print_speed(s: Settings, train: Split, val: Split) -> None:
    """Measure and print the speed, and the time to the end that follows from it."""
    total = total_steps(s, len(train.bytes))
    selection = tuning.select(s, *tuning.saved_choice(s))
    with heartbeat("measuring"):
        step, evaluation = measure(s, train, selection.compute)
    n_evaluations = math.ceil(total / s.EVAL_FREQ) + 1  # before the first iteration, and at the end
    evaluating = n_evaluations * evaluation * len(val.bytes) / (s.BATCH_SIZE * s.BLOCK_SIZE)
    speed = s.BLOCK_SIZE * blocks_per_step(s) / step
    print(f"speed: {speed:,.0f} bytes/s with MEMORY_MODE {selection.label}, measured over 3 "
          "iterations")  # fmt: skip
    whole = total * step + evaluating
    evaluations = f"{n_evaluations:,} evaluations of {len(val.bytes):,} bytes are"
    share = f"{duration(evaluating)} ({evaluating / whole:.1%}) of it"
    print(f"time to the end: {duration(whole)}; {evaluations} {share}; samples are not counted")
