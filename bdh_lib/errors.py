"""What is told to a user: mistakes that the user can put right, and text safe on a terminal."""

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """What the user can put right; the scripts print it as one line and exit with its code."""

    exit_code = 2


def visible(text: str) -> str:
    """Text that is safe on a terminal: control characters but newline and tab as \\x1b.

    So are lone surrogates, which cannot be printed, and marks that turn the direction of writing.
    """
    unsafe = (
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    )
    return re.sub(unsafe, lambda c: f"\\x{ord(c[0]):02x}", text)


def nearest(word: str, names: Iterable[str], alike: float = 0.6) -> str:
    """`; did you mean x?` of the name most like `word`; nothing where none is like it."""
    found = difflib.get_close_matches(word, names, 1, alike)
    return f"; did you mean {found[0]}?" if found else ""


def check_number(name: str, value, kind: type, least, most, words: str = "", also: tuple = ()):
    """Raise UserError for a value that is neither a number from least to most nor in `also`.

    `words` say what fits where the two limits would not.
    """
    kinds = int if kind is int else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if right and (least <= value <= most or value in also):
        return
    what = "a whole number" if kind is int else "a number"
    fits = words or f"{what} of at least {least:,} and at most {most:,}"
    raise UserError(f"{name} is {value!r}; it must be {fits}")
