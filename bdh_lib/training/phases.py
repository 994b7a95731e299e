"""What a chain of runs, each from the best weights of the one before, makes them forget."""

import json
from contextlib import suppress
from pathlib import Path

from bdh_lib import files
from bdh_lib.data import sources
from bdh_lib.data.formats import REQUIRED_FIELDS
from bdh_lib.data.prepare import cache_key, data_settings
from bdh_lib.errors import NoDataError, UserError
from bdh_lib.loss import compile_losses, evaluate
from bdh_lib.runs import find_weights
from bdh_lib.settings import Settings
from bdh_lib.tables import format_table
from bdh_lib.training import memory_plan
from bdh_lib.training.dataset import open_mode_data
from bdh_lib.training.signals import StopSignal
from bdh_lib.units import bits_per_byte
from bdh_mlx import load_model


def ancestry(source: Path) -> list[dict]:
    """Return the weights file that `source` means, after those that it came from.

    Each is {"weights": path, "sha256": digest}. Raises UserError if `source` has no valid
    weights.
    """
    file = find_weights(source)
    ancestors = []
    with suppress(UserError):  # another's config.json may hold anything
        about = files.read_json_object(file.with_name("config.json"))
        if isinstance(about.get("ancestry"), list):
            ancestors = about["ancestry"]
    return [*ancestors, {"weights": str(file), "sha256": files.sha256_file(file)}]


def evaluate_modes(s: Settings, run: Path, stop: StopSignal) -> dict[str, float]:
    """Return the bits per byte of the run's best weights on the validation bytes of each mode.

    Modes that the data do not serve are left out; {} where a signal came. modes.json keeps the
    results, by field too.
    """
    results = ancestry(run)[-1] | {"eval_bytes": s.EVAL_BYTES}
    results["data"] = cache_key(data_settings(s, s.TRAINING_MODE), sources.resolve_files(s.DATASET))
    file = run / "modes.json"
    with suppress(UserError):
        earlier = files.read_json_object(file)
        if results.items() <= earlier.items():
            return earlier["val_bpb"]
    model = load_model(run)
    model.compute = memory_plan.select_mode(s)[1]
    losses_fn = compile_losses(model)
    bpb, fields = {}, {}
    for mode in REQUIRED_FIELDS:
        with suppress(NoDataError):
            val = open_mode_data(s, mode).val
            loss, nats = evaluate(losses_fn, val, (s.BATCH_SIZE, s.BLOCK_SIZE), stop)
            if stop.requested:
                return {}
            bpb[mode] = bits_per_byte(loss)
            fields[mode] = {field: bits_per_byte(loss) for field, loss in nats.items()}
    results |= {"val_bpb": bpb, "val_bpb_fields": fields}
    files.atomic_write_text(file, json.dumps(results, indent=1))
    return bpb


def forgetting_table(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of the bits per byte by run and mode; (+0.31) is what was forgotten since."""
    modes = list(next(iter(rows.values())))
    table = [("run", *modes)]
    lowest = {}  # bits per byte of each mode so far
    for name, bpb in rows.items():
        lost = {mode: bpb[mode] - lowest.get(mode, bpb[mode]) for mode in modes}
        cells = [f"{bpb[m]:.4f}" + (f" (+{lost[m]:.4f})" if lost[m] > 0 else "") for m in modes]
        table.append((name, *cells))
        lowest = {mode: min(bpb[mode], lowest.get(mode, bpb[mode])) for mode in modes}
    return f"held out, bits per byte:\n{format_table(table)}"
