"""Checkpoints on disk: run/step-000500 is complete or absent, run/best.json names the best."""

import json
import platform
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from bdh_mlx import BDH, UserError, load_model, save_model


def steps(run: Path) -> list[int]:
    """Steps with a checkpoint in `run`, ascending."""
    return sorted(int(f.name[5:]) for f in run.glob("step-*") if f.name[5:].isdigit())


def folder(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def save(run: Path, step: int, model: BDH, optimizer, info: dict) -> None:
    """Write the checkpoint of `step` under another name, then rename it into place."""
    final = folder(run, step)
    making = run / f".{final.name}.tmp"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    save_model(model, making / "model.safetensors")
    mx.save_safetensors(str(making / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
    write_json(making / "config.json", {"step": step} | info)
    shutil.rmtree(final, ignore_errors=True)
    making.replace(final)


def load(run: Path, step: int, model: BDH, optimizer) -> None:
    """Put checkpoint `step` into model and optimizer; call it before compiling the step."""
    saved = load_model(folder(run, step))
    model.update(saved.parameters())
    state = mx.load(str(folder(run, step) / "optimizer.safetensors"))
    mx.eval(state)  # mx.load is lazy
    optimizer.state = tree_unflatten(list(state.items()))


def read_info(run: Path, step: int) -> dict:
    """config.json of the checkpoint: step, settings, model, data, versions."""
    file = folder(run, step) / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def read_best(run: Path) -> dict:
    """The best evaluation so far (checkpoint, step, val_loss in nats); {} before any."""
    return json.loads((run / "best.json").read_text()) if (run / "best.json").exists() else {}


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` and the best."""
    best = read_best(run).get("step")
    for step in steps(run)[:-keep]:
        if step != best:
            shutil.rmtree(folder(run, step))


def versions() -> dict:
    """What a run is bitwise repeatable on: the same of each."""
    return {
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(mx.default_device()),
    }


def write_json(path: Path, content: dict) -> None:
    """Replace the file at once: a reader finds the old or the new content, never a part."""
    making = path.with_name(f".{path.name}.tmp")
    making.write_text(json.dumps(content, indent=1))
    making.replace(path)
