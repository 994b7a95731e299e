"""Rules for the values of settings, arguments and models, and checks that report a wrong value."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from bdh_lib.errors import UserError, did_you_mean
from bdh_lib.settings import as_text

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
LARGEST = 2**31 - 1  # of a whole number: MLX's shapes are 32 bits


class Rule(NamedTuple):
    """Which values a setting or an argument of a function can have."""

    kind: type | None  # None: anything, and no flag
    allow_none: bool = False  # whether None is valid, which is `none` as a flag
    description: str = ""  # of the valid values; it follows "it must be"
    is_valid: Callable = lambda value: True  # for values of `kind`
    choices: Collection[str] = ()


def integer(minimum: int, maximum: int = LARGEST, allow_none: bool = False) -> Rule:
    """Return a rule that admits `minimum` to `maximum`, and None if `allow_none`."""
    description = f"a whole number from {minimum:,} to {maximum:,}"
    return Rule(int, allow_none, description, lambda n: minimum <= n <= maximum)


def number(description: str, is_valid: Callable, allow_none: bool = False) -> Rule:
    """Return a rule that admits numbers for which `is_valid`, and None if `allow_none`."""
    return Rule(float, allow_none, f"a number {description}", is_valid)


def string(allow_none: bool = False) -> Rule:
    """Return a rule that admits text that is not blank, and None if `allow_none`.

    Without `allow_none` it does not admit the text "none", which would name a file.
    """
    if allow_none:
        return Rule(str, True, "text that is not empty", lambda value: value.strip())
    unset = ("", "none")
    description = "text that is neither empty nor none"
    return Rule(str, False, description, lambda value: value.strip().lower() not in unset)


def boolean() -> Rule:
    """Return a rule that admits True and False."""
    return Rule(bool, False, KINDS[bool])


def choice(*choices: str) -> Rule:
    """Return a rule that admits the `choices`."""
    return Rule(str, False, f"one of {', '.join(choices)}", choices.__contains__, choices)


def check(name: str, value, rule: Rule, none: str = "None") -> None:
    """Raise UserError with the name, the value and the rule's limits if the value breaks it.

    `none` is how None is written there: `none` as a flag.
    """
    if rule.kind is None or (rule.allow_none and value is None):
        return
    kinds = (int, float) if rule.kind is float else (rule.kind,)
    right_type = isinstance(value, kinds) and (rule.kind is bool or not isinstance(value, bool))
    if right_type and rule.is_valid(value):
        return
    or_none = f" or {none}" if rule.allow_none else ""
    near = did_you_mean(value, rule.choices) if isinstance(value, str) else ""
    shown = as_text(value, repr)
    raise UserError(f"{name} is {shown}; it must be {rule.description}{or_none}{near}")


# Rules that BDH.generate and bdh_lib/generation/sampling.py share; imports only point down to here.
TEMPERATURE = number("that is 0 or 0.000001 to 1,000,000", lambda x: x == 0 or 1e-6 <= x <= 1e6)
TOP_K = integer(1, 65536, allow_none=True)

# The fields of bdh_mlx.BDHConfig
SIZE = integer(1, 65536)
RATE = number("of at least 0 and below 1", lambda x: 0 <= x < 1)
CONFIG_RULES = {
    "n_layer": integer(1, 1000),
    "n_embd": SIZE,
    "dropout": RATE,
    "n_head": SIZE,
    "mlp_internal_dim_multiplier": SIZE,
    "vocab_size": SIZE,
    "dropout_v": RATE,
}


class CheckedConfig:
    """Base class that checks a dataclass with the fields of CONFIG_RULES. Raises UserError."""

    def __new__(cls, *args, **values):  # before the dataclass's __init__, which raises TypeError
        if len(args) > len(fields := cls.__dataclass_fields__):
            raise UserError(f"{cls.__name__} has {len(fields)} fields, not {len(args)}")
        for name in values:
            if name not in fields:
                near = did_you_mean(name, fields)
                raise UserError(f"{name} is not a field of {cls.__name__}{near}")
        return super().__new__(cls)

    def __post_init__(self):
        """Check each field alone, then that the neurons can be divided among the heads."""
        for name, rule in CONFIG_RULES.items():
            check(name, getattr(self, name), rule)
        neurons = self.n_embd * self.mlp_internal_dim_multiplier
        if neurons >= 2**31:  # a dimension of an array
            raise UserError(
                f"n_embd * mlp_internal_dim_multiplier is {neurons:,}; it must be below 2^31"
            )
        if neurons % self.n_head:
            raise UserError(
                f"n_head is {self.n_head}; it must divide the number of neurons, "
                f"n_embd * mlp_internal_dim_multiplier = {neurons}"
            )
        neurons_per_head = neurons // self.n_head
        if neurons_per_head % 2:
            raise UserError(
                f"n_head is {self.n_head}, so each head has N = {neurons_per_head} neurons; "
                "N must be even, since they rotate in pairs"
            )
