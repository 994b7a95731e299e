"""How fast a run trains: its progress bar, and averages over its steps."""

import math
import time
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
from tqdm import tqdm

from bdh_lib.compute.device import on_cuda
from bdh_lib.progress import Progress, heartbeat
from bdh_lib.training.signals import SIGNAL_NOTE

LOGGED_LINE_EVERY = 60  # seconds between lines of progress beside those of the log


class Meter:
    """The progress bar, and averages over the steps since the last logged line."""

    def __init__(self, step: int, n_steps: int, bytes_per_step: int, skipped: int = 0):
        """The run continues after `step` steps of `n_steps`.

        `bytes_per_step` counts the bytes that a step reads on all processes; `skipped` the updates
        that were skipped before `step`.
        """
        self.first_step = step
        self.n_steps = n_steps
        self.bytes_per_step = bytes_per_step
        self.progress = Progress("training", n_steps, "iterations", step)
        self.skipped = skipped  # steps whose numbers were not finite
        self.consecutive_skips = 0
        self.pending_steps = []  # steps that MLX may not have computed yet
        self.has_logged = False  # whether the log has a line of training
        self.start_time = time.perf_counter()
        self.clear()

    def clear(self) -> None:
        """Begin new averages."""
        self.losses = []
        self.seconds = 0.0
        self.timed_bytes = 0

    def start_step(self) -> None:
        """Begin a step, of which the first one compiles."""
        if self.progress.done == self.first_step:
            note = f", a minute or more on a new machine ({SIGNAL_NOTE})" if on_cuda() else ""
            print(f"compiling the training step, once{note}")
        self.step_start = time.perf_counter()

    def end_step(
        self, completed: int, loss: mx.array, norm: mx.array, *, has_targets: bool, read_now: bool
    ) -> None:
        """End a step, with which `completed` steps are done; average its loss if it has targets.

        With `read_now` the host waits for its numbers. Without, CUDA's are read once the next step
        has been submitted: the GPU computes while the host prepares. The first step is not timed,
        because it compiles.
        """
        self.pending_steps.append((completed, loss, norm, has_targets))
        self.collect(0 if read_now or not on_cuda() else 1)
        self.progress.update()
        if completed > self.first_step + 1:
            self.seconds += time.perf_counter() - self.step_start
            self.timed_bytes += self.bytes_per_step

    def collect(self, n_left: int) -> None:
        """Wait for the steps but the last `n_left`, and count them."""
        while len(self.pending_steps) > n_left:
            step, loss, norm, has_targets = self.pending_steps.pop(0)
            loss, norm = float(loss), float(norm)
            if math.isfinite(loss) and math.isfinite(norm):
                self.consecutive_skips = 0
                self.losses += [loss] if has_targets else []
            else:
                self.skipped += 1
                self.consecutive_skips += 1
                tqdm.write(f"iter {step:>6} | update skipped: loss {loss}, norm {norm}")

    def close(self) -> None:
        """End the bar, after a line for each skipped step that was not read yet."""
        self.collect(0)
        self.progress.bar.close()

    def minutes(self) -> float:
        """Return the minutes since the loop began, the first evaluation included."""
        return (time.perf_counter() - self.start_time) / 60

    def heartbeat_until_logged(self) -> AbstractContextManager:
        """Return the heartbeat of a step, up to the first line of the log."""
        return nullcontext() if self.has_logged else heartbeat("training")

    @property
    def last_read_step(self) -> int:
        """Return the last step whose loss was read, as the loop counts steps: from 0."""
        return self.progress.done - len(self.pending_steps) - 1

    def pop_averages(self, completed: int) -> dict:
        """Return the mean loss, speed and time left after `completed` steps; begin new averages.

        {} where no step since the last line has a loss; no speed where none was timed.
        """
        if not self.losses:
            return {}
        elapsed = time.perf_counter() - self.start_time
        done = completed - self.first_step
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "skipped": self.skipped,
            "peak_gb": mx.get_peak_memory() / 1e9,
            "seconds_left": elapsed / done * (self.n_steps - completed),
        }
        if self.seconds:
            values["bytes_per_s"] = self.timed_bytes / self.seconds
        self.clear()
        self.has_logged = True
        self.progress.line_every = LOGGED_LINE_EVERY
        return values
