"""Rules for the shape of a model: the checks that bdh_mlx.BDHConfig inherits."""

from bdh_lib.errors import UserError, did_you_mean
from bdh_lib.rules import check, number, whole

SIZE = whole(1, 65536)
RATE = number("of at least 0 and below 1", lambda x: 0 <= x < 1)
FIELD_RULES = {
    "n_layer": whole(1, 1000),
    "n_embd": SIZE,
    "dropout": RATE,
    "n_head": SIZE,
    "mlp_internal_dim_multiplier": SIZE,
    "vocab_size": SIZE,
    "dropout_v": RATE,
}


class CheckedConfig:
    """Base class that checks a dataclass with the fields of FIELD_RULES. Raises UserError."""

    def __new__(cls, *args, **values):  # before the dataclass's __init__, which raises TypeError
        if len(args) > len(fields := cls.__dataclass_fields__):
            raise UserError(f"{cls.__name__} has {len(fields)} fields, not {len(args)}")
        for name in values:
            if name not in fields:
                near = did_you_mean(name, fields)
                raise UserError(f"{name} is no field of {cls.__name__}{near}")
        return super().__new__(cls)

    def __post_init__(self):
        """Check each field alone, then that the neurons can be divided among the heads."""
        for name, rule in FIELD_RULES.items():
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
