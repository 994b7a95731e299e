"""Rules for the values of settings and of arguments, and the check that reports a wrong value."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from bdh_lib.errors import UserError, did_you_mean

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
LARGEST = 2**31 - 1  # of a whole number: MLX's shapes are 32 bits


class Rule(NamedTuple):
    """Which values a setting or an argument of a function can have."""

    kind: type | None  # None: anything, and no flag
    allow_none: bool = False  # whether None is valid, which is `none` as a flag
    description: str = ""  # of the valid values; it follows "it must be"
    is_valid: Callable = lambda value: True  # for values of `kind`
    choices: Collection[str] = ()


def whole(minimum: int, maximum: int = LARGEST, allow_none: bool = False) -> Rule:
    """Return a rule that admits `minimum` to `maximum`, and None if `allow_none`."""
    description = f"a whole number from {minimum:,} to {maximum:,}"
    return Rule(int, allow_none, description, lambda n: minimum <= n <= maximum)


def number(description: str, is_valid: Callable, allow_none: bool = False) -> Rule:
    """Return a rule that admits numbers for which `is_valid`, and None if `allow_none`."""
    return Rule(float, allow_none, f"a number {description}", is_valid)


def text(allow_none: bool = False) -> Rule:
    """Return a rule that admits text that is not blank, and None if `allow_none`; else not "none",
    which would name a file.
    """
    if allow_none:
        return Rule(str, True, "text that is not empty", lambda value: value.strip())
    unset = ("", "none")
    description = "text that is neither empty nor none"
    return Rule(str, False, description, lambda value: value.strip().lower() not in unset)


def switch() -> Rule:
    """Return a rule that admits True and False."""
    return Rule(bool, False, KINDS[bool])


def choice(*choices: str) -> Rule:
    """Return a rule that admits the `choices`."""
    return Rule(str, False, f"one of {', '.join(choices)}", choices.__contains__, choices)


def check(name: str, value, rule: Rule) -> None:
    """Raise UserError with the name, the value and the rule's limits if the value breaks it."""
    if rule.kind is None or (rule.allow_none and value is None):
        return
    kinds = (int, float) if rule.kind is float else (rule.kind,)
    right_type = isinstance(value, kinds) and (rule.kind is bool or not isinstance(value, bool))
    if right_type and rule.is_valid(value):
        return
    or_none = " or None" if rule.allow_none else ""
    near = did_you_mean(value, rule.choices) if isinstance(value, str) else ""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        shown = "a number of very many digits"
    raise UserError(f"{name} is {shown}; it must be {rule.description}{or_none}{near}")


# Rules that BDH.generate and bdh_lib/generation/sampling.py share; imports only point down to here.
TEMPERATURE = number("that is 0 or 0.000001 to 1,000,000", lambda x: x == 0 or 1e-6 <= x <= 1e6)
TOP_K = whole(1, 65536, allow_none=True)
