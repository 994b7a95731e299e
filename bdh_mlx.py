"""BDH (Baby Dragon Hatchling), a byte-level language model, in MLX.

Source: "The Dragon Hatchling", arXiv 2509.26507, in the form of its released code (pathwaycom/bdh,
bdh.py @714bc80), whose parameter names and shapes are kept so that weights load one to one.

One layer, the same weights in each; ln is LayerNorm without parameters, R_t rotates by position t:

    x_t = relu(v_t Dx)                                which neurons the byte excites, per head
    a_t = sum over s < t of (R_t x_t . R_s x_s) v_s   what they recall: attention without softmax
    y_t = relu(ln(a_t) Dy) * x_t                      which of them fire, given the memory
    v_t = ln(v_t + ln(sum over heads of y_t E))       back to D numbers

No softmax, so a_t = (R_t x_t) S_t with synapses S_t = sum over s < t of (R_s x_s) v_s^T, a state of
fixed size. Reading a block at once, in chunks, or byte by byte is one function (state.py).

    B batch   T bytes   D n_embd   H heads   N neurons per head   L layers   V vocabulary
    paper's Dx, Dy: `encoder`, `encoder_v` (H, D, N)   paper's E: `decoder` (H*N, D)
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

# CUDA: MLX counts the graphs it has met and gives up at 800 (its lru_cache.h); evaluating and
# sampling between steps meet more.
os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "4000")
os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")

import fast_blas  # noqa: F401  before mlx.core: it replaces the slow BLAS of MLX on Linux

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import files
import writing
from errors import UserError
from fast_layer import Compute, dropout_mask, factor, layer, ln, rotate
from sampling import Sampling
from state import PARTS, State, fold, read


@dataclass(frozen=True)
class BDHConfig:
    """Shape of a model. Raises UserError naming the wrong field, its value and the limit."""

    n_layer: int = 6  # times the shared layer is applied
    n_embd: int = 256  # D, numbers per byte between layers
    dropout: float = 0.1  # share of firing neurons silenced, in training only
    n_head: int = 4  # H, groups of neurons with an attention of their own
    mlp_internal_dim_multiplier: int = 128  # neurons per number of n_embd, over all heads
    vocab_size: int = 256  # one entry per byte value
    dropout_v: float = 0.0  # share of the embedding, and of what a layer adds to v, silenced too

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if "dropout" not in field.name and (type(value) is not int or value < 1):
                raise UserError(
                    f"{field.name} is {value!r}; it must be a whole number of 1 or more"
                )
        for name in ("dropout", "dropout_v"):
            if not 0 <= (rate := getattr(self, name)) < 1:
                raise UserError(f"{name} is {rate!r}; it must be at least 0 and below 1")
        neurons = self.n_embd * self.mlp_internal_dim_multiplier
        if neurons % self.n_head:
            raise UserError(
                f"n_head is {self.n_head}; it must divide the number of neurons, "
                f"n_embd * mlp_internal_dim_multiplier = {neurons}"
            )
        if self.neurons_per_head % 2:
            raise UserError(
                f"n_head is {self.n_head}, so each head has N = {self.neurons_per_head} neurons; "
                "N must be even, since they rotate in pairs"
            )

    @property
    def neurons_per_head(self) -> int:
        """N."""
        return self.n_embd * self.mlp_internal_dim_multiplier // self.n_head

    @property
    def n_parameters(self) -> int:
        """Numbers in the five arrays."""
        neurons = self.n_head * self.neurons_per_head
        return (3 * neurons + 2 * self.vocab_size) * self.n_embd


def attention_quadratic(q: mx.array, v: mx.array) -> mx.array:
    """The definition, T x T scores: the reference that every faster form is tested against.

    q (H, B, T, N) rotated activations, v (B, T, D) values; gives (H, B, T, D). t reads s < t.
    """
    return mx.tril(q @ q.swapaxes(-1, -2), -1) @ v


class BDH(nn.Module):
    """A model with fresh weights; the five arrays are its only parameters.

    model(idx, targets) -> (logits (B, T, V), mean loss in nats or None); both (B, T) integers.
    Dropout acts where a PRNG `key` is given and nowhere else: there is no mode to forget.
    """

    def __init__(self, config: BDHConfig):
        super().__init__()
        D, H, N = config.n_embd, config.n_head, config.neurons_per_head
        self.config = config
        self.compute = Compute(chunk=max(128, 2 * D))
        self.trained_length: int | None = None  # BLOCK_SIZE of its training, where that is known
        self.embed = nn.Embedding(config.vocab_size, D)
        self.embed.weight = mx.random.normal((config.vocab_size, D)) * 0.02
        self.encoder = mx.random.normal((H, D, N)) * 0.02
        self.encoder_v = mx.random.normal((H, D, N)) * 0.02
        self.decoder = mx.random.normal((H * N, D)) * 0.02
        self.lm_head = mx.random.normal((D, config.vocab_size)) * 0.02

    def __call__(self, idx, targets=None, key=None):
        """See above; computed as `self.compute` says, by layers with a gradient of their own."""
        H, D = self.config.n_head, self.config.n_embd
        weights = (self.encoder, self.encoder_v, self.decoder.reshape(H, -1, D))
        v = ln(self.embed(idx))  # (B, T, D)
        L, rates = self.config.n_layer, (self.config.dropout, self.config.dropout_v)
        if key is not None and self.config.dropout_v:
            v = v * factor(dropout_mask(mx.random.split(key, L + 1)[L], rates[1], v.shape), v.dtype)
        for key_l in [None] * L if key is None else mx.random.split(key, L):
            v = layer(v, *weights, self.compute, key_l, *rates)
        logits = v @ self.lm_head
        if targets is None:
            return logits, None
        return logits, nn.losses.cross_entropy(logits, targets, reduction="mean")

    def read(self, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
        """Read idx (B, T) on from `state`; gives logits (B, T, V) and the new State. No dropout."""
        return read(self, idx, state)

    def quadratic(self, idx: mx.array, targets=None):
        """The definition, layer by layer, the reference for all else: as __call__, no dropout."""
        v = ln(self.embed(idx))  # (B, T, D)
        for _ in range(self.config.n_layer):
            v = self.layer(v)
        logits = v @ self.lm_head
        if targets is None:
            return logits, None
        return logits, nn.losses.cross_entropy(logits, targets, reduction="mean")

    def layer(self, v: mx.array) -> mx.array:
        """v (B, T, D) through the equations above; the batch is folded into the GEMMs' rows."""
        B, T, D = v.shape
        H, N = self.config.n_head, self.config.neurons_per_head
        x = nn.relu(v.reshape(1, B * T, D) @ self.encoder)  # (H, B*T, N)
        a = attention_quadratic(rotate(x.reshape(H, B, T, N)), v)
        y = nn.relu(ln(a).reshape(H, B * T, D) @ self.encoder_v) * x  # (H, B*T, N)
        out = (y @ self.decoder.reshape(H, N, D)).sum(0)  # (B*T, D)
        return ln(v + ln(out).reshape(B, T, D))

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, key=None) -> mx.array:
        """idx (B, T >= 1) and max_new_tokens bytes more, (B, T + new).

        temperature 0 takes the likeliest byte; top_k draws among the k likeliest. Without `key` the
        draws follow mx.random.seed. Raises UserError for an empty prompt or impossible settings.
        """
        if key is None:
            key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        sampling = Sampling(temperature=temperature, top_k=top_k)
        begun = writing.read(self, idx)
        written = writing.write(self, *begun, sampling, key, np.array(idx))
        new = (mx.array(token, idx.dtype) for token, _ in islice(written, max_new_tokens))
        return mx.concatenate([idx, *(token[:, None] for token in new)], 1)


def save_model(model: BDH, path: str | Path) -> None:
    """Write the weights under their official names, the configuration into the header."""
    header = {name: str(value) for name, value in asdict(model.config).items()}
    mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())), metadata=header)


STATE_FORMAT = "bdh-mlx state 2"


def fingerprint(model: BDH) -> str:
    """sha256 of the weights, which says whose state a state is."""
    return _digest(dict(tree_flatten(model.parameters())))


def _digest(arrays: dict[str, mx.array], header: dict | None = None) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode() if header else b"")
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.array(array + 0))  # a copy: CUDA would move what is read to the host
    return digest.hexdigest()


def state_file(path: str | Path) -> Path:
    """`path`, if a state can be saved there, as far as can be told before. Raises UserError."""
    if (path := Path(path)).suffix != ".safetensors":
        raise UserError(f"{path} not saved: name a .safetensors file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} not saved: {path.parent} is no folder that can be written to")
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
    """Write `state` of `model` to a .safetensors file, whole or not at all. Raises UserError."""
    path, state = state_file(path), fold(state)
    arrays = {f"synapses.{i}": S for i, S in enumerate(state.synapses)}
    for number, part in enumerate(state.parts):
        arrays |= {f"part.{number}.{i}": S for i, S in enumerate(part)}
    header = {"format": STATE_FORMAT, "model": fingerprint(model), "position": state.position}
    header |= {"window": state.window, "parts": len(state.parts)}
    header |= {"sha256": _digest(arrays, header)}
    header = {name: json.dumps(value) for name, value in header.items()}
    making = path.with_name(f".{path.name}.tmp.safetensors")
    try:
        mx.save_safetensors(str(making), arrays, metadata=header)
        making.replace(path)
    except (OSError, RuntimeError) as error:
        making.unlink(missing_ok=True)
        raise UserError(f"{path} not saved: {error}") from None


def load_state(path: str | Path, model: BDH) -> State:
    """The state that `save_state` wrote. Raises UserError if it is damaged or another model's."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} cannot be read: there is no such file")
    arrays, header = read_arrays(path)
    try:
        header = {name: json.loads(value) for name, value in header.items()}
    except ValueError:
        header = {}
    kind, position, window, count = map(header.get, ("format", "position", "window", "parts"))
    written = header.pop("sha256", None)
    whole = all(type(n) is int and n >= 0 for n in (position, window or 0))
    if kind != STATE_FORMAT or not whole or count not in range(PARTS + 1):
        raise UserError(f"{path} is no state file ({STATE_FORMAT!r} in its header)")
    if (other := header.get("model", "none")) != (mine := fingerprint(model)):
        raise UserError(
            f"{path} was read by another model (weights {other[:12]}, here {mine[:12]}); "
            "load it with that one, or read its text again"
        )
    H, D, N = model.encoder.shape
    prefixes = ["synapses", *(f"part.{number}" for number in range(count))]
    names = [[f"{prefix}.{i}" for i in range(model.config.n_layer)] for prefix in prefixes]
    known = [of for of in names if of[0] in arrays or of is names[0]]  # a new part is empty
    if {name for of in known for name in of} != arrays.keys() or any(
        (S.shape[0], *S.shape[2:], S.dtype) != (H, N, D, mx.float32) for S in arrays.values()
    ):
        raise UserError(f"{path} is damaged: arrays of ({H}, B, {N}, {D}) are missing in it")
    if _digest(arrays, header) != written:
        raise UserError(f"{path} is damaged: it has changed since it was written (sha256)")
    synapses, *parts = (tuple(arrays[n] for n in of if n in arrays) for of in names)
    return State(position, window, synapses, tuple(parts))


def find_weights(path: str | Path) -> Path:
    """The weights file that `path` means: itself, a checkpoint's, a run's best or last."""
    path = files.expanded(path)
    if path.is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    found = path.glob("step-*/model.safetensors")
    steps = sorted(
        (f for f in found if f.parent.name[5:].isdigit()), key=lambda f: int(f.parent.name[5:])
    )
    best = [f for f in steps if f.parent.name == _best_of(path)]
    for weights in dict.fromkeys([*best, *reversed(steps)]):
        if not _changed(weights):
            return weights
        print(f"warning: {weights} is damaged, taking the next", file=sys.stderr)
    what = (
        "has no checkpoint (step-000500/model.safetensors) in it"
        if path.exists()
        else "does not exist"
    )
    raise UserError(f"{path} {what}; name a run folder, a checkpoint or a .safetensors file")


def _best_of(run: Path) -> str | None:
    """Name of the checkpoint that a run's best.json names, None if there is no such file."""
    try:
        return json.loads((run / "best.json").read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changed(weights: Path) -> bool:
    """Whether weights differ from the sha256 in the manifest beside them, if there is one."""
    try:
        manifest = json.loads(weights.with_name("manifest.json").read_text())
        return manifest[weights.name]["sha256"] != files.sha256(weights)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        return True


def read_arrays(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays and header of a .safetensors file. Raises UserError for a damaged or crafted one.

    MLX accepts arrays that overlap or leave bytes unused; the format does not, nor does this.
    """
    try:
        arrays, header = mx.load(str(file), format="safetensors", return_metadata=True)
        mx.eval(arrays)  # mx.load is lazy: read now, or a later change of the file is read
        with file.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
            entries = json.loads(start.read(size))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    spans = sorted(e["data_offsets"] for name, e in entries.items() if name != "__metadata__")
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    if [*begins, file.stat().st_size - 8 - size] != [0, *ends]:
        raise UserError(f"{file} cannot be read: its arrays overlap or leave gaps")
    return arrays, header


def load_model(path: str | Path) -> BDH:
    """The model saved at `path`: a .safetensors file, a checkpoint folder or a run folder.

    Official weights load as they are; `attn.freqs` and `_orig_mod.` prefixes are dropped. Shapes
    come from the arrays, the number of layers, which no array shows, from the header, else it is 6.
    Raises UserError for a missing or damaged file and for arrays that are not a BDH's.
    """
    file = find_weights(path)
    if _changed(file):
        raise UserError(f"{file} has changed since it was written (sha256 in manifest.json)")
    arrays, header = read_arrays(file)
    arrays = {name.removeprefix("_orig_mod."): array for name, array in arrays.items()}
    arrays.pop("attn.freqs", None)
    model = BDH(_config_of(arrays, header, file))
    wanted = dict(tree_flatten(model.parameters()))
    for name in sorted(wanted.keys() | arrays.keys()):
        found, needed = (a[name].shape if name in a else "nothing" for a in (arrays, wanted))
        if found != needed:
            raise UserError(f"{file}: `{name}` is {found}, a BDH of this shape needs {needed}")
    model.load_weights([(name, array.astype(mx.float32)) for name, array in arrays.items()])
    mx.eval(model.parameters())
    length = settings_of(file).get("BLOCK_SIZE")
    model.trained_length = length if type(length) is int else None
    return model


def settings_of(weights: Path) -> dict:
    """The trainer's settings, from config.json beside the weights; {} where there are none."""
    try:
        return dict(json.loads(weights.with_name("config.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):  # weights from elsewhere lack it
        return {}


def _config_of(arrays: dict, header: dict, file: Path) -> BDHConfig:
    if "encoder" not in arrays or "embed.weight" not in arrays or arrays["encoder"].ndim != 3:
        raise UserError(f"{file} holds no BDH: it has {', '.join(sorted(arrays)) or 'no arrays'}")
    H, D, N = arrays["encoder"].shape
    try:
        n_layer = int(header.get("n_layer", BDHConfig.n_layer))
        dropout = float(header.get("dropout", BDHConfig.dropout))
    except ValueError:
        raise UserError(f"{file}: n_layer or dropout in its header is not a number") from None
    if n_layer > 1000:  # would take the memory and the time of whoever opens it
        raise UserError(f"{file}: n_layer is {n_layer} in its header, at most 1,000 is believed")
    if 0 in (H, D, N):
        raise UserError(f"{file}: `encoder` is {(H, D, N)}; no dimension can be 0")
    return BDHConfig(
        n_layer=n_layer,
        n_embd=D,
        dropout=dropout,
        n_head=H,
        mlp_internal_dim_multiplier=H * N // D,
        vocab_size=arrays["embed.weight"].shape[0],
    )
