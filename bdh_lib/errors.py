"""Errors that a user can correct, text that is safe on a terminal, and rules for values."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple


class UserError(ValueError):
    """An error that the user can correct. The scripts print it as one line and exit with code 2."""

    exit_code = 2


def escape_controls(text: str) -> str:
    """Text that is safe on a terminal: control characters but newline and tab as \\x1b.

    So are lone surrogates, which cannot be printed, and marks that turn the direction of writing.
    """
    unsafe = (
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    )
    return re.sub(unsafe, lambda c: f"\\x{ord(c[0]):02x}", text)


def did_you_mean(word: str, names: Iterable[str], alike: float = 0.6) -> str:
    """`; did you mean x?` for the name most like `word`; empty where none is similar."""
    matches = difflib.get_close_matches(word, names, 1, alike)
    return f"; did you mean {matches[0]}?" if matches else ""


# ---------------------------------------------------------------------------- what a value may be


KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
LARGEST = 2**31 - 1  # of a whole number: MLX's shapes are 32 bits


class Rule(NamedTuple):
    """What a setting, or a number that a function is given, may be."""

    kind: type | None  # None: anything, and no flag
    none: bool = False  # whether it may be None, which is `none` as a flag
    needs: str = ""  # words for its limits
    fits: Callable = lambda value: True
    choices: Collection[str] = ()


def whole(least: int, most: int = LARGEST, none: bool = False) -> Rule:
    needs = f"a whole number from {least:,} to {most:,}"
    return Rule(int, none, needs, lambda n: least <= n <= most)


def number(needs: str, fits: Callable, none: bool = False) -> Rule:
    return Rule(float, none, f"a number {needs}", fits)


def text(none: bool = False) -> Rule:
    return Rule(str, none, "text that is not empty", lambda value: value.strip())


def switch() -> Rule:
    return Rule(bool, False, KINDS[bool])


def choice(*choices: str) -> Rule:
    return Rule(str, False, f"one of {', '.join(choices)}", choices.__contains__, choices)


def check(name: str, value, rule: Rule) -> None:
    """Raise UserError with name, value and what fits, if `value` does not."""
    if rule.kind is None or (rule.none and value is None):
        return
    kinds = (int, float) if rule.kind is float else (rule.kind,)
    right = isinstance(value, kinds) and (rule.kind is bool or not isinstance(value, bool))
    if right and rule.fits(value):
        return
    also = " or None" if rule.none else ""
    near = did_you_mean(str(value), rule.choices)
    raise UserError(f"{name} is {value!r}; it must be {rule.needs}{also}{near}")
