"""What each setting of the trainer may be, which go together, and the runs that PHASES names."""

import re
from contextlib import suppress
from dataclasses import asdict
from types import ModuleType

from bdh_lib import files
from bdh_lib.compute import memory
from bdh_lib.data import hub
from bdh_lib.data.columns import parse_columns_setting
from bdh_lib.data.formats import REQUIRED_FIELDS
from bdh_lib.errors import UserError
from bdh_lib.rules import Rule, boolean, check, choice, integer, number, string
from bdh_lib.script import flags
from bdh_lib.settings import Settings
from bdh_lib.training import checkpoints
from bdh_mlx import BDHConfig

RULES = {  # what each setting may be; one that is not here, a user's own, may be anything
    "TRAINING_MODE": choice(*REQUIRED_FIELDS),
    "LOSS_ON": choice("all", "response"),
    "DATASET": string(),
    "COLUMNS": string(allow_none=True),
    "BLOCK_SIZE": integer(1),
    "BATCH_SIZE": integer(1),
    "GRAD_ACCUM": integer(1),
    "MAX_ITERS": integer(1, allow_none=True),
    "EPOCHS": number("above 0 and at most 1,000,000", lambda x: 0 < x <= 1e6, allow_none=True),
    "PATIENCE": integer(1, allow_none=True),
    "LEARNING_RATE": number("from 1e-12 to 1,000", lambda x: 1e-12 <= x <= 1000),
    "MIN_LR_RATIO": number("above 0 and at most 1", lambda x: 0 < x <= 1),
    "WARMUP_ITERS": integer(0),
    "LR_DECAY_ITERS": integer(1, allow_none=True),
    "WEIGHT_DECAY": number("from 0 to 1,000", lambda x: 0 <= x <= 1000),
    "BETA2": number("from 0 to 0.999999", lambda x: 0 <= x <= 0.999999),
    "GRAD_CLIP": number("from 1e-12 to 1e12", lambda x: 1e-12 <= x <= 1e12, allow_none=True),
    "EMA_DECAY": number("from 0 to 0.999999", lambda x: 0 <= x <= 0.999999),
    "SHUFFLE_RECORDS": boolean(),
    "BYTE_NOISE": number("at least 0 and below 1", lambda x: 0 <= x < 1),
    "MAX_CONSECUTIVE_SKIPS": integer(1),
    "BDH_CONFIG": Rule(BDHConfig, description="a BDHConfig(...)"),
    "DTYPE": choice("auto", "bfloat16", "float32"),
    "MEMORY_MODE": choice("auto", *memory.MODES),
    "IGNORE_MEMORY_CHECK": boolean(),
    "SEED": integer(0, 2**32 - 1),  # it makes a key of 64 bits with the number of a batch
    "VAL_FRACTION": number("above 0 and below 1", lambda x: 0 < x < 1),
    "EVAL_BYTES": integer(2, 2**62, allow_none=True),
    "LOG_FREQ": integer(1),
    "EVAL_FREQ": integer(1),
    "SAVE_FREQ": integer(1),
    "SAVE_MINUTES": number("above 0 and at most 10,000", lambda x: 0 < x <= 1e4, allow_none=True),
    "KEEP_CHECKPOINTS": integer(1),
    "SAMPLE_BYTES": integer(0, 10**6),
    "CHECKPOINT_DIR": string(),
    "RUN_NAME": string(allow_none=True),
    "INIT_FROM": string(allow_none=True),
    "PHASES": string(allow_none=True),
    "KEEP_AWAKE": boolean(),
}

# Changing one of these in a run would change what its steps mean: that takes a new RUN_NAME.
GLOBAL_BATCH = "BATCH_SIZE x GRAD_ACCUM x processes"
FIXED_ON_RESUME = (
    *("TRAINING_MODE", "BLOCK_SIZE", GLOBAL_BATCH, "SEED"),
    *("SHUFFLE_RECORDS", "LOSS_ON", "EVAL_BYTES", "EMA_DECAY"),
    *("train data", "val data"),
    *("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size"),
)

PHASE = re.compile(r"\s*(\w+):([^@\s]+)(?:@(\S+))?\s*")  # mode:epochs or mode:epochs@learning_rate


def parse_settings(script: ModuleType, argv: list[str] | None = None) -> Settings:
    """Return the constants of the trainer `script`, changed by a preset, changed by flags.

    Raises UserError.
    """
    s, typed = flags.parse(script, RULES, script.PRESETS, script.ACTIONS, argv)
    refuse_flags_without_effect(s, typed)
    for name in ("CHECKPOINT_DIR", "INIT_FROM"):  # no shell reads a constant
        if (value := getattr(s, name)) and not hub.is_model(value):
            setattr(s, name, str(files.expand_user(value, name)))
    s.BDH_CONFIG = BDHConfig(**{name: vars(s).pop(name) for name in asdict(s.BDH_CONFIG)})
    for run in phase_settings(s):
        check_settings(run)
    return s


def preset_settings(script: ModuleType) -> dict[str, Settings | None]:
    """Return the settings of each preset, None if one does not go with the constants."""
    result = dict.fromkeys(script.PRESETS)
    for name in script.PRESETS:
        with suppress(UserError):
            result[name] = parse_settings(script, ["--preset", name])
    return result


def phase_settings(s: Settings) -> list[Settings]:
    """Return the settings of each run that PHASES names; without it, `s` alone. Raises UserError.

    Run i of RUN_NAME r is r-1-system, r-2-instruction and so on, its INIT_FROM the run before.
    """
    if s.PHASES is None:
        return [s]
    runs = []
    for i, phase in enumerate(s.PHASES.split(","), 1):
        mode, epochs, rate = parse_phase(phase)
        overrides = {
            "TRAINING_MODE": mode,
            "EPOCHS": epochs,
            "LEARNING_RATE": s.LEARNING_RATE if rate is None else rate,
            "RUN_NAME": f"{s.RUN_NAME or 'phases'}-{i}-{mode}",
            "INIT_FROM": runs[-1].RUN_NAME if runs else s.INIT_FROM,
        }
        runs.append(Settings(**vars(s) | overrides))
    return runs


def parse_phase(phase: str) -> tuple[str, float | None, float | None]:
    """Return mode, epochs and learning rate of one of PHASES, None if it has none.

    Raises UserError.
    """
    if match := PHASE.fullmatch(phase):
        mode, epochs, rate = match.groups()
        with suppress(ValueError):  # of float
            return mode, None if epochs == "none" else float(epochs), rate and float(rate)
    raise UserError(
        f"PHASES has {phase!r}; it must be mode:epochs or mode:epochs@learning_rate, "
        'joined by commas: "system:3,instruction:3@2e-5"'
    )


def refuse_flags_without_effect(s: Settings, typed: set[str]) -> None:
    """Raise UserError for typed flags that have no effect beside others."""
    idle = {}
    if s.selfcheck:
        idle["--selfcheck"] = typed - {"selfcheck", "DTYPE"}
    if s.plan:
        idle["--plan"] = typed & {"json"}
    if s.tune:
        idle["--tune"] = typed & {"json", "plan", "refresh_data"}
    if s.PHASES is not None:
        idle["--phases, which names its own"] = typed & {"TRAINING_MODE", "EPOCHS"}
    for beside, names in idle.items():
        if names:
            idle_flags = ", ".join(sorted(map(flags.flag_of, names)))
            raise UserError(f"{idle_flags}: no effect beside {beside}; leave it out")


def check_settings(s: Settings) -> None:
    """Raise UserError for the settings of a run that do not go together."""
    for name, rule in RULES.items():  # PHASES may have put other values in
        check(name, getattr(s, name), rule)
    checkpoints.run_folder(s)  # RUN_NAME
    parse_columns_setting(s.COLUMNS)
    if s.LOSS_ON not in ("all", *REQUIRED_FIELDS[s.TRAINING_MODE]):
        raise UserError(
            f"LOSS_ON is {s.LOSS_ON!r}, of which TRAINING_MODE {s.TRAINING_MODE!r} has none; "
            "set TRAINING_MODE to 'full' or LOSS_ON to 'all'"
        )
    if s.MAX_ITERS is None and s.EPOCHS is None:
        raise UserError("MAX_ITERS and EPOCHS are both none, a run without an end; set one of them")
    if s.LR_DECAY_ITERS is not None and s.LR_DECAY_ITERS <= s.WARMUP_ITERS:
        raise UserError(
            f"LR_DECAY_ITERS is {s.LR_DECAY_ITERS:,} and WARMUP_ITERS {s.WARMUP_ITERS:,}: the rate "
            "falls after the warm-up, so raise LR_DECAY_ITERS or lower WARMUP_ITERS"
        )
    if s.BDH_CONFIG.vocab_size != 256:
        raise UserError(
            f"vocab_size is {s.BDH_CONFIG.vocab_size}; bytes are 256, so leave it at 256"
        )
