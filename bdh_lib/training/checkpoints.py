"""Checkpoints on disk. run/step-000500 is complete or absent; run/best.json names the best.

A save writes aside, flushes to the disk, lists each file's size and sha256 in manifest.json, and
only then renames: killed at any moment, it leaves the old checkpoints whole and at most a `.tmp`
folder, which the next start removes. MLX alone would neither flush nor notice a flipped bit.
"""

import fcntl
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from bdh_lib import files, runs
from bdh_lib.compute.arrays import read_arrays
from bdh_lib.errors import UserError, warn
from bdh_lib.runs import checkpoint_folder
from bdh_lib.settings import Settings
from bdh_lib.training.train_state import TrainState
from bdh_mlx import save_model

# what a run writes besides its checkpoints
WRITTEN = ["config.json", "metrics.jsonl", "best.json", "modes.json"]
WRITTEN += ["samples.md", "curves.png", "report.html"]
SAVED = ".saved"  # says that the run had a checkpoint, should they all be deleted


class NoValidCheckpoint(UserError):
    """The run has no checkpoint that can be trusted, though it had one."""

    exit_code = 3


# ---------------------------------------------------------------------------------- the run folder


def run_folder(s: Settings) -> Path:
    """Return the folder of the run. Raises UserError for a name that could lie elsewhere."""
    name = s.TRAINING_MODE if s.RUN_NAME is None else s.RUN_NAME
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
        must = "1 to 64 of the characters A-Za-z0-9._-, the first of them not a dot"
        raise UserError(f"RUN_NAME is {name!r}; it must be {must}")
    return Path(s.CHECKPOINT_DIR, name)


def refuse_foreign_files(run: Path) -> None:
    """Raise UserError if `run` is not a run, and holds files that a run would replace."""
    found = [name for name in WRITTEN if (run / name).is_file()]
    folders = [checkpoint_folder(run, step) for step in runs.steps(run)]
    found += [folder.name for folder in folders]
    is_run = (run / ".lock").exists() or any((f / "manifest.json").is_file() for f in folders)
    if found and not is_run:
        raise UserError(
            f"{run} is not a run, and a run would replace its {', '.join(found[:9])}; set RUN_NAME"
        )


def refuse_in_the_way(run: Path, step: int) -> None:
    """Raise UserError if a file or a link has the name of a checkpoint after that of `step`."""
    for path in run.glob("step-*"):
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name[5:].isdecimal() and int(path.name[5:]) > step and not is_folder:
            raise UserError(
                f"{path} is in the way of a checkpoint, as it is not a folder; remove or rename it"
            )


def refuse_other_case(run: Path) -> None:
    """Raise UserError if the name of `run` and that of a file beside it differ in case alone.

    To a Mac's disk both are one folder, so one run would continue the other.
    """
    names = [file.name for file in run.parent.iterdir()] if run.parent.is_dir() else []
    others = [name for name in names if name.lower() == run.name.lower()]
    if others and run.name not in others:
        raise UserError(
            f"{run} and {run.parent / others[0]}, which exists, differ in case alone, and a Mac "
            f"takes both for one; set RUN_NAME to {others[0]} or to another name"
        )


def check_writable(folder: Path) -> None:
    """Make a folder in CHECKPOINT_DIR, and write there. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1000))
    except OSError as error:
        reason = f"{folder} cannot be written: {files.write_fault(error)}"
        raise UserError(f"{reason}; see CHECKPOINT_DIR") from None


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Lock a run for one trainer, and remove what a killed one left. Raises UserError."""
    is_new = not run.exists()
    with _open_lock(run) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is being trained by another process; set RUN_NAME") from None
        _sweep(run)
        try:
            yield
        finally:
            with suppress(OSError):  # another one comes in, or it is gone
                names = {f.name for f in run.iterdir()}
                if is_new and names <= {".lock", "metrics.jsonl"}:  # refused before it trained
                    shutil.rmtree(run)


def _open_lock(run: Path) -> TextIO:
    """Open the file that is locked, in a folder that is made for it. Raises UserError."""
    try:
        refuse_other_case(run)
        refuse_foreign_files(run)
        run.mkdir(parents=True, exist_ok=True)
        return (run / ".lock").open("a")
    except OSError as error:
        reason = f"{error.filename or run} cannot be written: {files.write_fault(error)}"
        raise UserError(f"{reason}; see CHECKPOINT_DIR") from None


def _sweep(run: Path) -> None:
    """Remove the temporary files and folders that a killed trainer left."""
    for leftover in run.glob(".step-*.tmp"):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    for name in WRITTEN:
        for leftover in run.glob(files.temporary_name(name, "*")):
            leftover.unlink()


def valid_best(run: Path) -> dict:
    """Return the best evaluation so far (checkpoint, step, monitored_loss in nats); {} before any.

    A damaged file, or one whose checkpoint is damaged, is dropped with a warning: the next
    evaluation is the best then. Raises UserError for a file that may not be read.
    """
    best = {}
    reason = None
    try:
        best = runs.read_best(run)
    except PermissionError as error:
        raise unreadable(error) from None
    except UserError as error:
        reason = str(error)
    if best:
        reason = find_corruption(checkpoint_folder(run, best["step"]))
    if not reason:
        return best
    warn(f"no checkpoint is the best until the next validation: {reason}")
    (run / "best.json").rename(free_path(run, "damaged-best.json"))
    return {}


def free_path(run: Path, name: str) -> Path:
    """Return the path of `name` in `run`, with the first number behind it that is free."""
    return next(p for i in range(10**6) if not (p := run / f"{name}-{i}").exists())


def prune(run: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the last `keep` and that of step `best`."""
    for step in runs.steps(run)[:-keep]:
        if step != best:
            old = checkpoint_folder(run, step)
            gone = old.rename(run / f".{old.name}.tmp")
            shutil.rmtree(gone, ignore_errors=True)  # what a crash leaves, the next start sweeps


# ----------------------------------------------------------------------------------- save and load


def save(run: Path, step: int, state: TrainState, info: dict) -> None:
    """Write the checkpoint of `step`, whole and durable. Raises UserError, the others untouched.

    Where the run has an average, the model holds it and `ema` the weights that are trained.
    """
    final = checkpoint_folder(run, step)
    staging = run / f".{final.name}.tmp"
    check_space(run, state, 1)
    if not _finite(tree_flatten(state.trees())):
        raise UserError(f"{final} not saved: it holds numbers that are not finite")
    try:
        staging.mkdir()
        _write_state(staging, state)
        (staging / "config.json").write_text(json.dumps({"step": step} | info, indent=1))
        _write_manifest(staging)
        staging.rename(final)
        files.fsync(run)
        (run / SAVED).touch()  # once the checkpoint is on the disk: without it the run is refused
    except (OSError, RuntimeError) as error:  # RuntimeError: MLX could not write
        shutil.rmtree(staging, ignore_errors=True)
        reason = files.write_fault(error)
        raise UserError(f"{final} not saved: {reason}; earlier ones are intact") from None


def _write_state(staging: Path, state: TrainState) -> None:
    """Write the arrays of a state: of its model, of its optimizer, and the trained weights."""
    save_model(state.model, staging / "model.safetensors")
    for name, tree in (("optimizer", state.optimizer.state), ("raw", state.ema)):
        if tree:  # sorted: the same state, the same file
            arrays = dict(sorted(tree_flatten(tree)))
            mx.save_safetensors(str(staging / f"{name}.safetensors"), arrays)


def _write_manifest(staging: Path) -> None:
    """List the size and sha256 of each file in manifest.json; all are on the disk afterwards."""
    for file in staging.iterdir():
        files.fsync(file)
    manifest = {
        f.name: {"bytes": f.stat().st_size, "sha256": files.sha256_file(f)}
        for f in staging.iterdir()
    }
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (staging / "manifest.json", staging):
        files.fsync(path)


NOT_AS_WRITTEN = "manifest.json or config.json is not what was written"
NEEDED = {"model.safetensors", "optimizer.safetensors", "config.json"}


def find_corruption(checkpoint: Path) -> str | None:
    """Return why the checkpoint cannot be trusted, or None when each file is as it was written.

    Raises UserError for a file that may not be read: it may be as it was written.
    """
    if not checkpoint.is_dir():
        return f"{checkpoint.name} is not there"
    try:
        manifest = files.parse_json((checkpoint / "manifest.json").read_text())
        if not _is_manifest(manifest):
            return NOT_AS_WRITTEN
        changes = (runs.find_change(checkpoint / name, manifest[name]) for name in manifest)
        if change := next(filter(None, changes), None):
            return change
        config = files.parse_json((checkpoint / "config.json").read_text())
    except PermissionError as error:
        raise unreadable(error) from None
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except ValueError:
        return NOT_AS_WRITTEN
    if not isinstance(config, dict) or "step" not in config:
        return NOT_AS_WRITTEN
    if config["step"] != int(checkpoint.name[5:]):
        return "config.json names another step"
    missing = NEEDED - manifest.keys()
    return f"manifest.json lacks {', '.join(sorted(missing))}" if missing else None


def unreadable(error: PermissionError) -> UserError:
    """Return the error of a file of a run that may not be read; nothing has been changed."""
    return UserError(
        f"{error.filename} cannot be read: {error.strerror}; allow it (chmod u+r), and the same "
        "command continues"
    )


def _is_manifest(content: object) -> bool:
    """Test whether a parsed manifest.json has an entry for each file."""
    return isinstance(content, dict) and all(map(runs.is_entry, content.values()))


def newest_valid(run: Path) -> int:
    """Return the step of the newest valid checkpoint, 0 before any; set damaged ones aside.

    Raises NoValidCheckpoint when none of the checkpoints is valid, or when they are gone: a run
    never starts anew silently.
    """
    candidates = runs.steps(run)
    for step in reversed(candidates):
        if not (reason := find_corruption(checkpoint_folder(run, step))):
            return step
        aside = checkpoint_folder(run, step).rename(free_path(run, f"damaged-{step:06d}"))
        warn(f"checkpoint {step} is damaged, kept as {aside.name}: {reason}")
    if candidates or any(run.glob("damaged-[0-9]*")):
        raise NoValidCheckpoint(
            f"{run} has no valid checkpoint left; set RUN_NAME to start another run"
        )
    if (run / "metrics.jsonl").exists() and any((run / f).exists() for f in (SAVED, "best.json")):
        raise NoValidCheckpoint(
            f"{run} had checkpoints, and they are gone. Put one back to continue; to start anew, "
            f"set RUN_NAME, or move {run / 'metrics.jsonl'} elsewhere, which would be replaced"
        )
    return 0


def load(run: Path, step: int, state: TrainState) -> None:
    """Put the checkpoint of `step` into `state`, before the step is compiled.

    Call it within ema_applied(state): model.safetensors has the averaged weights, raw.safetensors
    the trained ones. Raises UserError.
    """
    source = checkpoint_folder(run, step)
    weights = _arrays_like(state.model.parameters(), source / "model.safetensors")
    state.optimizer.state = _arrays_like(state.optimizer.state, source / "optimizer.safetensors")
    if state.ema:
        state.ema.update(_arrays_like(state.ema, source / "raw.safetensors"))
    state.model.update(weights)


def _arrays_like(tree, file: Path):
    """Return the file's arrays as such a tree. Raises UserError naming each one that differs."""
    arrays = read_arrays(file)[0]
    expected = dict(tree_flatten(tree))
    differ = []
    for name in sorted(expected.keys() | arrays.keys()):
        have, need = (
            f"{d[name].shape} {str(d[name].dtype)[9:]}" if name in d else "absent"
            for d in (arrays, expected)
        )
        if have != need:
            differ.append(f"`{name}` is {have}, must be {need}")
    if differ:
        raise UserError(f"{file} is not this model's: {'; '.join(differ)}")
    if not _finite(arrays.items()):
        raise UserError(f"{file} holds numbers that are not finite")
    return tree_unflatten(list(arrays.items()))


def _finite(named: Iterable[tuple[str, mx.array]]) -> bool:
    return all(mx.all(mx.isfinite(array)).item() for _, array in named)


def read_info(run: Path, step: int) -> dict:
    """Return config.json of a checkpoint: step, settings, data, versions."""
    return files.parse_json((checkpoint_folder(run, step) / "config.json").read_text())


def settings_changes(old: dict, new: dict) -> dict[str, str]:
    """Describe each value of `new` that `old` does not have, by name: "SEED: there 1, here 2"."""
    return {k: f"{k}: there {old.get(k)}, here {v}" for k, v in new.items() if old.get(k) != v}


# ------------------------------------------------------------------------------------------- disk


def max_checkpoints(s: Settings, n_steps: int) -> int:
    """Return how many checkpoints lie on the disk at once, at most, in a run of `n_steps`.

    They are the latest ones, the best, and the one being written. SAVE_MINUTES may add to a short
    run: each save checks its own space.
    """
    n_saves = n_steps // s.SAVE_FREQ + n_steps // s.EVAL_FREQ + 1
    return min(s.KEEP_CHECKPOINTS + 2, n_saves)


def check_space(run: Path, state: TrainState, count: int) -> None:
    """Raise UserError unless `count` checkpoints of `state` fit on the disk of `run`."""
    size = sum(array.nbytes for _, array in tree_flatten(state.trees()))
    free = shutil.disk_usage(run).free
    if free < count * size * 1.05:
        raise UserError(
            f"{run}: {free / 1e6:,.0f} MB free on its disk, {count * size / 1e6:,.0f} MB needed "
            f"for checkpoints ({count:,}); make room, or lower KEEP_CHECKPOINTS (at least 1)"
        )


def versions() -> dict:
    """Return what must be the same for two runs to be equal bit by bit, beside their settings."""
    return {
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(mx.default_device()),
    }
