"""Checkpoints on disk. run/step-000500 is complete or absent; run/best.json names the best.

A save writes aside, flushes to the disk, lists each file's size and sha256 in manifest.json, and
only then renames: killed at any moment, it leaves the old checkpoints whole and at most a `.tmp`
folder, which the next start removes. MLX alone would neither flush nor notice a flipped bit.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from bdh_mlx import BDH, UserError, load_model, save_model


class NoneValid(UserError):
    """There are checkpoints, and each is damaged; the trainer exits with code 3."""


# ---------------------------------------------------------------------------------- the run folder


def folder(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def steps(run: Path) -> list[int]:
    """Steps with a checkpoint in `run`, ascending."""
    names = [f.name[5:] for f in run.glob("step-*") if f.is_dir() and not f.is_symlink()]
    return sorted(int(n) for n in names if n.isdigit() and folder(run, int(n)).name[5:] == n)


@contextmanager
def opened(run: Path) -> Iterator[None]:
    """Hold `run` for one trainer, swept of what a killed one left. Raises UserError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{run} cannot be written: {error.strerror}; see CHECKPOINT_DIR") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run} is being trained by another process; set RUN_NAME") from None
        for litter in run.glob(".*.tmp"):
            shutil.rmtree(litter) if litter.is_dir() else litter.unlink()
        yield


def read_best(run: Path) -> dict:
    """The best evaluation so far (checkpoint, step, val_loss in nats); {} before any."""
    return json.loads((run / "best.json").read_text()) if (run / "best.json").exists() else {}


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` and the best."""
    best = read_best(run).get("step")
    for step in steps(run)[:-keep]:
        if step != best:
            shutil.rmtree(folder(run, step))


# ----------------------------------------------------------------------------------- save and load


def save(run: Path, step: int, model: BDH, optimizer, info: dict) -> None:
    """Write the checkpoint of `step`, whole and durable. Raises UserError, the others untouched."""
    final = folder(run, step)
    making = run / f".{final.name}.tmp"
    check_space(run, model, 1)
    if not all(mx.all(mx.isfinite(p)).item() for _, p in tree_flatten(model.parameters())):
        raise UserError(f"{final} not saved: it holds numbers that are not finite")
    try:
        making.mkdir()
        save_model(model, making / "model.safetensors")
        state = dict(tree_flatten(optimizer.state))
        mx.save_safetensors(str(making / "optimizer.safetensors"), state)
        (making / "config.json").write_text(json.dumps({"step": step} | info, indent=1))
        for file in making.iterdir():
            flush(file)
        manifest = {
            f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in making.iterdir()
        }
        (making / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (making / "manifest.json", making):
            flush(path)
        making.rename(final)
        flush(run)
    except (OSError, RuntimeError) as error:  # RuntimeError: MLX could not write
        shutil.rmtree(making, ignore_errors=True)
        raise UserError(f"{final} not saved: {error}; earlier ones are intact") from None


def damage(checkpoint: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None when each file is as it was written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, written in manifest.items():
            if (checkpoint / name).stat().st_size != written["bytes"]:
                return f"{name} is not of the {written['bytes']:,} bytes written"
            if sha256(checkpoint / name) != written["sha256"]:
                return f"{name} has changed since it was written (sha256)"
        if json.loads((checkpoint / "config.json").read_text())["step"] != int(checkpoint.name[5:]):
            return "config.json tells another step"
        if (
            missing := {"model.safetensors", "optimizer.safetensors", "config.json"}
            - manifest.keys()
        ):
            return f"manifest.json lacks {', '.join(sorted(missing))}"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json or config.json is not what was written"


def newest_valid(run: Path) -> int:
    """Step of the newest sound checkpoint, 0 if there is none at all; damaged ones are set aside.

    Raises NoneValid when there are checkpoints but no sound one: never a silent start from nothing.
    """
    found = steps(run)
    for step in reversed(found):
        if not (reason := damage(folder(run, step))):
            return step
        aside = next(p for i in range(10**6) if not (p := run / f"damaged-{step:06d}-{i}").exists())
        folder(run, step).rename(aside)
        print(f"warning: checkpoint {step} is damaged, kept as {aside.name}: {reason}")
    if found or any(run.glob("damaged-*")):
        raise NoneValid(f"{run} has no sound checkpoint left; set RUN_NAME to start another run")
    return 0


def load(run: Path, step: int, model: BDH, optimizer) -> None:
    """Put checkpoint `step` into model and optimizer; call it before compiling the step."""
    model.update(load_model(folder(run, step)).parameters())
    state = mx.load(str(folder(run, step) / "optimizer.safetensors"))
    mx.eval(state)  # mx.load is lazy
    wanted = dict(tree_flatten(optimizer.state))
    for name in sorted(wanted.keys() | state.keys()):
        have, need = (d[name].shape if name in d else None for d in (state, wanted))
        if have != need:
            raise UserError(f"{folder(run, step)}: optimizer `{name}` is {have}, must be {need}")
    optimizer.state = tree_unflatten(list(state.items()))


def read_info(run: Path, step: int) -> dict:
    """config.json of a checkpoint: step, settings, data, versions."""
    return json.loads((folder(run, step) / "config.json").read_text())


# ---------------------------------------------------------------------------------- files and disk


def flush(path: Path) -> None:
    """Have the drive itself keep the file or folder; fsync alone stops at a Mac's drive cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Replace a small file at once: a reader finds the old or the new content, never a part."""
    making = path.with_name(f".{path.name}.tmp")
    making.write_text(text)
    flush(making)
    making.replace(path)


def check_space(run: Path, model: BDH, count: int) -> None:
    """Raise UserError unless `count` checkpoints fit on the disk of `run`."""
    one = 3 * sum(p.nbytes for _, p in tree_flatten(model.parameters()))  # weights, two averages
    free = shutil.disk_usage(run).free
    if free < count * one * 1.05:
        raise UserError(
            f"{run}: {free / 1e6:,.0f} MB free on its disk; {count} checkpoints of "
            f"{one / 1e6:,.0f} MB do not fit; lower KEEP or make room"
        )


def versions() -> dict:
    """What a run is bitwise repeatable on: the same of each."""
    return {
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(mx.default_device()),
    }
