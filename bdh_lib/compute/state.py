"""The recurrent state of a model, updated by many bytes at once (prefill) or one (decoding).

Prefill runs segments through the training layer's forward pass (layer.py), in bounded memory.
Decoding does not rewrite S, 201 MB for six layers, at each byte. A buffer beside S holds the
rotated activations (keys) and values of the last bytes; one product adds it to S when it is full:

    a_t = (R_t x_t) S + sum over buffered s < t of (R_t x_t . R_s x_s) v_s

Each device has its own step: step_cpu, step_mlx, step_cuda. Phases are exact at any position: the
host reduces multiples of the frequency in float64 (rope.py), and S is rotated to the first position
of a segment or a buffer, so float32 only sees positions within it.
A window W limits how far back the state reaches: S is the sum of WINDOW_PARTS parts, of W bytes
together. The oldest part is dropped when the newest is full, so the state covers at least the last
W - W / WINDOW_PARTS bytes, rounded down, and at most the last W.

The model is not typed here: bdh_mlx.BDH imports this module.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_lib.compute import step_cpu, step_cuda, step_mlx
from bdh_lib.compute.device import on_gpu
from bdh_lib.compute.layer import ln, read_segment
from bdh_lib.compute.rope import rotate_state
from bdh_lib.errors import UserError
from bdh_lib.rules import check, integer

WINDOW_PARTS = 4
WINDOW_RULE = integer(WINDOW_PARTS, 2**40, allow_none=True)  # valid windows, bytes
CPU_PREFILL_ROWS = 1024  # bytes * batch read at once, for a batch of up to 8 (_pieces)
GPU_ROWS = {48e9: 32768, 0: 4096}  # by a card's own memory in bytes: more are faster (docs/log.md)
MAX_BYTEWISE = 16  # bytes that a CPU reads one by one: its GEMM of few rows is slow
Buffer = step_cpu.ByteBuffer | step_mlx.ByteBuffer | step_cuda.ByteBuffer
DecodeStep = step_cpu.DecodeStep | step_mlx.DecodeStep | step_cuda.DecodeStep


class State(NamedTuple):
    """What the model remembers of the bytes that it has read.

    It is immutable, so it can be continued many times.

    State() is empty; State(window=W) remembers at most W bytes. A state of batch 1 can continue
    with any batch: the rows share its synapses until their own bytes are added.
    """

    position: int = 0  # bytes read
    window: int | None = None  # W, bytes; None remembers all
    synapses: tuple[mx.array, ...] = ()  # per layer (H, B or 1, N, D) float32; () if empty
    parts: tuple[tuple[mx.array, ...], ...] = ()  # their summands, oldest first; only with a window
    buffer: Buffer | None = None  # bytes that are not in the synapses yet

    @property
    def batch(self) -> int:
        """Return B; 0 for an empty state."""
        if self.buffer:
            return self.buffer.values[0].shape[0]
        return self.synapses[0].shape[1] if self.synapses else 0

    def __repr__(self) -> str:  # its arrays are large
        return f"State(position={self.position}, window={self.window}, batch={self.batch})"


def fitting_window(length: int | float, trained: int) -> int | None:
    """Return the window W for a text of `length` bytes by a model trained on blocks of `trained`.

    A model reads badly past the length of its blocks, which is W there; None within a block.
    """
    return max(WINDOW_PARTS, trained) if length > trained else None


# ------------------------------------------------------------------------------ many bytes at once


def read_unchecked(model, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
    """Read idx (B, T) after `state`; return logits (B, T, V) and the new State.

    It checks no argument: it runs at each byte, and a check would wait for the GPU.
    """
    state = _broadcast(model, idx, state)
    logits = []
    for piece in _pieces(model, idx, state):
        out, state = _read_piece(model, piece, state)
        logits.append(out @ model.lm_head)
    return mx.concatenate(logits, 1), state


def prefill(
    model, idx: mx.array, state: State | None = None, progress: Callable[[int], None] | None = None
) -> tuple[mx.array, State]:
    """Read idx (B, T >= 1) of any length; return the next byte's logits (B, V) and the new State.

    With a window, bytes that have no effect at the end of idx are not computed. `progress` is
    called with their number, then after each piece with that of its bytes. Raises UserError for an
    idx or a state that does not fit the model.
    """
    idx = check_prompt(model, idx)
    check_state(model, state)
    state = _broadcast(model, idx, state)
    whole = idx.size
    idx, state = _skip_forgotten(model, idx, state)
    if progress and whole > idx.size:
        progress(whole - idx.size)
    for piece in _pieces(model, idx, state):
        out, state = _read_piece(model, piece, state)
        mx.eval(out, state)
        if progress:
            progress(piece.size)
    return out[:, -1] @ model.lm_head, state


def _skip_forgotten(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """Drop the bytes that have no effect at the end of idx (B, T), and the state before them.

    A layer reaches back W bytes at most, so L layers reach back L * W. The rest begins where a
    part of the window ends.
    """
    if not (W := state.window):
        return idx, state
    n_parts = (state.position + idx.shape[1] - model.config.n_layer * W) * WINDOW_PARTS // W
    begin = n_parts * W // WINDOW_PARTS
    if begin <= state.position:
        return idx, state
    return idx[:, begin - state.position :], State(begin, W)


def check_model(model) -> None:
    """Raise UserError for an object that is not a model."""
    if not hasattr(model, "encoder_v"):
        raise UserError(f"the model is of type {type(model).__name__}; it must be a BDH")


def check_shape(idx: mx.array | np.ndarray) -> None:
    """Raise UserError if idx is not of shape (B, T) of at least one byte."""
    if idx.ndim != 2 or 0 in idx.shape:
        raise UserError(f"the bytes have shape {idx.shape}; it must be (B, T) with T at least 1")


def check_prompt(model, idx) -> mx.array:
    """Convert idx (B, T >= 1) to an MLX array. Raises UserError if it is not a batch of bytes."""
    check_model(model)
    if not isinstance(idx, mx.array | np.ndarray):
        raise UserError(
            f"the prompt is of type {type(idx).__name__}; it must be an mx.array (B, T)"
        )
    check_shape(idx)
    if isinstance(idx, np.ndarray) and idx.dtype.kind not in "biuf":
        raise UserError(f"the prompt is of type {idx.dtype}; it must be whole numbers")
    idx = mx.array(idx) if isinstance(idx, np.ndarray) else idx
    if not mx.issubdtype(idx.dtype, mx.integer):
        raise UserError(f"the prompt is of type {idx.dtype}; it must be whole numbers")
    for value in (idx.min().item(), idx.max().item()):
        if not 0 <= value < model.config.vocab_size:
            maximum = model.config.vocab_size - 1
            raise UserError(f"the prompt holds {value}; it must be from 0 to {maximum}")
    return idx


def check_state(model, state: State | None) -> None:
    """Raise UserError if `state` is not a State, or a state of a model of another shape."""
    if state is None:
        return
    if not isinstance(state, State):
        raise UserError(f"the state is of type {type(state).__name__}; it must be a State")
    check("position", state.position, integer(0, 2**62))
    check("window", state.window, WINDOW_RULE)
    H, D, N = model.encoder.shape
    expected = (model.config.n_layer, H, D, N)
    shapes_read = []
    for layers in (state.synapses, *state.parts):
        shapes = {tuple(S.shape[i] for i in (0, 3, 2)) if S.ndim == 4 else S.shape for S in layers}
        shapes_read += [(len(layers), *shape) for shape in shapes]
    if buffer := state.buffer:
        if not hasattr(buffer, "values"):
            raise UserError(
                f"the state's buffer is of type {type(buffer).__name__}; read a text anew"
            )
        shapes_read.append((len(buffer.values), *buffer.decode_step.shape[:3]))
    for shape in shapes_read:
        if shape != expected:
            raise UserError(f"the state was read with (layers, H, D, N) = {shape}, here {expected}")


def _broadcast(model, idx: mx.array, state: State | None) -> State:
    """Return a state that reads the rows of idx (B, T). Raises UserError for one of other rows."""
    state = State() if state is None else state
    if state.batch not in (0, 1, idx.shape[0]):
        raise UserError(f"the state has {state.batch} rows and cannot read {idx.shape[0]}")
    return state if state.batch in (0, idx.shape[0]) else flush_buffer(state)


def _pieces(model, idx: mx.array, state: State) -> list[mx.array]:
    """Split idx (B, T) along T: into pieces that memory holds, and where a window's part ends.

    A piece has at most `rows` bytes * batch, but rows / 8 bytes of each text for a batch of more
    than 8. Each piece rewrites the states of all texts. By default they are what fills the memory:
    with a batch of 16 on a CPU, pieces half as long took 1.6 times as long, in as much memory.
    """
    B, T = idx.shape
    if T == 1:  # in decoding the GPU waits for the host here
        return [idx]
    rows = _piece_rows(model.compute.dtype)
    step = max(rows // 8, rows // B)
    begin = state.position
    cuts = set(range(begin, begin + T, step))
    if state.window:
        cuts |= _part_ends(state.window, begin, begin + T)
    return mx.split(idx, sorted(cut - begin for cut in cuts if cut > begin), 1)


def _piece_rows(dtype: mx.Dtype) -> int:
    """Return how many bytes, B * T, a piece of a prompt has at most, for B up to 8."""
    if not on_gpu():
        return CPU_PREFILL_ROWS
    if dtype == mx.float32:
        return 512  # mx.fast.rope's error is 6e-8 per position
    memory = mx.device_info().get("total_memory", 0)  # CUDA's key: a Mac gains nothing from more
    return next(rows for minimum, rows in GPU_ROWS.items() if memory >= minimum)


def _part_ends(window: int, begin: int, end: int) -> set[int]:
    """Return the positions from `begin` to before `end` at which a part of a window ends.

    The n-th ends at n * window / WINDOW_PARTS, rounded down: any WINDOW_PARTS in a row, which may
    differ by a byte, have `window` bytes together.
    """
    first, last = (-(-position * WINDOW_PARTS // window) for position in (begin, end))
    return {n * window // WINDOW_PARTS for n in range(first, last)}


def _ends_part(state: State) -> bool:
    """Tell whether a part of the state's window ends at its position."""
    return bool(state.window and _part_ends(state.window, state.position, state.position + 1))


def _read_piece(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """Read one piece idx (B, T); return v (B, T, D) after the last layer and the new State."""
    T = idx.shape[1]
    if T == 1:
        return _read_byte(model, idx, state)
    if T <= MAX_BYTEWISE and not on_gpu():
        out = []
        for byte in mx.split(idx, T, 1):
            v, state = _read_byte(model, byte, state)
            out.append(v)
        return mx.concatenate(out, 1), state
    state = flush_buffer(state)
    v = ln(model.embed(idx))
    compute = model.compute
    weights = [w.astype(compute.dtype) for w in model.weights()]
    cuts = sorted({0, T - T % compute.chunk, T})  # whole chunks, then the rest
    updates = []
    for S in state.synapses or [None] * model.config.n_layer:
        local = None if S is None else rotate_state(S, -state.position)
        outs = []
        for begin, end in pairwise(cuts):
            out, local = read_segment(v[:, begin:end], local, weights, begin, compute)
            outs.append(out)
        v = mx.concatenate(outs, 1)
        new_S = rotate_state(local, state.position)
        updates.append(new_S if S is None else new_S - S)
    return v, _add_updates(state._replace(position=state.position + T), updates)


def _add_updates(state: State, updates: Sequence[mx.array]) -> State:
    """Add each layer's update (H, B, N, D) to the state's synapses, and drop its buffer."""

    def plus(old: tuple[mx.array, ...], new: Sequence[mx.array]) -> tuple[mx.array, ...]:
        return tuple(map(mx.add, old, new)) if old else tuple(new)

    state = state._replace(synapses=plus(state.synapses, updates), buffer=None)
    if not state.window:
        return state
    parts = (*state.parts[:-1], plus(state.parts[-1] if state.parts else (), updates))
    if _ends_part(state):
        parts = (*parts, ())[-WINDOW_PARTS:]
        nonempty = [part for part in parts if part]
        state = state._replace(synapses=reduce(plus, nonempty) if nonempty else ())
    return state._replace(parts=parts)


# --------------------------------------------------------------------------------- one byte at once


def flush_buffer(state: State) -> State:
    """Add the buffer's bytes to the state's synapses, by one product per layer."""
    buffer = state.buffer
    if not buffer or not buffer.count:
        return state._replace(buffer=None)
    if state.window or not state.synapses:
        return _add_updates(state, [keys @ values for keys, values in buffer.keys_and_values()])
    synapses = (
        mx.addmm(S, *kv) for S, kv in zip(state.synapses, buffer.keys_and_values(), strict=True)
    )
    return state._replace(synapses=tuple(synapses), buffer=None)


def _read_byte(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """Read one byte idx (B, 1); return v (B, 1, D) after the last layer and the new State."""
    decode_step = _decode_step_of(model)
    if state.buffer and state.buffer.decode_step is not decode_step:  # of another device or dtype
        state = flush_buffer(state)
    buffer = state.buffer or decode_step.new_buffer(state.position, state.synapses, idx.shape[0])
    v, buffer = decode_step.step(idx, buffer)
    state = state._replace(position=state.position + 1, buffer=buffer)
    full = buffer.count == buffer.values[0].shape[1]
    return v, _flush_full_buffer(state) if full or _ends_part(state) else state


def _flush_full_buffer(state: State) -> State:
    """Do as flush_buffer does; where a step reads int8 synapses, make them too."""
    if state.window or not state.synapses or not state.buffer.is_int8:
        return flush_buffer(state)
    synapses, buffer = state.buffer.flush(state.synapses, state.position)
    return state._replace(synapses=synapses, buffer=buffer)


def _decode_step_of(model) -> DecodeStep:
    """Return the model's step for the device, with weights laid out for it; cached in decode_step.

    It is made anew when a weight was replaced. A weight that was changed by index
    (`model.encoder[0] = 0`) stays the same object: set model.decode_step to None afterwards.
    """
    step_class = step_cpu.DecodeStep
    if on_gpu():
        step_class = step_cuda.DecodeStep if step_cuda.supports(model) else step_mlx.DecodeStep
    weights = (model.encoder, model.encoder_v, model.decoder, model.embed.weight)
    source = (step_class, model.compute.dtype, *weights)
    cached = model.decode_step
    if cached is None or any(a is not b for a, b in zip(cached.source, source, strict=True)):
        cached = model.decode_step = step_class(model, source)
    return cached
