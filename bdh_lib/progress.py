"""Signs of life: a bar on a terminal, and elsewhere a line every few seconds."""

import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from tqdm import tqdm

DELAY, LINE_EVERY = 1, 4  # seconds before a bar is drawn; between lines where there is none


class Progress:
    """Shows how much of a piece of work is done: `with Progress("reading", 100, "bytes") as p`."""

    def __init__(
        self, what: str, total: int | None, unit: str, initial: int = 0, file: TextIO | None = None
    ):
        """`total` is the number of units of the whole work, None where it is not known.

        Lines go to `file`, which is stdout where it is None.
        """
        self.what, self.total, self.unit, self.done, self.file = what, total, unit, initial, file
        options = {"unit": f" {unit}", "initial": initial, "leave": False, "delay": DELAY}
        self.bar = tqdm(total=total, desc=what, disable=None, **options)
        self.last_line, self.prints_lines = time.monotonic(), self.bar.disable

    def update(self, n: int = 1) -> None:
        """Count n units as done."""
        self.done += n
        self.bar.update(n)
        if self.prints_lines and time.monotonic() > self.last_line + LINE_EVERY:
            self.last_line = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            print(f"{self.what}: {self.done:,}{of} {self.unit} ...", file=self.file, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_error) -> None:
        self.bar.close()


def counted(items: Iterable, what: str, unit: str) -> Iterator:
    """Yield the items, and show how many they are."""
    with Progress(what, None, unit) as progress:
        for item in items:
            yield item
            progress.update()
