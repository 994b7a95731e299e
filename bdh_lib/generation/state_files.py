"""Files of states, from which generation can continue later."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from bdh_lib import files
from bdh_lib.compute.arrays import read_arrays, sha256_arrays
from bdh_lib.compute.state import WINDOW_PARTS, State, check_model, check_state, flush_buffer
from bdh_lib.errors import UserError
from bdh_mlx import BDH

STATE_FORMAT = "bdh-mlx state 3"


def weights_sha256(model: BDH) -> str:
    """Return the sha256 of the weights, which identifies the model of a state."""
    return sha256_arrays(dict(tree_flatten(model.parameters())))


def check_state_file(path: str | Path) -> Path:
    """Expand the `path` of a state to save. Raises UserError if it is certain to fail."""
    if (path := files.expand_user(path, "the path of a state")).suffix != ".safetensors":
        raise UserError(f"{path} not saved: name a .safetensors file")
    files.check_parent(path, f"{path} not saved:")
    if path.exists() and not _is_state(path):  # weights, say
        raise UserError(f"{path} not saved: it exists and holds no state; name another file")
    return path


def _is_state(path: Path) -> bool:
    try:  # reads no arrays
        _, header = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError):
        return False
    return header.get("format") == json.dumps(STATE_FORMAT)


def save_state(path: str | Path, model: BDH, state: State) -> None:
    """Write `state` of `model` to a .safetensors file, atomically. Raises UserError."""
    path = check_state_file(path)
    check_model(model)
    check_state(model, state)
    if not state or not state.position:
        raise UserError(f"{path} not saved: the state is of no byte; read a text first")
    state = flush_buffer(state)
    arrays = {f"synapses.{i}": S for i, S in enumerate(state.synapses)}
    for p, part in enumerate(state.parts):
        arrays |= {f"part.{p}.{i}": S for i, S in enumerate(part)}
    header = {"format": STATE_FORMAT, "model": weights_sha256(model), "position": state.position}
    header |= {"window": state.window, "parts": len(state.parts)}
    header |= {"sha256": sha256_arrays(arrays, header)}
    header = {name: json.dumps(value) for name, value in header.items()}
    with files.atomic_writer(path) as temporary:
        mx.save_safetensors(str(temporary), arrays, metadata=header)


def load_state(path: str | Path, model: BDH) -> State:
    """Load what `save_state` wrote. Raises UserError if it is damaged or another model's."""
    path = files.expand_user(path, "the path of a state")
    if not path.is_file():
        reason = "it is not a regular file" if path.exists() else "there is no such file"
        reason = "it is a folder" if path.is_dir() else reason
        raise UserError(f"{path} cannot be read: {reason}")
    arrays, header = read_arrays(path)
    header = _parse_header(path, header)
    check_model(model)
    digest = header.pop("sha256", None)
    if sha256_arrays(arrays, header) != digest:
        raise UserError(f"{path} is damaged: it has changed since it was written (sha256)")
    if (saved := header.get("model")) != (current := weights_sha256(model)):
        raise UserError(
            f"{path} was read by another model (weights {str(saved)[:12]}, here {current[:12]}); "
            "load it with that one, or read its text again"
        )
    synapses, *parts = _arrays_by_part(path, arrays, header["parts"], model)
    return State(header["position"], header["window"], synapses, tuple(parts))


def _parse_header(path: Path, header: dict[str, str]) -> dict:
    """Return the values of a state's header. Raises UserError for that of another file."""
    try:
        header = {name: files.parse_json(value) for name, value in header.items()}
    except ValueError:
        header = {}
    kind, position, window, count = map(header.get, ("format", "position", "window", "parts"))
    valid = all(type(n) is int and n >= 0 for n in (position, window or 0))
    if kind != STATE_FORMAT or not valid or count not in range(WINDOW_PARTS + 1):
        raise UserError(f"{path} is not a state file ({STATE_FORMAT!r} in its header)")
    return header


def _arrays_by_part(path: Path, arrays: dict, count: int, model: BDH) -> list[tuple]:
    """Return the synapses and then each part, an array for each layer. Raises UserError."""
    H, D, N = model.encoder.shape
    prefixes = ["synapses", *(f"part.{p}" for p in range(count))]
    names = [[f"{prefix}.{i}" for i in range(model.config.n_layer)] for prefix in prefixes]
    expected = [n for n in names if n[0] in arrays or n is names[0]]  # a new part is empty
    if {name for group in expected for name in group} != arrays.keys() or any(
        (S.shape[0], *S.shape[2:], S.dtype) != (H, N, D, mx.float32) for S in arrays.values()
    ):
        raise UserError(f"{path} is damaged: arrays of ({H}, B, {N}, {D}) are missing in it")
    return [tuple(arrays[n] for n in group if n in arrays) for group in names]
