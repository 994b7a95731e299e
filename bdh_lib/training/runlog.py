"""What a run logs and saves."""

import json
import math
import os
import sys
import time
import zlib
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from bdh_lib import files, runs
from bdh_lib.errors import UserError, escape_controls, warn
from bdh_lib.training import checkpoints
from bdh_lib.training.distributed import World
from bdh_lib.training.train_state import TrainState, ema_applied

ANSWER_WIDTH = 100  # characters of an answer that the terminal shows; the report has all


def read_log(path: Path) -> list[dict]:
    """Return the valid lines of a metrics.jsonl; none without a file."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):  # no JSON, or brackets nested too deep
            entry = files.parse_json(line)
            is_line = isinstance(entry, dict) and isinstance(entry.get("step"), int | float)
            if is_line and entry.pop("crc32", crc32(entry)) == crc32(entry) and entry["step"] >= 0:
                lines.append(entry)
    return lines


def crc32(entry: dict) -> int:
    """Return the checksum of a line without its own: a flipped bit may leave other JSON."""
    entry = {name: value for name, value in entry.items() if name != "crc32"}
    return zlib.crc32(json.dumps(entry).encode())


def with_checksum(entry: dict) -> str:
    """Return a line of metrics.jsonl."""
    return json.dumps(entry | {"crc32": crc32(entry)}) + "\n"


def evaluated_steps(history: list[dict]) -> list[int]:
    """Return the steps that were evaluated, in order."""
    return [entry["step"] for entry in history if "val_loss" in entry]


class RunLog:
    """The log of a run: `history`, the lines of metrics.jsonl, and `best`, the best evaluation.

    `best` has at least step and monitored_loss (nats); it is {} before any evaluation. Lines are
    printed as text, or written to the stream `json_to` as JSON. The run continues at `first_step`:
    later lines belong to work that was lost, and are dropped. Of several processes the main one
    writes.
    """

    def __init__(self, run: Path, first_step: int, world: World, json_to: TextIO | None = None):
        self.run = run
        self.first_step = first_step
        self.world = world
        self.json_to = json_to
        self.path = run / "metrics.jsonl"
        self.info = {}
        self.report_failed = False  # report.redraw_report warns of it once
        self.last_saved = first_step
        self.save_time = time.monotonic()
        lines = self.read_or_set_aside(first_step) if world.is_main else []
        lines = [entry for entry in lines if first_step and entry["step"] <= first_step]
        self.history = world.broadcast_object(lines)
        self.best = world.broadcast_object(checkpoints.valid_best(run) if world.is_main else None)
        if world.is_main:
            files.atomic_write_text(self.path, "".join(map(with_checksum, self.history)))

    def read_or_set_aside(self, step: int) -> list[dict]:
        """Return the valid lines; rename a log with invalid ones, with a warning.

        A last line that was cut, as by a kill, is left out without one.
        """
        lines = read_log(self.path)
        if step and not self.path.exists():
            warn(f"{self.path} is gone; its lines up to iteration {step:,} are lost")
        elif self.path.exists() and self.path.read_bytes().count(b"\n") > len(lines):
            aside = self.path.rename(checkpoints.free_path(self.run, "damaged-metrics.jsonl"))
            warn(f"lines of {self.path} are not what was written; kept as {aside.name}")
        return lines

    @property
    def last_evaluation(self) -> dict:
        """Return the line of the last evaluation. Raises StopIteration before the first."""
        return next(entry for entry in reversed(self.history) if "val_loss" in entry)

    @property
    def last_eval_step(self) -> int:
        """Return the last step that was evaluated, -1 before any, or where the best one is lost."""
        steps = evaluated_steps(self.history)
        return max(steps, default=-1) if self.best or steps == [0] else -1

    @property
    def skipped(self) -> int:
        """Return how many updates of the run were skipped, up to the last line of the log."""
        return max((entry.get("skipped", 0) for entry in self.history), default=0)

    def patience_exceeded(self, patience: int | None) -> bool:
        """Tell whether `patience` evaluations came after the best one, over all resumes."""
        since = [e for e in evaluated_steps(self.history) if e > self.best.get("step", math.inf)]
        return patience is not None and len(since) >= patience

    def begin(self, info: dict, state: TrainState, n_checkpoints: int) -> None:
        """Write config.json, whose content `info` each checkpoint repeats.

        Raises UserError if something is in the way of a checkpoint, or if they will not fit
        on the disk, where at most `n_checkpoints` lie at once.
        """
        self.info = info
        if self.world.is_main:
            checkpoints.refuse_in_the_way(self.run, self.first_step)
            missing = n_checkpoints - len(runs.steps(self.run))
            checkpoints.check_space(self.run, state, max(1, missing))
            files.atomic_write_text(self.run / "config.json", json.dumps(info, indent=1))

    def save(self, step: int, state: TrainState) -> None:
        """Write the checkpoint of `step`, unless a checkpoint of that step exists.

        Its model holds the average of the weights, if the run has one. Raises UserError if
        the checkpoint cannot be written, or the state is not finite.
        """
        if step <= self.last_saved:
            return
        if self.world.is_main:
            with ema_applied(state):
                checkpoints.save(self.run, step, state, self.info)
        self.world.barrier()  # no process continues or exits before it is on the disk
        self.last_saved = step
        self.save_time = time.monotonic()

    def is_save_due(self, step: int, freq: int, minutes: float | None) -> bool:
        """Tell whether `freq` divides the step, or `minutes` have passed since the last save.

        The clock of the main process decides; all processes call this at once.
        """
        late = minutes is not None and time.monotonic() - self.save_time >= 60 * minutes
        return step % freq == 0 or self.world.broadcast_object(late)

    def is_best(self, monitored_loss: float) -> bool:
        """Say whether a loss in nats is below that of the best evaluation so far, if any."""
        return monitored_loss < self.best.get("monitored_loss", math.inf)

    def write_best(self, step: int, monitored_loss: float) -> None:
        """Name the checkpoint of `step` the best one."""
        self.best = {"step": step, "monitored_loss": monitored_loss}
        if self.world.is_main:
            runs.write_best(self.run, **self.best)

    def write(self, **entry) -> None:
        """Log a line. Raises UserError if metrics.jsonl cannot be written."""
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[name] = None  # JSON knows no NaN
        self.history.append(entry)
        if not self.world.is_main:
            return
        try:
            with self.path.open("a") as file:
                file.write(with_checksum(entry))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {files.write_fault(error)}") from None
        if self.json_to:
            print(with_checksum(entry), end="", file=self.json_to, flush=True)
        else:
            bold = "val_loss" in entry and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            tqdm.write(f"\x1b[1m{format_line(entry)}\x1b[0m" if bold else format_line(entry))


def format_line(entry: dict) -> str:
    """Return a line of metrics.jsonl as the terminal shows it."""
    if "samples" in entry:
        samples = [f"--- sample at iteration {entry['step']}\n{text}" for text in entry["samples"]]
        return "\n".join(
            samples + [answer_lines(entry["step"], a) for a in entry.get("answers", [])]
        )
    if "val_loss" in entry:
        fields = ", ".join(f"{k} {v:.2f}" for k, v in entry["val_bpb_fields"].items())
        loss = f"validation {entry['val_loss']:.4f} | bits/byte {entry['val_bpb']:.4f} ({fields})"
        advice = entry["advice"].values()
        return "\n".join([f"iter {entry['step']:>6} | {loss}", *map("advice: {}".format, advice)])
    norm = math.nan if entry["grad_norm"] is None else entry["grad_norm"]
    speed = f"{entry['bytes_per_s']:,.0f} bytes/s | " if "bytes_per_s" in entry else ""
    return (
        f"iter {entry['step']:>6} | loss {entry['loss']:.4f} | lr {entry['lr']:.1e} | "
        f"norm {norm:.2f} | {speed}peak {entry['peak_gb']:,.2f} GB | "
        f"{duration(entry['seconds_left'])} left"
    )


def answer_lines(step: int, answer: dict) -> str:
    """Return a question, the true response and the model's answer, a line of the terminal each."""
    question = answer["prompt"].split("### Instruction:\n")[-1].removesuffix("### Response:\n")
    lines = {"asked": question, "true": answer["truth"], "model": answer["answer"]}
    lines = [
        f"{name + ':':7}{escape_controls(' '.join(text.split()))[:ANSWER_WIDTH] or '(blank)'}"
        for name, text in lines.items()
    ]
    return "\n".join([f"--- answer at iteration {step}", *lines])


def duration(seconds: float) -> str:
    """Return a duration in minutes, hours or days."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 72 else f"{hours // 24:,} days"


def main_process_prints(json_to: TextIO | None, world: World) -> AbstractContextManager:
    """Return a context in which the main process alone prints; to stderr if lines are JSON."""
    if not world.is_main:
        return redirect_stdout(Path(os.devnull).open("w"))
    return redirect_stdout(sys.stderr) if json_to else nullcontext()
