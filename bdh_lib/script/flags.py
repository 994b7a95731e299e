"""Every constant at the top of a script is a setting, and a flag of the same name.

What Python accepts there is a setting: with or without a type, over several lines, in any order;
BLOCK_SIZE makes `--block-size`, and BDH_CONFIG, a dataclass, a flag for each of its fields. Only
the texts of `--help` are read from the source: the comment behind a constant, and the comment line
above some as their heading.
"""

import argparse
import ast
import inspect
import io
import re
import tokenize
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

from bdh_lib.errors import UserError, did_you_mean, escape_controls, warn
from bdh_lib.rules import KINDS, Rule, check
from bdh_lib.script import cli
from bdh_lib.settings import Settings, as_text

SIMILARITY = 0.8  # of two names, by difflib, from which one counts as a typo of the other
ELSEWHERE = {  # flags of other trainers, and what has their meaning here
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--iters": "--max-iters",
    "--steps": "--max-iters",
    "--data": "--dataset",
    "--context-length": "--block-size",
    "--max-seq-length": "--block-size",
    "--gradient-accumulation-steps": "--grad-accum",
    "--out-dir": "--checkpoint-dir",
    "--output-dir": "--checkpoint-dir",
    "--max-tokens": "--max-new-tokens",
}


def parse(
    script: ModuleType,
    rules: dict[str, Rule],
    presets: dict[str, str],
    actions: dict[str, str],
    argv: list[str] | None = None,
) -> tuple[Settings, set[str]]:
    """Return the constants, changed by --preset, then by flags; and the names of typed flags.

    rules: of the settings that the script knows; actions: flags that are not settings, with their
    help. Raises UserError for a value that no rule admits; argparse reports an unknown flag.
    """
    constants, rules = read_constants(script, rules)
    parser = build_parser(script, constants, rules, presets, actions)
    typed = vars(parser.parse_args(argv, RecordTyped() if argv is None else None))
    typed_names = set(typed)
    preset = typed.pop("preset", None)
    if preset not in (None, *presets):
        near = did_you_mean(preset, presets)
        parser.error(f"--preset {preset!r} is none of {', '.join(presets)}{near}")
    values = vars(parser.parse_args(presets.get(preset, "").split())) | typed
    values = {name: parse_value(name, value, rules.get(name)) for name, value in values.items()}
    return Settings(**dict.fromkeys(actions, False) | constants | values), typed_names


def read_constants(script: ModuleType, rules: dict[str, Rule]) -> tuple[dict, dict[str, Rule]]:
    """Return the settings as the script has them, and a rule for each.

    `rules` are of those that must be there. A dataclass among these gives its fields, too. Raises
    UserError where one is missing or breaks its rule.
    """
    constants = {name: vars(script)[name] for name in setting_names(script)}
    for name in rules:  # it may be set below the table, or to what is not a setting
        if name not in vars(script):
            raise UserError(
                f"{name} is not set; put its line back among the constants at the top"
                f"{misspelt(name, script)}"
            )
        constants[name] = vars(script)[name]
    all_rules = {name: rules.get(name) or infer_rule(script, name) for name in constants}
    for name, rule in all_rules.items():
        check(name, constants[name], rule)
    for model in [constants[name] for name in rules if is_dataclass(constants[name])]:
        constants |= asdict(model)
        hints = get_type_hints(type(model))
        all_rules |= {field: Rule(hints[field]) for field in asdict(model)}
    return constants, all_rules


def setting_names(script: ModuleType) -> list[str]:
    """List the constants of the script, as far as its first table, ACTIONS."""
    constants = list(vars(script))[: list(vars(script)).index("ACTIONS")]
    is_code = (type, ModuleType, Callable)
    return [n for n in constants if n.isupper() and not isinstance(vars(script)[n], is_code)]


def infer_rule(script: ModuleType, name: str) -> Rule:
    """Infer the rule of a setting that the user added from its type, else from its value's."""
    value = getattr(script, name)
    try:
        hint = get_type_hints(script).get(name)
    except Exception:  # a wrong type is the user's own matter
        hint = None
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    none = value is None or type(None) in kinds
    kinds = [kind for kind in kinds if kind is not type(None)]
    if kinds == [None]:
        kinds = [str if value is None else type(value)]
    kind = next((k for k in KINDS if kinds == [k]), None)
    return Rule(kind, none, KINDS.get(kind, ""))


def parse_value(name: str, value: str | bool, rule: Rule | None):
    """Parse the value of a flag. Raises UserError as check does."""
    if rule is None or isinstance(value, bool):
        return value
    if rule.allow_none and value.lower() == "none":
        return None
    or_none = " or none" if rule.allow_none else ""
    try:
        converted = rule.kind(value)
    except ValueError:
        raise UserError(
            f"{name} is {value!r}; it must be {rule.description or KINDS[rule.kind]}{or_none}"
        ) from None
    check(name, converted, rule, none="none")
    return converted


# ---------------------------------------------------------------------------- flags and their help


class RecordTyped(argparse.Namespace):
    """Arguments as they were typed; one that is typed again with another value gets a warning."""

    def __setattr__(self, name: str, value):
        earlier = vars(self).get(name)
        if earlier not in (None, value) and not isinstance(value, list):
            self.on_repeat(f"{flag_of(name)} is given twice, as {earlier!r} and as {value!r}")
        super().__setattr__(name, value)

    def on_repeat(self, text: str) -> None:
        """Warn of an argument that is given twice, as `text` says."""
        warn(f"{text}; the last one counts")


class Parser(argparse.ArgumentParser):
    """Heads --help by a script's docstring; a mistake is one line, and exit code 2."""

    def __init__(self, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)
        # by the flag that a setting would have, or another trainer has: why there is none
        self.without_flag = {"--device": "BDH_DEVICE=cpu in the environment keeps it from a GPU"}

    def error(self, message: str):
        flags = [flag for action in self._actions for flag in action.option_strings]
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
            message = f"unknown flag {unknown[1]}{_nearest(unknown[1], flags)}"
            message = self.without_flag.get(unknown[1], message)
        message = escape_controls(" ".join(message.split()))  # it repeats what was typed
        self.exit(2, f"{self.prog}: {message} (--help lists all)\n")


def _nearest(unknown: str, flags: list[str]) -> str:
    """Return `; did you mean --x?` for what an unknown flag may stand for, or nothing."""
    meant = ELSEWHERE.get(unknown.replace("_", "-"))
    longer = [flag for flag in flags if flag.startswith(unknown)]  # as --temp of --temperature
    if meant in flags:
        longer = [meant]
    return f"; did you mean {longer[0]}?" if len(longer) == 1 else did_you_mean(unknown, flags)


def build_parser(script: ModuleType, constants: dict, rules: dict, presets, actions) -> Parser:
    """Build a parser with a flag, under its heading, for each setting that a flag can hold.

    Raises UserError if a setting would have the flag of another setting, or of the script.
    """
    parser = Parser(script.__doc__)
    parser.add_argument("--version", action="version", version=cli.version())
    parser.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets)}",
                        default=argparse.SUPPRESS)  # fmt: skip
    for name, use in actions.items():
        parser.add_argument(flag_of(name), dest=name, action="store_true", help=use,
                            default=argparse.SUPPRESS)  # fmt: skip
    of_script = map(flag_of, ("preset", "help", "version", *actions))
    owners = dict.fromkeys(of_script, "another flag")  # by flag, what it sets
    about = comments(script)
    groups = {}
    for name, value in constants.items():
        flag = flag_of(name)
        kind = rules[name].kind
        if kind not in KINDS:
            held = f"{name} holds a {type(value).__name__}, which no flag can"
            parser.without_flag[flag] = f"{held}; change it in {Path(script.__file__).name}"
            continue
        if other := owners.get(flag):
            setting, other = (name, other) if name.isupper() else (other, name)
            raise UserError(f"{setting}: its flag {flag} is that of {other}; rename {setting}")
        owners[flag] = name
        heading, comment = about.get(name, ("", ""))
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading or "Your own")
        _add_flag(groups[heading], name, kind, f"{comment} (now {as_text(value)})")
    return parser


def _add_flag(group, name: str, kind: type, about: str) -> None:
    """Add the flag of a setting to a group of --help."""
    how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"metavar": kind.__name__}
    help_text = about.strip().replace("%", "%%")
    group.add_argument(flag_of(name), dest=name, help=help_text, default=argparse.SUPPRESS, **how)


def flag_of(name: str) -> str:
    """Return the flag of a setting: --block-size for BLOCK_SIZE."""
    return f"--{name.lower().replace('_', '-')}"


def read_source(script: ModuleType) -> str:
    """Return the source of a script, also of one that a user's editor saved with a BOM."""
    return Path(script.__file__).read_text(encoding="utf-8-sig", errors="replace")


def comments(script: ModuleType) -> dict[str, tuple[str, str]]:
    """Return the heading and the comment of each constant, and of each field of a dataclass."""
    texts = _comments(read_source(script))
    for name, value in list(vars(script).items()):
        if is_dataclass(value) and name in texts and not isinstance(value, type):
            fields = _comments(inspect.getsource(type(value)))
            texts |= {field: (texts[name][0], text) for field, (_, text) in fields.items()}
    return texts


def _comments(source: str) -> dict[str, tuple[str, str]]:
    """Return the heading and the comment of each name that the source assigns."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    remarks = {t.start: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    trailing = {line: text for (line, column), text in remarks.items() if column}
    texts = {}
    heading = ""
    for node in assignments(source):
        heading = remarks.get((node.lineno - 1, 0), heading)
        comment = trailing.get(node.end_lineno, trailing.get(node.lineno, ""))
        texts |= dict.fromkeys(targets(node), (heading, comment))
    return texts


def assignments(source: str) -> list[ast.Assign | ast.AnnAssign]:
    """List the assignments of a module, or of the class that is all of it: `A: int` is none."""
    body = ast.parse(source).body
    body = body[0].body if len(body) == 1 and isinstance(body[0], ast.ClassDef) else body
    return [n for n in body if isinstance(n, ast.Assign | ast.AnnAssign) and n.value]


def targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """List the plain names that an assignment sets."""
    nodes = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in nodes if isinstance(target, ast.Name)]


# ------------------------------------------------------------------------------------------- typos


def find_typos(script: ModuleType, rules: dict[str, Rule]) -> list[str]:
    """Return a warning for each name at the top that may be a slip.

    Such a name is like that of a setting, or set twice. A line that looks like an assignment and
    is none gets a warning, too.
    """
    source = read_source(script)
    lines = {}
    for node in assignments(source):
        for name in targets(node):
            lines.setdefault(name, []).append(str(node.lineno))
    warnings = without_equals(source)
    models = [name for name in rules if is_dataclass(vars(script).get(name))]
    model_of = {field: name for name in models for field in vars(vars(script)[name])}
    for name in list(lines)[: list(lines).index("ACTIONS")]:
        near = did_you_mean(name.upper(), rules, SIMILARITY)
        if name in rules and len(lines[name]) > 1:
            warnings.append(
                f"{name} is set in lines {' and '.join(lines[name])}; the last one counts"
            )
        elif name not in rules and near:
            warnings.append(f"{name} is not a setting of the trainer{near}")
        elif name.lower() in model_of:
            warnings.append(
                f"{name} is not a setting of the trainer; set it in {model_of[name.lower()]}"
            )
    return warnings


def misspelt(name: str, script: ModuleType) -> str:
    """Return a note on what the script assigns in place of a setting, "" if nothing is like it."""
    assigned = (target for node in assignments(read_source(script)) for target in targets(node))
    slips = [slip for slip in assigned if did_you_mean(slip.upper(), [name], SIMILARITY)]
    return f" (is {slips[0]} meant to be it?)" if slips else ""


def without_equals(source: str) -> list[str]:
    """Return a warning for each `NAME: 32` and `NAME == 32` above the first table, ACTIONS."""
    table = next(node.lineno for node in assignments(source) if "ACTIONS" in targets(node))
    return [
        f"line {node.lineno}, {ast.unparse(node)}, sets nothing; its = is missing"
        for node in ast.parse(source).body
        if node.lineno < table
        and (
            (isinstance(node, ast.AnnAssign) and not node.value)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare))
        )
    ]


def own_settings(script: ModuleType, rules: dict[str, Rule]) -> list[str]:
    """List the constants that the user added, but for those that may be slips."""
    names = [name for name in setting_names(script) if name not in rules]
    return [name for name in names if not did_you_mean(name, rules, SIMILARITY)]
