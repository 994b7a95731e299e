"""The recurrent state of a model, and two ways to read on: many bytes at once, or one byte.

Many bytes go through the forward pass of the training layer (layer.py), segment by segment, in
bounded memory. At one byte, S (201 MB for the default model) is not rewritten: a buffer beside it
holds the rotated activations (keys) and values of the last bytes; when it is full, they are added
to S in one product:

    a_t = (R_t x_t) S + sum over s waiting, s < t of (R_t x_t . R_s x_s) v_s

The step of one byte depends on the device: step_cpu, step_mlx, step_cuda. Phases are exact at any
position: a multiple of the frequency is reduced in float64 on the host (rope.py), and float32 sees
only positions within a segment or a buffer, since S is rotated to its begin.

A window W bounds how far back the model sees. S is the sum of WINDOW_PARTS sums over stretches of
bytes, and the oldest is dropped: the model sees between W - W / WINDOW_PARTS and W bytes.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_lib.compute import step_cpu, step_cuda, step_mlx
from bdh_lib.compute.layer import forward_segment, ln
from bdh_lib.compute.rope import on_gpu, rotate_state
from bdh_lib.errors import UserError, check, whole

WINDOW_PARTS = 4
WINDOW = whole(WINDOW_PARTS, 2**40, none=True)  # what a window can be
CPU_ROWS = 1024  # bytes * batch read at once, which bounds the memory
GPU_ROWS = {48e9: 32768, 0: 4096}  # the same by the memory there is: more are faster (docs/log.md)
MAX_BYTEWISE = 16  # bytes up to which a CPU reads one by one: its product of few rows is slow
Buffer = step_cpu.PendingBuffer | step_mlx.PendingBuffer | step_cuda.PendingBuffer


class State(NamedTuple):
    """The bytes read so far; never changed, so it can be kept and continued many times.

    State() has read nothing, State(window=W) will remember W bytes at most. A state of batch 1 can
    be read on with any batch: its rows share the synapses until bytes of their own are added.
    """

    position: int = 0  # bytes read
    window: int | None = None  # W, bytes; None remembers all
    synapses: tuple[mx.array, ...] = ()  # of each layer (H, B or 1, N, D) float32; () for none yet
    parts: tuple[tuple[mx.array, ...], ...] = ()  # their summands, oldest first; with a window only
    buffer: Buffer | None = None  # bytes that are not in the synapses yet

    @property
    def batch(self) -> int:
        """Rows; 0 before anything is read."""
        if self.buffer:
            return self.buffer.values[0].shape[0]
        return self.synapses[0].shape[1] if self.synapses else 0

    def __repr__(self) -> str:  # its arrays are large
        return f"State(position={self.position}, window={self.window}, batch={self.batch})"


# ------------------------------------------------------------------------------ many bytes at once


def read(model, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
    """Read idx (B, T) on from `state`; gives logits (B, T, V) and the new State.

    It checks neither idx nor state: it runs at each byte, and a GPU's host would wait for values.
    """
    state, logits = _broadcast(model, idx, state), []
    for piece in _pieces(model, idx, state):
        out, state = _read_piece(model, piece, state)
        logits.append(out @ model.lm_head)
    return mx.concatenate(logits, 1), state


def prefill(model, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
    """Read idx (B, T >= 1), however long; gives the next byte's logits (B, V), the State.

    Raises UserError for an idx or a state that the model cannot read.
    """
    idx = check_prompt(model, idx)
    check_state(model, state)
    state = _broadcast(model, idx, state)
    for piece in _pieces(model, idx, state):
        out, state = _read_piece(model, piece, state)
        mx.eval(out, state)
    return out[:, -1] @ model.lm_head, state


def check_model(model) -> None:
    """Raise UserError for what is no model."""
    if not hasattr(model, "encoder_v"):
        raise UserError(f"the model is of type {type(model).__name__}; it must be a BDH")


def check_prompt(model, idx) -> mx.array:
    """idx, which holds at least a byte for each row, as an MLX array. Raises UserError."""
    check_model(model)
    if not isinstance(idx, mx.array | np.ndarray):
        raise UserError(
            f"the prompt is of type {type(idx).__name__}; it must be an mx.array (B, T)"
        )
    if idx.ndim != 2 or 0 in idx.shape:
        raise UserError(f"the prompt has shape {idx.shape}; it must be (B, T) with T at least 1")
    if isinstance(idx, np.ndarray) and idx.dtype.kind not in "biuf":
        raise UserError(f"the prompt is of type {idx.dtype}; it must be whole numbers")
    idx = mx.array(idx) if isinstance(idx, np.ndarray) else idx
    if not mx.issubdtype(idx.dtype, mx.integer):
        raise UserError(f"the prompt is of type {idx.dtype}; it must be whole numbers")
    for value in (idx.min().item(), idx.max().item()):
        if not 0 <= value < model.config.vocab_size:
            most = model.config.vocab_size - 1
            raise UserError(f"the prompt holds {value}; it must be from 0 to {most}")
    return idx


def check_state(model, state: State | None) -> None:
    """Raise UserError for what is no state, or was read by a model of another shape."""
    if state is None:
        return
    if not isinstance(state, State):
        raise UserError(f"the state is of type {type(state).__name__}; it must be a State")
    check("position", state.position, whole(0, 2**62))
    check("window", state.window, WINDOW)
    H, D, N = model.encoder.shape
    expected, shapes_read = (model.config.n_layer, H, D, N), []
    for layers in (state.synapses, *state.parts):
        shapes = {tuple(S.shape[i] for i in (0, 3, 2)) if S.ndim == 4 else S.shape for S in layers}
        shapes_read += [(len(layers), *shape) for shape in shapes]
    if buffer := state.buffer:
        if not hasattr(buffer, "values"):
            raise UserError(
                f"the state's buffer is of type {type(buffer).__name__}; read a text anew"
            )
        shapes_read.append((len(buffer.values), *buffer.of.source[2].shape))
    for shape in shapes_read:
        if shape != expected:
            raise UserError(f"the state was read with (layers, H, D, N) = {shape}, here {expected}")


def _broadcast(model, idx: mx.array, state: State | None) -> State:
    state = State() if state is None else state
    if state.batch not in (0, 1, idx.shape[0]):
        raise UserError(f"the state has {state.batch} rows and cannot read {idx.shape[0]}")
    return state if state.batch in (0, idx.shape[0]) else flush_pending(state)


def _pieces(model, idx: mx.array, state: State) -> list[mx.array]:
    """idx cut where the memory or the window asks for it."""
    B, T = idx.shape
    if T == 1:  # a byte that is written waits for the host
        return [idx]
    rows = _rows(model.compute.dtype)
    step, begin = max(rows // 8, rows // B), state.position
    cuts = set(range(begin, begin + T, step))
    if state.window:
        part = _part(state.window)
        cuts |= set(range(-(-begin // part) * part, begin + T, part))
    return mx.split(idx, sorted(cut - begin for cut in cuts if cut > begin), 1)


def _rows(dtype: mx.Dtype) -> int:
    if not on_gpu():
        return CPU_ROWS
    if dtype == mx.float32:
        return 512  # mx.fast.rope errs by 6e-8 a position
    info = mx.device_info()  # Metal names the first of the two, CUDA the other
    memory = info.get("max_recommended_working_set_size", info.get("total_memory", 0))
    return next(rows for least, rows in GPU_ROWS.items() if memory >= least)


def _part(window: int) -> int:
    return -(-window // WINDOW_PARTS)


def _read_piece(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """One piece through all layers: v (B, T, D) after the last, and the State."""
    T = idx.shape[1]
    if T == 1:
        return _read_byte(model, idx, state)
    if T <= MAX_BYTEWISE and not on_gpu():
        out = []
        for byte in mx.split(idx, T, 1):
            v, state = _read_byte(model, byte, state)
            out.append(v)
        return mx.concatenate(out, 1), state
    state = flush_pending(state)
    c, v = model.compute, ln(model.embed(idx))
    weights = [w.astype(c.dtype) for w in model.weights()]
    written = []
    for S in state.synapses or [None] * model.config.n_layer:
        segment_state, total = None if S is None else rotate_state(S, -state.position), []
        for begin, end in pairwise(sorted({0, T - T % c.chunk, T})):  # whole chunks, then the rest
            out, segment_state, _ = forward_segment(
                v[:, begin:end], segment_state, weights, begin, c.chunk
            )
            total.append(out)
        v = mx.concatenate(total, 1)
        after = rotate_state(segment_state, state.position)
        written.append(after if S is None else after - S)
    return v, _added(state._replace(position=state.position + T), written)


def _added(state: State, written: Sequence[mx.array]) -> State:
    """The state with `written` (H, B, N, D) of each layer added to its synapses."""

    def plus(old, new):
        return tuple(map(mx.add, old, new)) if old else tuple(new)

    state = state._replace(synapses=plus(state.synapses, written), buffer=None)
    if not state.window:
        return state
    parts = (*state.parts[:-1], plus(state.parts[-1] if state.parts else (), written))
    if state.position % _part(state.window) == 0:
        parts = (*parts, ())[-WINDOW_PARTS:]
        sums = [part for part in parts if part]
        state = state._replace(synapses=reduce(plus, sums) if sums else ())
    return state._replace(parts=parts)


# --------------------------------------------------------------------------------- one byte at once


def flush_pending(state: State) -> State:
    """The same state without a buffer: its bytes are added to the synapses, one product a layer."""
    buffer = state.buffer
    if not buffer or not buffer.count:
        return state._replace(buffer=None)
    if state.window or not state.synapses:
        return _added(state, [keys @ values for keys, values in buffer.pending()])
    after = (mx.addmm(S, *kv) for S, kv in zip(state.synapses, buffer.pending(), strict=True))
    return state._replace(synapses=tuple(after), buffer=None)


def _read_byte(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """idx (B, 1) through all layers: v (B, 1, D) after the last, and the State."""
    byte = _decode_step_of(model)
    if state.buffer and state.buffer.of is not byte:  # another device's, or another dtype's
        state = flush_pending(state)
    buffer = state.buffer or byte.new_buffer(state.position, state.synapses, idx.shape[0])
    v, buffer = byte.step(idx, buffer)
    state = state._replace(position=state.position + 1, buffer=buffer)
    ends_part = state.window and state.position % _part(state.window) == 0
    full = buffer.count == buffer.values[0].shape[1]
    return v, _flush_if_full(state) if full or ends_part else state


def _flush_if_full(state: State) -> State:
    """The same state with an empty buffer."""
    if state.window or not state.synapses or not getattr(state.buffer, "short", False):
        return flush_pending(state)
    synapses, buffer = state.buffer.folded(state.synapses, state.position)
    return state._replace(synapses=synapses, buffer=buffer)


def _decode_step_of(model):
    """The model's step for the device, with weights laid out for it; cached in model.decode_step.

    It is made anew when a weight was replaced. A weight that was changed by index
    (`model.encoder[0] = 0`) stays the same object: set model.decode_step to None afterwards.
    """
    step_class = step_cpu.DecodeStep
    if on_gpu():
        step_class = step_cuda.DecodeStep if step_cuda.fits(model) else step_mlx.DecodeStep
    weights = (model.encoder, model.encoder_v, model.decoder, model.embed.weight)
    source = (step_class, model.compute.dtype, *weights)
    cached = model.decode_step
    if cached is None or any(a is not b for a, b in zip(cached.source, source, strict=True)):
        cached = model.decode_step = step_class(model)
        cached.source = source
    return cached


def prefetch_one(steps: Iterator) -> Iterator:
    """Yield each step of an endless stream once the next one is submitted.

    So a GPU computes while the host reads. On a CPU they come as they are.
    """
    if not on_gpu():
        return (yield from steps)
    before = next(steps)
    for step in steps:
        yield before
        before = step
