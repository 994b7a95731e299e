"""Where a run begins: at its last checkpoint, at the weights of another run, or at random ones."""

from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bdh_lib import runs
from bdh_lib.data import hub
from bdh_lib.data.describe import data_changes
from bdh_lib.errors import UserError
from bdh_lib.settings import Settings, settings_dict
from bdh_lib.training import checkpoints, phases, tuning
from bdh_lib.training.distributed import World
from bdh_lib.training.schedule import blocks_per_step, learning_rate, total_steps
from bdh_lib.training.train_settings import FIXED_ON_RESUME, GLOBAL_BATCH, RULES
from bdh_lib.training.train_state import (
    TrainState,
    broadcast_state,
    copy_tree,
    ema_applied,
    init_train_state,
)
from bdh_lib.training.tuning import Selection
from bdh_mlx import load_model


class Start(NamedTuple):
    """Where a run begins, the same on all processes."""

    step: int  # of the checkpoint that it continues from, 0 without one
    selection: Selection  # how it computes
    state: TrainState
    ancestry: list  # of its weights: the files of weights that they came from


def resume_or_init(s: Settings, run: Path, data_report: dict, world: World) -> Start:
    """Begin at the run's last checkpoint, else at INIT_FROM's weights, else at random ones.

    `data_report` is data.json of the prepared data. Raises UserError.
    """
    step = world.broadcast_object(checkpoints.newest_valid(run) if world.is_main else None)
    selection = tuning.select(s, *tuning.initial_choice(s, run, step, world))
    state = init_train_state(s, selection.compute)
    ancestry = load_state(s, run, step, data_report, state) if world.is_main else None
    ancestry = world.broadcast_object(ancestry)
    broadcast_state(state, world)
    return Start(step, selection, state, ancestry)


def load_state(s: Settings, run: Path, step: int, data_report: dict, state: TrainState) -> list:
    """Load the checkpoint of `step`, or where that is 0 the weights of INIT_FROM, if any.

    Returns the ancestry of the weights. Raises UserError.
    """
    if not step:
        return init_from(s, state) if s.INIT_FROM else []
    runs.read_config(run)  # warns if it is damaged; what counts is that of the checkpoint
    info = checkpoints.read_info(run, step)
    changes = changes_on_resume(run, info, s, data_report)
    check_origin(run, info, s)
    with ema_applied(state):  # as it was saved
        checkpoints.load(run, step, state)
    print("; ".join([f"start: continues {run} after iteration {step:,}", *changes]))
    print_new_rate(info, s, step, data_report)
    return info.get("ancestry", [])


def run_info(s: Settings, data_report: dict, start: Start) -> dict:
    """Return config.json of a run: its settings, its data, and where and how it was computed."""
    info = {"settings": settings_dict(s), "data": data_report, "versions": checkpoints.versions()}
    info |= {"ancestry": start.ancestry, "parameters": s.BDH_CONFIG.n_parameters}
    compute = start.selection.compute
    info["compute"] = tuning.choice_dict(compute) | {"groups": compute.groups}
    info["own"] = [name for name in info["settings"] if name.isupper() and name not in RULES]
    return info


def resolve_init_from(s: Settings) -> Path:
    """Return where the weights of INIT_FROM lie. Raises UserError if the hub has none.

    That is in CHECKPOINT_DIR, at the path itself, or in the cache of the hub.
    """
    if hub.is_model(s.INIT_FROM):
        return hub.download_model(s.INIT_FROM)
    inside = Path(s.CHECKPOINT_DIR, s.INIT_FROM)
    return inside if inside.exists() else Path(s.INIT_FROM)


def init_from(s: Settings, state: TrainState) -> list:
    """Load the weights of INIT_FROM into `state`, and return their ancestry. Raises UserError."""
    if not (origin := resolve_init_from(s)).exists():
        raise UserError(
            f"INIT_FROM {s.INIT_FROM}: there is no such run in {s.CHECKPOINT_DIR}, and no such "
            "path; train that run first, or name another"
        )
    source = load_model(origin)
    changes = checkpoints.settings_changes(asdict(source.config), asdict(s.BDH_CONFIG))
    if unlike := [text for name, text in changes.items() if "dropout" not in name]:
        raise UserError(f"INIT_FROM {s.INIT_FROM} is of another shape: {'; '.join(unlike)}")
    state.model.update(source.parameters())
    if state.ema:
        state.ema.update(copy_tree(source.parameters()))
    print(f"start: weights of {s.INIT_FROM}, a new optimizer")
    return phases.ancestry(origin)


def changes_on_resume(run: Path, info: dict, s: Settings, data_report: dict) -> list[str]:
    """Say what has changed since a checkpoint. Raises UserError for what may not change."""
    old = saved_values(run, info)
    new = settings_dict(s) | checkpoints.versions() | {GLOBAL_BATCH: blocks_per_step(s)}
    changes = checkpoints.settings_changes(old, new) | data_changes(info["data"], data_report)
    refuse_changes(run, changes)
    return list(changes.values())


def saved_values(run: Path, info: dict) -> dict:
    """Return the settings and versions in config.json of a checkpoint, and its GLOBAL_BATCH.

    Raises UserError if the file is of another format.
    """
    if not runs.is_checkpoint_config(info):
        raise UserError(f"{run} holds checkpoints of another format; set RUN_NAME")
    needed = {name for name in FIXED_ON_RESUME if name.isupper()} | {"BATCH_SIZE", "GRAD_ACCUM"}
    if missing := needed - info["settings"].keys():
        raise UserError(
            f"{run} is of another format: it has no {min(missing)}. Set RUN_NAME to start "
            f"another run, with INIT_FROM {run.name} from these weights"
        )
    global_batch = blocks_per_step(Settings(**info["settings"]))
    return info["settings"] | info["versions"] | {GLOBAL_BATCH: global_batch}


def refuse_changes(run: Path, changes: dict[str, str]) -> None:
    """Raise UserError for changes, described by name, of what is fixed for a run."""
    fixed = [name for name in changes if name in FIXED_ON_RESUME]
    of_data = [name for name in fixed if name.endswith(" data")]
    if "TRAINING_MODE" in fixed or "SEED" in fixed:  # they change the data, too
        fixed = [name for name in fixed if name not in of_data]
    if fixed:
        shown = [*map(changes.get, fixed[:5]), *(["and others"] if len(fixed) > 5 else [])]
        weights = f"; INIT_FROM {run.name} begins it with these weights" if fixed == of_data else ""
        raise UserError(
            f"{run} holds a run with other settings ({'; '.join(shown)}). Set them back to "
            f"continue it, or start another run: set RUN_NAME (--run-name){weights}"
        )


def check_origin(run: Path, info: dict, s: Settings) -> None:
    """Raise UserError if a run started from other weights than those of INIT_FROM."""
    ancestry = info.get("ancestry", [])
    earlier = info["settings"].get("INIT_FROM")
    # a model of the hub may have changed there since, and need not be asked for again: names count
    is_of_hub = bool(s.INIT_FROM) and hub.is_model(s.INIT_FROM)
    if s.INIT_FROM and (not ancestry or (is_of_hub and earlier != s.INIT_FROM)):
        raise UserError(
            f"{run} did not start from {s.INIT_FROM}; set RUN_NAME to start another run"
        )
    current = ancestry
    if s.INIT_FROM and not is_of_hub and (origin := resolve_init_from(s)).exists():
        with suppress(UserError):  # its checkpoints are gone: the run has all that it needs
            current = phases.ancestry(origin)
    if ancestry and current[-1]["sha256"] != ancestry[-1]["sha256"]:
        raise UserError(
            f"{run} started from {ancestry[-1]['weights']}, and the best weights of INIT_FROM "
            f"{s.INIT_FROM} are others now. Set RUN_NAME to start another run from them; to "
            f"continue this one, set RUN_NAME to {run.name}, and INIT_FROM and PHASES to None"
        )


def check_chain(chain: list[Settings]) -> None:
    """Raise UserError if one of PHASES would train on after the next one took its weights."""
    for earlier, later in pairwise(chain):
        run, next_run = map(checkpoints.run_folder, (earlier, later))
        if runs.steps(next_run) and is_longer(run, earlier):
            raise UserError(
                f"{run} would train for longer now, and {next_run} started from its weights; set "
                "PHASES and MAX_ITERS back, or RUN_NAME to start another chain"
            )


def is_longer(run: Path, s: Settings) -> bool:
    """Tell whether a run has more steps by these settings than by those of its last checkpoint."""
    try:
        info = checkpoints.read_info(run, max(runs.steps(run)))
    except (ValueError, OSError):  # it has none, or a damaged one, which is looked at later
        return False
    if not runs.is_checkpoint_config(info):
        return False
    return total_steps(s, info["data"]["train"]["bytes"]) > saved_schedule(info, s)[1]


def saved_schedule(info: dict, s: Settings) -> tuple[Settings, int]:
    """Return the settings of a checkpoint, and the number of steps of the run by them."""
    saved = Settings(**vars(s) | info["settings"])  # settings of the user's own may be new
    return saved, total_steps(saved, info["data"]["train"]["bytes"])


def print_new_rate(info: dict, s: Settings, step: int, data_report: dict) -> None:
    """Say when a resumed run continues with another learning rate than it would have had."""
    old, old_end = saved_schedule(info, s)
    new_rate = learning_rate(step, total_steps(s, data_report["train"]["bytes"]), s)
    planned = learning_rate(step, old_end, old)
    if abs(new_rate - planned) > 0.01 * planned:
        last = learning_rate(step - 1, old_end, old)
        print(f"learning rate: {last:.2e} at iteration {step:,}, {new_rate:.2e} from here on")
