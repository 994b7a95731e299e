"""Every constant at the top of a script is also a flag; the script's own lines are the one list.

A line `BLOCK_SIZE: int = 4096  # bytes ...` makes `--block-size`, with its comment as help text;
`EPOCHS: float | None = 3  # ...` makes a flag that also takes `none`. A constant that holds a
dataclass, BDH_CONFIG, makes a flag for each field. A comment line above constants is the heading
under which `--help` shows them. Users edit the constants, so their types and names are checked.
"""

import argparse
import inspect
import re
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from errors import UserError, nearest, visible

CONSTANT = re.compile(r"^ *(\w+)(?:: (\w+)( \| None)?)? = .*?(?:  # (.*))?$", re.MULTILINE)

HEADING = re.compile(r"^# (.*)\n((?:(?!# ).*\n)+)", re.MULTILINE)


def parse(
    script: ModuleType,
    names: set[str],
    presets: dict[str, str],
    argv: list[str] | None,
    actions: dict[str, str],
) -> SimpleNamespace:
    """The script's constants, changed by --preset, changed by flags; argparse reports bad ones.

    Each of `actions` (name: help) is a flag without a constant, and a bool in lower case. Raises
    UserError for a constant that is not among `names`, is not there, or is of another type.
    """
    constants, seen = {}, set()
    parser = Parser(script.__doc__)
    parser.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets)}")
    for name, text in actions.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for heading, lines in HEADING.findall(_settings_of(script)):
        group = parser.add_argument_group(heading)
        for name, kind, optional, comment in CONSTANT.findall(lines):
            if name not in names or name in seen:
                wrong = "stands twice" if name in seen else f"is no setting{nearest(name, names)}"
                raise UserError(f"{name} {wrong}")
            seen.add(name)
            value = getattr(script, name)
            hints = {name: (kind, optional, comment)}
            fields = {name: value}
            if is_dataclass(value):
                found, fields = CONSTANT.findall(inspect.getsource(type(value))), asdict(value)
                hints = {n: (k, o, c) for n, k, o, c in found if n in fields}
            else:
                _check(name, value, kind, optional)
            constants |= fields
            for one, hint in hints.items():
                _add(group, one, fields[one], *hint)
    if lost := sorted(names - seen):
        raise UserError(f"{', '.join(lost)} must stand among the settings")
    argv = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(argv).preset
    if name is not None and name not in presets:
        parser.error(f"--preset {name!r} is none of {', '.join(presets)}{nearest(name, presets)}")
    preset = presets.get(name, "").split()
    given = vars(parser.parse_args(preset + argv))  # of a flag given twice the last one counts
    given.pop("preset")
    return SimpleNamespace(**constants | given)


class Parser(argparse.ArgumentParser):
    """For any script: its docstring heads --help; a mistake is one line, and exit code 2."""

    def __init__(self, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        known = [flag for action in self._actions for flag in action.option_strings]
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            message = f"unknown flag {unknown[1]}{nearest(unknown[1], known)}"
        message = visible(" ".join(message.split()))  # it repeats what was typed
        self.exit(2, f"{self.prog}: {message} (--help lists all)\n")


def _check(name: str, value, kind: str, optional: str) -> None:
    """Raise UserError for a constant that is not of the type in its line."""
    kinds = {"int": "a whole number", "float": "a number", "str": "text", "bool": "True or False"}
    if kind not in kinds:
        raise UserError(f"{name}: its line has lost its type, as in `BLOCK_SIZE: int = 4096`")
    known = type(value).__name__
    if known != kind and (known, kind) != ("int", "float") and not (optional and value is None):
        also = " or None" if optional else ""
        raise UserError(f"{name} is {value!r} in its line; it must be {kinds[kind]}{also}")


def _add(group, name: str, value, kind: str, optional: str, comment: str) -> None:
    flag = f"--{name.lower().replace('_', '-')}"
    how = {"type": _reader(kind, optional), "metavar": kind}
    if kind == "bool":
        how = {"action": argparse.BooleanOptionalAction}
    text = f"{comment} (now {value})".replace("%", "%%")
    group.add_argument(flag, dest=name, help=text, default=argparse.SUPPRESS, **how)


def _settings_of(script: ModuleType) -> str:
    """The part of the script's source from `# Settings` to the first table, ACTIONS."""
    source = Path(script.__file__).read_text(encoding="utf-8")
    return re.search(r"^# Settings.*?(?=^ACTIONS)", source, re.S | re.M).group()


def _reader(kind: str, optional: str):
    def read(text: str):
        if optional and text.lower() == "none":
            return None
        return {"int": int, "float": float, "str": str}[kind](text)

    read.__name__ = kind  # argparse: "invalid int value: 'two'"
    return read
