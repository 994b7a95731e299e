"""A value of a record as text, and why one cannot be trained on."""

import datetime
import decimal
import json
import math
from typing import NamedTuple


class Problem(NamedTuple):
    """Why a field of a record cannot be trained on."""

    reason: str
    is_absent: bool = False  # nothing is there: no value, or an empty one


def scalar_to_text(value):
    """Return a number, a truth value or a date as text; leave any other value as it is."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return str(value)
    if isinstance(value, (int, float, decimal.Decimal)) and math.isfinite(value):
        return str(value)
    return value


def find_problem(field: str, value) -> Problem | None:
    """Return why a value cannot be trained on, or None if it is valid text."""
    if not isinstance(value, str):
        return Problem(f"{field} is {type_name(value)}, not text", value is None)
    if not value.strip():
        return Problem(f"{field} empty", True)
    try:
        value.encode()
    except UnicodeEncodeError:
        return Problem(f"{field} with a lone surrogate")
    return None


def type_name(value) -> str:
    """Return the name of a value's type, for people who know JSON."""
    return "null" if value is None else type(value).__name__


def is_absent(value) -> bool:
    """Tell whether nothing is there: null, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)
