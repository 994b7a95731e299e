"""What a run prints of itself before its first step and after its last one."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from bdh_lib.data.describe import describe
from bdh_lib.data.formats import REQUIRED_FIELDS, SAMPLE_NOTES, sample_prompts
from bdh_lib.errors import escape_controls
from bdh_lib.settings import Settings
from bdh_lib.training import tuning
from bdh_lib.training.advice import epochs_note
from bdh_lib.training.dataset import Data
from bdh_lib.training.meter import Meter
from bdh_lib.training.runlog import RunLog
from bdh_lib.training.schedule import blocks_per_step, end_setting, schedule_summary
from bdh_lib.training.tuning import Selection

PROJECT = Path(__file__).resolve().parents[2]


def print_data(s: Settings, data: Data) -> None:
    """Print what the data are, how long the run is, and what an evaluation reads."""
    print(escape_controls(describe(data.report)))
    print(f"plan: {schedule_summary(s, len(data.train.bytes))}; "
          f"an evaluation reads {len(data.val.bytes):,} bytes")  # fmt: skip


def print_start(s: Settings, run: Path, data: Data, n_steps: int, selection: Selection) -> None:
    """Print what is trained, in which memory mode, and what to expect of its samples."""
    n_parameters = s.BDH_CONFIG.n_parameters
    print(f"model: {n_parameters:,} parameters, on {mx.default_device()}; run: {run}")
    dtype = str(selection.compute.dtype).removeprefix("mlx.core.")
    print(f"memory: {selection.label}, {dtype}, estimated peak {selection.peak / 1e9:,.2f} GB")
    if hint := tuning.hint(s, selection.source, n_steps):
        print(hint)
    if note := epochs_note(s, len(data.train.bytes)):
        print(f"note: {note}")
    fields = data.val.field_names() & {*REQUIRED_FIELDS[s.TRAINING_MODE]}
    print(f"note: {SAMPLE_NOTES[s.TRAINING_MODE if fields else 'text']}")


def finished_reason(s: Settings, log: RunLog, n_steps: int) -> str | None:
    """Say why a run has nothing left to do, and which setting to change; None if it continues."""
    run = log.run
    step = log.first_step
    is_evaluated = log.last_eval_step == log.first_step
    if step > n_steps or (step == n_steps and is_evaluated):  # >: the end was lowered since
        end = end_setting(s, n_steps)
        return f"{run} has {step:,} iterations of {n_steps:,}; to continue, raise {end}"
    if is_evaluated and log.patience_exceeded(s.PATIENCE):
        return (
            f"{run} stopped early after {step:,} iterations, its best is of {log.best['step']:,}; "
            f"to continue, raise PATIENCE ({s.PATIENCE}) or lift it with --patience none"
        )


def print_summary(s: Settings, log: RunLog, data: Data, meter: Meter) -> None:
    """Print the results of a finished run, for people and grep."""
    last, run = log.last_evaluation, log.run
    ended = f"by {end_setting(s, last['step'])}"
    if last["step"] < meter.n_steps:
        ended = f"early, {s.PATIENCE} validations without a better one"
    epochs = last["step"] * s.BLOCK_SIZE * blocks_per_step(s) / len(data.train.bytes)
    values = {
        "epochs": f"{epochs:.2f}",
        "minutes": f"{meter.minutes():.1f}",
        "peak_gb": f"{mx.get_peak_memory() / 1e9:.2f}",
        "run": run,
        "iterations": last["step"],
        "parameters": s.BDH_CONFIG.n_parameters,
        "val_loss": f"{last['val_loss']:.4f}",
        "val_bpb": f"{last['val_bpb']:.4f}",
        "monitored_on": f"{s.LOSS_ON} bytes",
        "best_monitored": f"{log.best['monitored_loss']:.4f}",
        "best_step": log.best["step"],
        "ended": ended,
        "active_x": " ".join(f"{share:.1%}" for share in last["active_x"]),  # layer by layer
        "active_y": " ".join(f"{share:.1%}" for share in last["active_y"]),
        "look_at_it": run / "report.html",
        "sample_it": sample_command(s, run, data.val.field_names()),
    }
    print("\n".join(f"{name}: {value}" for name, value in values.items()))


def from_here(path: Path) -> Path:
    """Return the path from the current folder, if it lies there."""
    with suppress(FileNotFoundError, ValueError):  # it is deleted, or the path lies elsewhere
        return path.relative_to(Path.cwd())
    return path


def sample_command(s: Settings, run: Path, fields: set[str]) -> str:
    """Return a command that lets the run write."""
    prompt = sample_prompts(s.TRAINING_MODE, fields)[0]
    # make's .venv, which the user's shell may not know, and the script beside this package
    python, script = map(from_here, (Path(sys.executable), PROJECT / "generate.py"))
    words = [python, script, run, "--prompt", prompt.replace("\n", "\\n")]
    return shlex.join(map(str, words))
