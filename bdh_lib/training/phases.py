"""A chain of runs, each from the best weights of the one before, and what it makes them forget."""

import json
import re
from contextlib import suppress
from pathlib import Path

from bdh_lib import files
from bdh_lib.compute import memory
from bdh_lib.data import sources
from bdh_lib.data.formats import REQUIRED_FIELDS
from bdh_lib.data.prepare import cache_key, data_settings
from bdh_lib.errors import NoDataError, UserError
from bdh_lib.runs import find_weights
from bdh_lib.settings import Settings
from bdh_lib.tables import format_table
from bdh_lib.training.dataset import load_prepared
from bdh_lib.training.evaluation import evaluate
from bdh_lib.training.signals import StopSignal
from bdh_lib.training.step import compile_losses
from bdh_lib.units import bits_per_byte
from bdh_mlx import load_model

PHASE = re.compile(r"\s*(\w+):([^@\s]+)(?:@(\S+))?\s*")


def chain(s: Settings, n_processes: int = 1) -> list[Settings]:
    """Return the settings of each run that PHASES names; without it, `s` alone. Raises UserError.

    Run i of RUN_NAME r is r-1-system, r-2-instruction and so on, its INIT_FROM the run before.
    PROCESSES is the number of those that train it.
    """
    s = Settings(**vars(s) | {"PROCESSES": n_processes})
    if s.PHASES is None:
        return [s]
    runs = []
    for i, phase in enumerate(s.PHASES.split(","), 1):
        try:
            mode, epochs, rate = PHASE.fullmatch(phase).groups()
            overrides = {
                "TRAINING_MODE": mode,
                "EPOCHS": None if epochs == "none" else float(epochs),
                "LEARNING_RATE": s.LEARNING_RATE if rate is None else float(rate),
            }
        except (AttributeError, ValueError):
            raise UserError(
                f"PHASES has {phase!r}; it must be mode:epochs or mode:epochs@learning_rate, "
                'joined by commas: "system:3,instruction:3@2e-5"'
            ) from None
        overrides["RUN_NAME"] = f"{s.RUN_NAME or 'phases'}-{i}-{mode}"
        overrides["INIT_FROM"] = runs[-1].RUN_NAME if runs else s.INIT_FROM
        runs.append(Settings(**vars(s) | overrides))
    return runs


def ancestry(source: Path) -> list[dict]:
    """Return the weights file that `source` means, after those that it came from.

    Each is {"weights": path, "sha256": digest}. Raises UserError where `source` has no valid
    weights.
    """
    file = find_weights(source)
    try:
        ancestors = files.parse_json(file.with_name("config.json").read_text()).get("ancestry", [])
    except (OSError, ValueError, AttributeError):  # a bare file of weights, or another's
        ancestors = []
    return [*ancestors, {"weights": str(file), "sha256": files.sha256_file(file)}]


def evaluate_modes(s: Settings, run: Path, stop: StopSignal) -> dict[str, float]:
    """Return the bits per byte of the run's best weights on the validation bytes of each mode.

    Modes that the data do not serve are left out. modes.json keeps the results, by field too.
    """
    results = ancestry(run)[-1] | {"eval_bytes": s.EVAL_BYTES}
    results["data"] = cache_key(data_settings(s, s.TRAINING_MODE), sources.find(s.DATASET))
    file = run / "modes.json"
    with suppress(OSError, ValueError):
        earlier = files.parse_json(file.read_text())
        if results.items() <= earlier.items():
            return earlier["val_bpb"]
    model = load_model(run)
    model.compute = memory.select_mode(s)[1]
    losses_fn = compile_losses(model)
    bpb, fields = {}, {}
    for mode in REQUIRED_FIELDS:
        with suppress(NoDataError):
            val = load_prepared(s, mode).val
            loss, nats = evaluate(losses_fn, val, (s.BATCH_SIZE, s.BLOCK_SIZE), stop)
            bpb[mode] = bits_per_byte(loss)
            fields[mode] = {field: bits_per_byte(loss) for field, loss in nats.items()}
    if not stop.requested:
        results |= {"val_bpb": bpb, "val_bpb_fields": fields}
        files.atomic_write_text(file, json.dumps(results, indent=1))
    return bpb


def forgetting_table(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of the bits per byte by run and mode; (+0.31) is what was forgotten since."""
    modes = list(next(iter(rows.values())))
    table, lowest = [("run", *modes)], {}
    for name, bpb in rows.items():
        lost = {mode: bpb[mode] - lowest.get(mode, bpb[mode]) for mode in modes}
        cells = [f"{bpb[m]:.4f}" + (f" (+{lost[m]:.4f})" if lost[m] > 0 else "") for m in modes]
        table.append((name, *cells))
        lowest = {mode: min(bpb[mode], lowest.get(mode, bpb[mode])) for mode in modes}
    return f"held out, bits per byte:\n{format_table(table)}"
