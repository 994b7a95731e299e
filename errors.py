"""What is told to a user: mistakes that the user can put right, and text safe on a terminal."""

import re


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
