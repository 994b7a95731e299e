"""Signs of life: a bar on a terminal, and elsewhere a line every few seconds."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TextIO

from tqdm import tqdm

DELAY, LINE_EVERY = 1, 4  # seconds before a bar is drawn; between lines where there is none
POLL = 0.5  # seconds between two looks of a heartbeat at what was shown


def is_without_columns(stream: TextIO) -> bool:
    """Return whether a terminal has no size, like a serial line: tqdm draws nothing there."""
    try:
        return not os.get_terminal_size(stream.fileno()).columns
    except (OSError, AttributeError):  # it is not a terminal, or not even a file
        return False


class Progress:
    """Shows how much of a piece of work is done: `with Progress("reading", 100, "bytes") as p`."""

    # time.monotonic() when any of them, or a heartbeat, last showed something: they are one inside
    # the other, in functions that do not know of each other, and write to the same terminal
    last_shown = 0.0

    def __init__(
        self, what: str, total: int | None, unit: str, initial: int = 0, file: TextIO | None = None
    ):
        """`total` is the number of units of the whole work, None if it is not known.

        Lines go to `file`, which is stdout where it is None.
        """
        self.what = what
        self.total = total
        self.unit = unit
        self.done = initial
        self.file = file
        options = {"unit": f" {unit}", "initial": initial, "leave": False, "delay": DELAY}
        disable = True if is_without_columns(sys.stderr) else None  # None: not without a terminal
        self.bar = tqdm(total=total, desc=what, disable=disable, **options)
        self.last_line = time.monotonic()
        self.line_every = LINE_EVERY

    def update(self, n: int = 1) -> None:
        """Count n units as done."""
        self.done += n
        if self.bar.update(n):
            Progress.last_shown = time.monotonic()
        if self.bar.disable and time.monotonic() > self.last_line + self.line_every:
            self.last_line = Progress.last_shown = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            print(f"{self.what}: {self.done:,}{of} {self.unit} ...", file=self.file, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_error) -> None:
        self.bar.close()


def counted(items: Iterable, what: str, unit: str) -> Iterator:
    """Yield the items, and show a running count."""
    with Progress(what, None, unit) as progress:
        for item in items:
            yield item
            progress.update()


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Print `what` after each LINE_EVERY seconds of the block in which nothing else was shown.

    A thread prints: one call may take long, and so may many steps that are too short for a line.
    """
    start = Progress.last_shown = time.monotonic()
    ended = Event()

    def beat():
        while not ended.wait(POLL):
            if (now := time.monotonic()) > Progress.last_shown + LINE_EVERY:
                Progress.last_shown = now
                with suppress(OSError):  # nobody reads: the next print of the block raises it
                    tqdm.write(f"{what}: {now - start:,.0f} s ...")

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
