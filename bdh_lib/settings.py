"""The settings of a run by their names, and as the JSON of its config.json."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace


class Settings(SimpleNamespace):
    """The settings of a run by their names."""

    PROCESSES = 1  # that train the run; train_mlx.main sets it, no user


def settings_dict(s: Settings) -> dict:
    """Return all settings, the model's too, as JSON; a value that JSON cannot hold, as text."""
    own = {k: v for k, v in vars(s).items() if k.isupper() and k != "BDH_CONFIG"}
    return {name: as_json(value) for name, value in (own | asdict(s.BDH_CONFIG)).items()}


def as_json(value):
    """Convert a value to what JSON holds; else to text, the same in each process."""
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return re.sub(" at 0x[0-9a-f]+", "", as_text(value))  # its place in memory


def as_text(value, convert: Callable = str) -> str:
    """Convert a value to text, which Python refuses for very long integers."""
    try:
        return convert(value)
    except ValueError:  # Python refuses to write a number of more than 4,300 digits
        return "a number of very many digits"
