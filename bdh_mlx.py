"""BDH (Baby Dragon Hatchling), a byte-level language model, in MLX.

Source: "The Dragon Hatchling", arXiv 2509.26507, in the form of its released code (pathwaycom/bdh,
bdh.py @714bc80), whose parameter names and shapes are kept so that weights load one to one.

One layer, the same weights in each; ln is LayerNorm without parameters, R_t rotates by position t:

    x_t = relu(v_t Dx)                                neurons that the byte excites, per head
    a_t = sum over s < t of (R_t x_t . R_s x_s) v_s   linear attention, without softmax
    y_t = relu(ln(a_t) Dy) * x_t                      excited neurons that fire
    o_t = sum over heads of y_t E                     back to D numbers
    v_t = ln(v_t + ln(o_t))

Without softmax, a_t = (R_t x_t) S_t, where the synapses S_t = sum over s < t of (R_s x_s)^T v_s are
a state of fixed size. Reading a text at once, in chunks or byte by byte gives the same result
(bdh_lib/compute/state.py).

    B batch   T bytes   D n_embd   H heads   N neurons per head   L layers   V vocabulary
    paper's Dx, Dy: `encoder`, `encoder_v` (H, D, N)   paper's E: `decoder` (H*N, D)
    bytes to v: `embed.weight` (V, D)   the last v to logits: `lm_head` (D, V)
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import bdh_lib.compute  # noqa: F401  before mlx.core: it opens a fast BLAS on Linux

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bdh_lib import files, runs
from bdh_lib.compute.arrays import read_arrays
from bdh_lib.compute.layer import default_compute, dropout_mask, dropout_scale, layer, ln
from bdh_lib.compute.rope import rotate
from bdh_lib.compute.state import (
    State,
    check_prompt,
    check_shape,
    check_state,
    prefill,
    read_unchecked,
)
from bdh_lib.errors import UserError, warn
from bdh_lib.rules import TEMPERATURE, TOP_K, CheckedConfig, check, integer


@dataclass(frozen=True)
class BDHConfig(CheckedConfig):
    """The shape of a model, and its dropout. Raises UserError that names a wrong field."""

    n_layer: int = 6  # times the shared layer is applied
    n_embd: int = 256  # D, dimension of v
    dropout: float = 0.1  # fraction of y dropped, in training only
    n_head: int = 4  # H, attention heads
    mlp_internal_dim_multiplier: int = 128  # H * N / D
    vocab_size: int = 256  # V, one entry per byte value: for training leave it at 256
    dropout_v: float = 0.0  # fraction of ln(o) and of the embedding dropped, in training only

    @property
    def neurons_per_head(self) -> int:
        """Return N, the neurons of one head."""
        return self.n_embd * self.mlp_internal_dim_multiplier // self.n_head

    @property
    def n_parameters(self) -> int:
        """Return the number of parameters in the five arrays."""
        neurons = self.n_head * self.neurons_per_head
        return (3 * neurons + 2 * self.vocab_size) * self.n_embd


def attention_quadratic(q: mx.array, v: mx.array) -> mx.array:
    """Return attention as it is defined, with T x T scores: the reference for all faster forms.

    q (H, B, T, N) are rotated activations, v (B, T, D) values; the result is (H, B, T, D). A byte t
    reads only bytes s < t.
    """
    return mx.tril(q @ q.swapaxes(-1, -2), -1) @ v


class BDH(nn.Module):
    """A model with random weights; its only parameters are the five arrays.

    model(idx, targets) returns logits (B, T, V) and the mean loss in nats, None without targets;
    idx and targets are (B, T) integers. The trainer takes its loss from byte_losses in
    bdh_lib/loss.py, not from here. Dropout acts only if a PRNG `key` is passed: there is no train
    or eval mode.
    """

    def __init__(self, config: BDHConfig):
        super().__init__()
        D, H, N = config.n_embd, config.n_head, config.neurons_per_head
        self.config = config
        self.compute = default_compute(H, D)
        self.trained_length: int | None = None  # BLOCK_SIZE of its training, if known
        # a cache of weights laid out to read byte by byte (compute/state.py); None frees it
        self.decode_step = None
        self.embed = nn.Embedding(config.vocab_size, D)
        self.embed.weight = mx.random.normal((config.vocab_size, D)) * 0.02
        self.encoder = mx.random.normal((H, D, N)) * 0.02
        self.encoder_v = mx.random.normal((H, D, N)) * 0.02
        self.decoder = mx.random.normal((H * N, D)) * 0.02
        self.lm_head = mx.random.normal((D, config.vocab_size)) * 0.02

    def weights(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return the paper's Dx, Dy (H, D, N) and E (H, N, D), which every layer shares."""
        H, D, N = self.encoder.shape
        return self.encoder, self.encoder_v, self.decoder.reshape(H, N, D)

    def __call__(
        self, idx: mx.array, targets: mx.array | None = None, key: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """Return logits and loss as the class says; `self.compute` says how layers are computed.

        Raises UserError for an idx that is not of shape (B, T).
        """
        check_shape(idx)
        L, dropout_v = self.config.n_layer, self.config.dropout_v
        keys = [None] * (L + 1) if key is None else mx.random.split(key, L + 1)
        v = ln(self.embed(idx))  # (B, T, D)
        if key is not None and dropout_v:
            v = v * dropout_scale(dropout_mask(keys[L], dropout_v, v.shape), v.dtype)
        for key_l in keys[:L]:
            v = layer(v, self.weights(), self.compute, key_l, self.config.dropout, dropout_v)
        return self._logits_and_loss(v, targets)

    def _logits_and_loss(
        self, v: mx.array, targets: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Return logits (B, T, V) and mean loss in nats (or None) of the last v (B, T, D)."""
        logits = v @ self.lm_head
        if targets is None:
            return logits, None
        return logits, nn.losses.cross_entropy(logits, targets, reduction="mean")

    def read(self, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
        """Read idx (B, T) after `state`; return logits (B, T, V) and the new State.

        It is the forward pass without dropout, continued from what was read before. Raises
        UserError for an idx or a state that does not fit the model.
        """
        check_state(self, state)
        return read_unchecked(self, check_prompt(self, idx), state)

    def quadratic(
        self, idx: mx.array, targets: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """Return what __call__ returns, computed by the definition, without dropout.

        Tests compare all faster forms with it; training runs bdh_lib/compute/layer.py.
        """
        v = ln(self.embed(idx))  # (B, T, D)
        for _ in range(self.config.n_layer):
            v = self.quadratic_layer(v)
        return self._logits_and_loss(v, targets)

    def quadratic_layer(self, v: mx.array) -> mx.array:
        """Apply the layer to v (B, T, D) by the equations at the top."""
        Dx, Dy, E = (weights[:, None] for weights in self.weights())  # (H, 1, ...), for each row
        x = nn.relu(v @ Dx)  # (H, B, T, N)
        a = attention_quadratic(rotate(x), v)  # (H, B, T, D)
        y = nn.relu(ln(a) @ Dy) * x
        o = (y @ E).sum(0)  # (B, T, D)
        return ln(v + ln(o))

    def generate(
        self,
        idx: mx.array,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        """Append max_new_tokens bytes to idx (B, T >= 1) and return (B, T + max_new_tokens).

        temperature 0 takes the likeliest byte; top_k samples from the k likeliest. Without a PRNG
        `key`, mx.random.seed decides the draws. Raises UserError for an empty prompt or invalid
        settings.
        """
        check("max_new_tokens", max_new_tokens, integer(0, 10**12))
        check("temperature", temperature, TEMPERATURE)
        check("top_k", top_k, TOP_K)
        key = mx.random.key(mx.random.randint(0, 2**31 - 1).item()) if key is None else key
        idx = check_prompt(self, idx)
        logits, state = prefill(self, idx)  # (B, V)
        for _ in range(max_new_tokens):
            if top_k is not None and top_k < logits.shape[1]:
                threshold = mx.topk(logits, top_k).min(1, keepdims=True)
                logits = mx.where(logits < threshold, -mx.inf, logits)
            key, key_t = mx.random.split(key)
            if temperature:
                token = mx.random.categorical(logits / temperature, key=key_t)
            else:
                token = mx.argmax(logits, 1)
            idx = mx.concatenate([idx, token[:, None].astype(idx.dtype)], 1)
            logits, state = read_unchecked(
                self, token[:, None], state
            )  # one read more than is needed
            logits = logits[:, -1]
            mx.async_eval(idx, state)  # otherwise all bytes would be one graph
        return idx


def save_model(model: BDH, path: str | Path) -> None:
    """Write the weights under their official names, with the configuration in the header.

    Raises UserError if the file cannot be written; an earlier file then stays unchanged.
    """
    path = files.expand_user(path, "the path of a model")
    if path.suffix != ".safetensors":  # MLX would add it
        raise UserError(f"{path} not saved: name a .safetensors file")
    header = {name: json.dumps(value) for name, value in asdict(model.config).items()}
    with files.atomic_writer(path) as temporary:
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(temporary), weights, metadata=header)


def load_model(path: str | Path) -> BDH:
    """Load the model at `path`: a .safetensors file, a checkpoint folder or a run folder.

    Official weights load, too: `attn.freqs` and `_orig_mod.` prefixes are dropped. The arrays give
    the shapes; the header gives the number of layers, 6 if it is not there. Warns of a damaged
    config.json beside the file. Raises UserError for a missing or damaged file, and for arrays that
    are not those of a BDH.
    """
    file = runs.find_weights(path)
    if runs.is_changed(file):
        raise UserError(f"{file} has changed since it was written (sha256 in manifest.json)")
    arrays, header = read_arrays(file)
    arrays = {name.removeprefix("_orig_mod."): array for name, array in arrays.items()}
    arrays.pop("attn.freqs", None)
    model = BDH(_infer_config(arrays, header, file))
    parameters = dict(tree_flatten(model.parameters()))
    for name in sorted(parameters.keys() | arrays.keys()):
        shape, expected = (a[name].shape if name in a else "nothing" for a in (arrays, parameters))
        if shape != expected:
            raise UserError(f"{file}: `{name}` is {shape}, a BDH of this shape needs {expected}")
    model.load_weights([(name, array.astype(mx.float32)) for name, array in arrays.items()])
    mx.eval(model.parameters())
    try:
        model.trained_length = runs.load_settings(file).get("BLOCK_SIZE")
    except UserError as error:
        warn(f"{error}; the settings of the training are unknown")
    return model


def _infer_config(arrays: dict[str, mx.array], header: dict[str, str], file: Path) -> BDHConfig:
    """Return the configuration that the arrays' shapes and the header give. Raises UserError."""
    embedding = arrays.get("embed.weight", mx.array(0))
    if embedding.ndim != 2 or "encoder" not in arrays or arrays["encoder"].ndim != 3:
        raise UserError(f"{file} holds no BDH: it has {', '.join(sorted(arrays)) or 'no arrays'}")
    H, D, N = arrays["encoder"].shape
    if 0 in (H, D, N):
        raise UserError(f"{file}: `encoder` is {(H, D, N)}; no dimension can be 0")
    shape = {"n_embd": D, "n_head": H, "mlp_internal_dim_multiplier": H * N // D}
    shape["vocab_size"] = len(embedding)
    try:
        names = header.keys() & BDHConfig.__dataclass_fields__.keys()
        config = {name: files.parse_json(header[name]) for name in names}
        return BDHConfig(**config | shape)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except ValueError:
        raise UserError(f"{file}: the model's settings in its header are not JSON") from None
