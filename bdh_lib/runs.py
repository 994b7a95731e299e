"""What a run folder holds, without MLX: checkpoints, the best of them, weights and settings."""

import json
from pathlib import Path

from bdh_lib import files
from bdh_lib.errors import UserError, warn


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is, or would be."""
    return run / f"step-{step:06d}"


def steps(run: Path) -> list[int]:
    """Return the steps with a checkpoint in `run`, ascending."""
    names = [f.name[5:] for f in run.glob("step-*") if f.is_dir() and not f.is_symlink()]
    return sorted(
        int(n) for n in names if n.isdecimal() and checkpoint_folder(run, int(n)).name[5:] == n
    )


def find_weights(path: str | Path) -> Path:
    """Find the weights file that `path` means: itself, a checkpoint's, a run's best or last.

    Raises UserError if there is none, or none that is valid.
    """
    path = files.expand_user(path, "the path of a model")
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if not (candidates := steps(path)):
        raise UserError(_no_weights(path))
    best = _best_step(path)
    candidates.sort(key=lambda step: (step != best, -step))  # the best, then the last
    checkpoints = [checkpoint_folder(path, step) for step in candidates]
    return _first_valid(path, checkpoints) / "model.safetensors"


def _first_valid(run: Path, checkpoints: list[Path]) -> Path:
    """Return the first checkpoint whose weights can be taken, and warn of those before it.

    Raises UserError if there is none.
    """
    faults = []
    for checkpoint in checkpoints:
        if not (fault := _fault(checkpoint / "model.safetensors")):
            if faults:
                warn(f"in {run} {'; '.join(faults)}; taking {checkpoint.name}")
            return checkpoint
        faults.append(f"{checkpoint.name} {fault}")
    raise UserError(f"{run} has no valid checkpoint: {faults[0]}")


def _no_weights(path: Path) -> str:
    """Say why a path that is not a file of weights means none, and the way on."""
    if path.name.startswith("step-") and path.is_dir():
        return f"{path} lacks its model.safetensors; name its run folder for another one"
    reason = files.absence(path)
    if path.exists():
        reason = "has no checkpoint (step-000500/model.safetensors) in it"
    return f"{path} {reason}; name a run folder, a checkpoint or a .safetensors file"


def write_best(run: Path, step: int, monitored_loss: float) -> None:
    """Name the checkpoint of `step` the best, with its monitored loss in nats."""
    best = {
        "checkpoint": checkpoint_folder(run, step).name,
        "step": step,
        "monitored_loss": monitored_loss,
    }
    files.atomic_write_text(run / "best.json", json.dumps(files.seal(best)))


def read_best(run: Path) -> dict:
    """Return the best evaluation of a run: checkpoint, step, monitored_loss in nats; {} before any.

    Raises UserError if best.json is not what the trainer wrote, by the sha256 in it, and
    PermissionError if it may not be read.
    """
    try:
        best = files.parse_json((run / "best.json").read_text())
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise
    except (OSError, ValueError):  # a folder, a link in a circle, or no JSON
        best = None
    if not isinstance(best, dict) or not files.is_sealed(best):
        raise UserError("best.json is not what was written")
    del best["sha256"]
    kinds = {"checkpoint": str, "step": int, "monitored_loss": float}
    if not all(isinstance(best.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"best.json lacks one of {', '.join(kinds)}")
    return best


def _best_step(run: Path) -> int | None:
    """Return the step of the checkpoint in a run's best.json, None if there is no such file.

    One that is damaged gets a warning: the last checkpoint is not the best.
    """
    try:
        step = read_best(run).get("step")
    except UserError as error:
        warn(f"in {run} {error}; taking the last checkpoint")
        return None
    if step is not None and step not in steps(run):
        warn(f"{run / 'best.json'} names no checkpoint of the run; taking the last checkpoint")
        return None
    return step


def _fault(weights: Path) -> str | None:
    """Say why a checkpoint's weights cannot be taken; None if they can."""
    if not weights.is_file():
        return "lacks its model.safetensors"
    return "is damaged" if is_changed(weights) else None


def is_entry(value: object) -> bool:
    """Tell whether a value is what a manifest has of a file: its size in bytes, and its sha256."""
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and "sha256" in value


def find_change(file: Path, entry: dict) -> str | None:
    """Return how a file differs from its entry in a manifest, None if not. Raises OSError."""
    if file.stat().st_size != entry["bytes"]:
        return f"{file.name} is not of the {entry['bytes']:,} bytes written"
    if files.sha256_file(file) != entry["sha256"]:
        return f"{file.name} has changed since it was written (sha256)"
    return None


def is_changed(file: Path) -> bool:
    """Tell whether a file of a checkpoint differs from its sha256 in the manifest beside it.

    A damaged manifest counts as a change; without a manifest, or an entry in it, there is none.
    Raises UserError if the file cannot be read.
    """
    if not (manifest := file.with_name("manifest.json")).exists():
        return False
    try:
        written = files.read_json_object(manifest)
    except UserError:
        return True
    if file.name not in written:
        return False
    entry = written[file.name]
    try:
        return not is_entry(entry) or find_change(file, entry) is not None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def load_settings(weights: Path) -> dict:
    """Read the trainer's settings from config.json beside the weights; {} without one.

    Those that others compute with are left out where they are of another type. Raises UserError
    if the file is damaged.
    """
    file = weights.with_name("config.json")
    settings = files.read_json_object(file).get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f"{file} is damaged: its settings are not a JSON object")
    if is_changed(file):
        raise UserError(f"{file} has changed since it was written (sha256 in manifest.json)")
    return valid_settings(settings)


def load_data_report(weights: Path) -> dict:
    """Read the report of the training data from config.json beside the weights; {} without one."""
    try:
        data = files.read_json_object(weights.with_name("config.json")).get("data", {})
    except UserError:
        return {}
    return data if isinstance(data, dict) else {}


def trained_on_chats(weights: Path) -> bool:
    """Tell by the config.json beside the weights whether chats were among the training data."""
    return bool(load_data_report(weights).get("several_turns"))


def read_config(run: Path) -> dict:
    """Return config.json without values that the trainer would not write; warn of a damaged one."""
    empty = {"settings": {}, "data": {}, "versions": {}, "parameters": 0}
    file = run / "config.json"
    try:
        content = files.read_json_object(file) if file.exists() else empty
    except UserError as error:
        warn(str(error))
        return empty
    is_typed = {name: type(content.get(name)) is type(value) for name, value in empty.items()}
    is_whole = is_typed | {"data": is_typed["data"] and _is_report(content["data"])}
    if damaged := [name for name, whole in is_whole.items() if not whole]:
        warn(f"{file} is damaged: {', '.join(damaged)} not as the trainer writes it")
    config = empty | {name: content[name] for name, whole in is_whole.items() if whole}
    return config | {"settings": valid_settings(config["settings"])}


def is_checkpoint_config(content: dict) -> bool:
    """Tell whether the content of a checkpoint's config.json has what this trainer writes."""
    kinds = {"step": int, "settings": dict, "versions": dict, "data": dict}
    is_typed = all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    return is_typed and files.is_sealed(content["data"])


def _is_report(data: dict) -> bool:
    """Tell whether the data of a config.json are a report as it was written, or none."""
    return not data or files.is_sealed(data)


def valid_settings(settings: dict) -> dict:
    """Drop settings of a wrong type from those of a config.json, which may hold anything."""
    settings = dict(settings)
    for name in ("BLOCK_SIZE", "BATCH_SIZE", "GRAD_ACCUM", "PROCESSES"):
        if name in settings and not (type(settings[name]) is int and 0 < settings[name] < 2**31):
            del settings[name]
    for name in ("TRAINING_MODE", "LOSS_ON", "DATASET"):
        if not isinstance(settings.get(name, ""), str):
            del settings[name]
    return settings
