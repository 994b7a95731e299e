"""Errors that a user can correct, warnings, and text that is safe on a terminal."""

import difflib
import re
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can correct. The scripts print it as one line and exit with code 2."""

    exit_code = 2


class Diverged(UserError):
    """Too many updates in a row, or a validation loss, were not finite."""

    exit_code = 1


class NoDataError(UserError):
    """A data set that has nothing to train on, or nothing to validate on, in a mode."""


def escape_controls(text: str) -> str:
    """Escape what is unsafe on a terminal: control characters but newline and tab become \\x1b.

    So do lone surrogates, which cannot be printed, and marks that turn the direction of writing. A
    byte that is not UTF-8, for which Python has a surrogate of its own, becomes itself: \\xff.
    """
    unsafe = (
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    )
    text = re.sub(r"[\udc80-\udcff]", lambda c: f"\\x{ord(c[0]) - 0xDC00:02x}", text)
    return re.sub(unsafe, lambda c: f"\\x{ord(c[0]):02x}", text)


def warn(text: str) -> None:
    """Print a warning to stderr, on a line of its own where a progress bar is drawn."""
    from tqdm import tqdm  # late, as all that a start need not wait for

    tqdm.write(f"warning: {escape_controls(text)}", file=sys.stderr)


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean x?` for the name most like `word`, or nothing if none is similar."""
    matches = difflib.get_close_matches(word, names, 1, cutoff)
    return f"; did you mean {matches[0]}?" if matches else ""
