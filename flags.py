"""Every constant at the top of a script is also a flag; the script's own lines are the one list.

A line `BLOCK_SIZE = 4096  # bytes ...` makes `--block-size`, an int, with its comment as help text;
`EPOCHS: float | None = 3  # ...` makes a flag that also takes `none`. A constant that holds a
dataclass, BDH_CONFIG, makes a flag for each field.
"""

import argparse
import inspect
import re
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from bdh_mlx import visible

CONSTANT = re.compile(r"^ *(\w+)(?:: (\w+)( \| None)?)? = .*?  # (.*)$", re.MULTILINE)


def parse(script: ModuleType, presets: dict[str, str], argv: list[str] | None) -> SimpleNamespace:
    """The script's constants, changed by --preset, changed by flags; argparse reports bad ones."""
    constants, hints = {}, {}
    for name, kind, optional, comment in CONSTANT.findall(_settings_of(script)):
        value = getattr(script, name)
        if is_dataclass(value):
            fields = CONSTANT.findall(inspect.getsource(type(value)))
            hints |= {n: (k, o, c) for n, k, o, c in fields if n in asdict(value)}
            constants |= asdict(value)
        else:
            hints[name] = (kind or type(value).__name__, optional, comment)
            constants[name] = value
    parser = argparse.ArgumentParser(
        description=script.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    error = parser.error
    parser.error = lambda message: error(visible(message))  # it repeats what was typed
    parser.add_argument("--preset", choices=presets, help="settings to start from")
    for name, (kind, optional, comment) in hints.items():
        flag, text = f"--{name.lower().replace('_', '-')}", f"{comment} (now {constants[name]})"
        how = {"type": _reader(kind, optional), "metavar": kind}
        if kind == "bool":
            how = {"action": argparse.BooleanOptionalAction}
        text = text.replace("%", "%%")
        parser.add_argument(flag, dest=name, help=text, default=argparse.SUPPRESS, **how)
    argv = sys.argv[1:] if argv is None else argv
    preset = presets.get(parser.parse_args(argv).preset, "").split()
    given = vars(parser.parse_args(preset + argv))  # of a flag given twice the last one counts
    given.pop("preset")
    return SimpleNamespace(**constants | given)


def _settings_of(script: ModuleType) -> str:
    """The paragraph of the script's source that starts with `# Settings`."""
    return re.search(r"^# Settings.*?\n\n", Path(script.__file__).read_text(), re.S | re.M).group()


def _reader(kind: str, optional: str):
    def read(text: str):
        if optional and text.lower() == "none":
            return None
        return {"int": int, "float": float, "str": str}[kind](text)

    read.__name__ = kind  # argparse: "invalid int value: 'two'"
    return read
