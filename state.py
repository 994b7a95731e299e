"""What remains of the bytes read, and the two ways to read on: many bytes at once, or one.

Many: segments through the training layer's forward pass (fast_layer), in bounded memory. One, on
a GPU: as BDH's equations say, a_t = (R_t x_t) S, and S grows by the byte's own outer product; with
CUDA in place (cuda_byte). One, on a CPU: S, 201 MB for the default model, is not rewritten at each
byte; the rotated activations and values of the last TAIL bytes wait beside it and are added in one
product:

    a_t = (R_t x_t) S + sum over s waiting, s < t of (R_t x_t . R_s x_s) v_s

Phases are exact at any position: a multiple of the frequency is reduced in float64 on the host
(`phases`), and float32 sees only positions within a segment or a tail: S is turned to its begin.
A window bounds the memory in time: S is kept as PARTS sums over stretches of bytes, and the oldest
is dropped, so that what is read reaches back between W - W / PARTS and W bytes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import islice, pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import cuda_byte
from fast_layer import ROPE_BASE, forward_segment, ln, phases, residual, turn

TAIL = 64  # bytes that wait: reading them costs as much as adding them, at the default shape
TURN = 1024  # bytes a GPU writes before it turns S: mx.fast.rope errs by 6e-8 a position
PARTS = 4  # of a window
CPU_ROWS = 1024  # bytes * batch read at once, which bounds the memory
GPU_ROWS = {48e9: 32768, 0: 4096}  # the same by the memory there is: more are faster (LOG.md)
SHORT = 16  # bytes up to which a CPU reads one by one: its product of few rows is slow
GATHER, GATHER_DY = 0.3, 0.15  # shares of rows up to which a CPU gathers them (LOG.md)


class State(NamedTuple):
    """The bytes read so far; never changed, so it can be kept and continued many times.

    State() has read nothing, State(window=W) will remember W bytes at most. A state of batch 1 can
    be read on with any batch: its rows share the synapses until bytes of their own are added.
    """

    position: int = 0  # bytes read
    window: int | None = None  # W, bytes; None remembers all
    synapses: tuple[mx.array, ...] = ()  # of each layer (H, B or 1, N, D) float32; () for none yet
    parts: tuple[tuple[mx.array, ...], ...] = ()  # their summands, oldest first; with a window only
    tail: "Tail | Open | None" = None

    @property
    def batch(self) -> int:
        """Rows; 0 before anything is read."""
        one = (self.tail.first if self.tail else self.synapses)[:1]
        return one[0].shape[1] if one else 0


class Tail(NamedTuple):
    """CPU: the last `count` bytes, in no synapses yet; what follows them is not this state's own.

    States share the arrays, NumPy's: the one that is `newest` writes the next byte behind its own,
    any other copies them first.
    """

    count: int
    keys: tuple[np.ndarray, ...]  # of each layer, rotated x: (H, B, TAIL, N)
    values: tuple[np.ndarray, ...]  # (B, TAIL, D)
    newest: list[int]  # how many bytes the arrays hold, over all that share them

    @property
    def first(self):
        return self.keys


class Open(NamedTuple):
    """GPU: the synapses with the last `count` bytes, positions counted from `origin`.

    With CUDA states share the arrays, and each further byte changes them: a state that another has
    gone on from is `stale`, and reads its bytes again before anything is asked of it. No graph
    shows the change, so what comes after a byte must wait for its v.
    """

    count: int
    origin: int
    first: tuple[mx.array, ...]  # of each layer (H, B, N, D)
    bytes: deque[tuple[mx.array, mx.array]]  # with CUDA: those in `first`, (B, 1), and their v;
    # no list, in which each evaluation of a state would look for arrays to evaluate

    @property
    def stale(self) -> bool:
        return len(self.bytes) > self.count


# ------------------------------------------------------------------------------ many bytes at once


def _on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def read(model, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
    """Read idx (B, T) on from `state`; gives logits (B, T, V) and the new State."""
    state, logits = _broadcast(model, idx, state), []
    for piece in _pieces(model, idx, state):
        out, state = _read_piece(model, piece, state)
        logits.append(out @ model.lm_head)
    return mx.concatenate(logits, 1), state


def prefill(model, idx: mx.array, state: State | None = None) -> tuple[mx.array, State]:
    """Read idx (B, T >= 1), however long; gives the next byte's logits (B, V), the State."""
    state = _broadcast(model, idx, state)
    for piece in _pieces(model, idx, state):
        out, state = _read_piece(model, piece, state)
        mx.eval(out, state)
    return out[:, -1] @ model.lm_head, state


def _broadcast(model, idx: mx.array, state: State | None) -> State:
    state = state or State()
    if state.batch not in (0, 1, idx.shape[0]):
        raise ValueError(f"a state of batch {state.batch} cannot read {idx.shape[0]} rows")
    return state if state.batch in (0, idx.shape[0]) else fold(model, state)


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
    if not _on_gpu():
        return CPU_ROWS
    if dtype == mx.float32:
        return 512  # mx.fast.rope errs by 6e-8 a position
    info = mx.device_info()  # Metal names the first of the two, CUDA the other
    memory = info.get("max_recommended_working_set_size", info.get("total_memory", 0))
    return next(rows for least, rows in GPU_ROWS.items() if memory >= least)


def _part(window: int) -> int:
    return -(-window // PARTS)


def _read_piece(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """One piece through all layers: v (B, T, D) after the last, and the State."""
    T = idx.shape[1]
    if T == 1:
        return _read_byte(model, idx, state)
    if T <= SHORT and not _on_gpu():
        out = []
        for byte in mx.split(idx, T, 1):
            v, state = _read_byte(model, byte, state)
            out.append(v)
        return mx.concatenate(out, 1), state
    state = fold(model, state)
    c, v = model.compute, ln(model.embed(idx))
    weights = (model.encoder, model.encoder_v, model.decoder.reshape(*model.encoder.shape[::2], -1))
    weights = [w.astype(c.dtype) for w in weights]
    written = []
    for S in state.synapses or [None] * model.config.n_layer:
        found, total = None if S is None else turn(S, -state.position), []
        for begin, end in pairwise(sorted({0, T - T % c.chunk, T})):  # whole chunks, then the rest
            out, found, _ = forward_segment(v[:, begin:end], found, weights, begin, c.chunk)
            total.append(out)
        v = mx.concatenate(total, 1)
        after = turn(found, state.position)
        written.append(after if S is None else after - S)
    return v, _added(state._replace(position=state.position + T), written)


def _added(state: State, written: Sequence[mx.array]) -> State:
    """The state with `written` (H, B, N, D) of each layer added to its synapses, without a tail."""

    def plus(old, new):
        return tuple(map(mx.add, old, new)) if old else tuple(new)

    state = state._replace(synapses=plus(state.synapses, written), tail=None)
    if not state.window:
        return state
    parts = (*state.parts[:-1], plus(state.parts[-1] if state.parts else (), written))
    if state.position % _part(state.window) == 0:
        parts = (*parts, ())[-PARTS:]
        kept = [part for part in parts if part]
        state = state._replace(synapses=reduce(plus, kept) if kept else ())
    return state._replace(parts=parts)


# --------------------------------------------------------------------------------- one byte at once


def fold(model, state: State) -> State:
    """The same state without a tail: its bytes are added to the synapses, one product a layer."""
    tail = state.tail
    if not tail:
        return state
    if isinstance(tail, Open):
        return _fold_open(model, state)
    cut = [(k[..., : tail.count, :], v[:, : tail.count]) for k, v in zip(*tail[1:3], strict=True)]
    return _added(state, [mx.array(k).swapaxes(-1, -2) @ mx.array(v) for k, v in cut])


def _fold_open(model, state: State) -> State:
    tail = state.tail
    if tail.stale:
        return fold(model, _read_again(model, state))
    if tail.bytes:
        mx.eval(tail.bytes[-1][1])
    after = tuple(turn(S, tail.origin) + 0 for S in tail.first)  # a copy: `first` may change yet
    mx.eval(after)
    if not state.window:
        return state._replace(synapses=after, tail=None)
    before = state.synapses or [0] * len(after)
    return _added(state, [new - old for new, old in zip(after, before, strict=True)])


def _read_again(model, state: State) -> State:
    """The same state with arrays of its own."""
    own = [byte for byte, _ in islice(state.tail.bytes, state.tail.count)]
    before = state._replace(position=state.position - len(own), tail=None)
    return prefill(model, mx.concatenate(own, 1), before)[1]


def _read_byte(model, idx: mx.array, state: State) -> tuple[mx.array, State]:
    """idx (B, 1) through all layers: v (B, 1, D) after the last, and the State."""
    if _on_gpu():
        v, tail = _step_open(model, idx, state)
    else:
        tail = state.tail or _new_tail(model, idx.shape[0])
        v, tail = _laid_out(model).step_rows(idx, state._replace(tail=tail))
    state = state._replace(position=state.position + 1, tail=tail)
    ends_part = state.window and state.position % _part(state.window) == 0
    full = tail.count == (TURN if _on_gpu() else TAIL)
    return v, fold(model, state) if full or ends_part else state


def _step_open(model, idx: mx.array, state: State) -> tuple[mx.array, Open]:
    if state.tail and state.tail.stale:
        state = _read_again(model, state)
    laid, B = _laid_out(model), idx.shape[0]
    tail = state.tail or _opened(state, model, B)
    given = idx, laid.weights, mx.array(tail.count), tail.first
    if laid.in_place:
        before = tail.bytes[-1][1] if tail.bytes else mx.zeros((B, 1, laid.shape[1]))
        v, first = laid.step(*given, before), tail.first
        tail.bytes.append((idx, v))
    else:
        v, first = laid.step(*given)
    return v, tail._replace(count=tail.count + 1, first=first)


def _opened(state: State, model, B: int) -> Open:
    """Synapses of the state's own, to be written to, as if its next byte were the first."""
    (H, D, N), L = model.encoder.shape, model.config.n_layer
    own = [mx.zeros((H, B, N, D)) for _ in range(L)]
    if state.synapses:
        turned = (turn(S, -state.position) for S in state.synapses)
        own = map(mx.add, own, turned)
    first = tuple(own)
    mx.eval(first)
    return Open(0, state.position, first, deque())


def _new_tail(model, B: int) -> Tail:
    (H, D, N), L = model.encoder.shape, model.config.n_layer
    shapes = [(H, B, TAIL, N), (B, TAIL, D)]
    return Tail(0, *(tuple(np.empty(s, np.float32) for _ in range(L)) for s in shapes), [0])


def _laid_out(model) -> "_Laid":
    """The model's weights as its steps want them, laid out anew when one has been replaced.

    A weight changed by index (`model.encoder[0] = 0`) stays the same object: set model.laid_out to
    None then.
    """
    laid = getattr(model, "laid_out", None)
    now = (model.encoder, model.encoder_v, model.decoder, model.embed.weight)
    now = (*now, model.compute.dtype if _on_gpu() else mx.float32)
    if laid is None or any(a is not b for a, b in zip(laid.made_of, now, strict=True)):
        laid = model.laid_out = _Laid(model, now)
    return laid


class _Laid:
    """Weights laid out for one byte: MLX on a GPU, compiled, NumPy on a CPU.

    On a CPU MLX multiplies a vector by GEMM, NumPy by GEMV (LOG.md), and neurons that are silent
    need not be read: rows of S, encoder_v and decoder are gathered where few are active.
    """

    def __init__(self, model, made_of):
        self.made_of, self.dtype, (H, D, N) = made_of, made_of[-1], model.encoder.shape
        self.shape = H, D, N
        if _on_gpu():
            self.in_place = cuda_byte.fits(model.config)
            self.weights = (cuda_byte.weights_of if self.in_place else _weights)(model, self.dtype)
            self.step = mx.compile(cuda_byte.step if self.in_place else step)
        else:
            rows = mx.contiguous(model.encoder_v.swapaxes(-1, -2)).reshape(H * N, D)
            arrays = (model.embed.weight, model.encoder, model.encoder_v, rows, model.decoder)
            self.weights = [np.array(array, copy=False) for array in arrays]
            self.room = np.empty((H * N, D), np.float32)  # gathered rows
        mx.eval(self.weights if _on_gpu() else [])

    def step_rows(self, idx, state):
        """One byte of every row on a CPU, one by one: a row's neurons and synapses are its own."""
        tail = state.tail
        if tail.newest[0] > tail.count:  # another state has written behind this one's bytes
            keys, values = (tuple(map(np.copy, arrays)) for arrays in (tail.keys, tail.values))
            tail = tail._replace(keys=keys, values=values, newest=[tail.count])
        synapses = [np.array(S, copy=False) for S in state.synapses]
        phase = phases(state.position, self.shape[2])
        rows = [
            self._step_row(byte, b, phase, synapses, tail)
            for b, byte in enumerate(np.array(idx)[:, 0])
        ]
        tail.newest[0] = tail.count + 1
        return mx.array(np.stack(rows)[:, None]), tail._replace(count=tail.count + 1)

    def _step_row(self, byte, b, phase, synapses, tail):
        """v (D,) of one byte of row b, whose keys and values it writes into the tail."""
        embed, encoder, encoder_v, encoder_v_rows, decoder = self.weights
        (H, D, N), count = self.shape, tail.count
        v = _ln(embed[byte])
        for layer, (keys, values) in enumerate(zip(tail.keys, tail.values, strict=True)):
            x = np.maximum(np.stack([v @ encoder[h] for h in range(H)]), 0)
            q = (x.view(np.complex64) * phase).view(np.float32)
            a = np.zeros((H, D), np.float32)
            for h in range(H):
                if synapses:
                    S = synapses[layer][h, b if synapses[layer].shape[1] > 1 else 0]
                    a[h] = self._rows_by(q[h], S.reshape(N // 2, 2 * D), pairs=True)
                a[h] += (keys[h, b, :count] @ q[h]) @ values[b, :count]
            keys[:, b, count], values[b, count] = q, v
            y = self._gated(x.reshape(-1), _ln(a), encoder_v, encoder_v_rows)
            v = _ln(v + _ln(self._rows_by(y, decoder)))
        return v

    def _rows_by(self, q, rows, pairs=False):
        """q (n,) @ rows (n, D), reading only the rows where q is not 0 if these are few.

        `pairs`: rows holds two of them in one, as q's neurons rotate in pairs.
        """
        D = self.shape[1]
        active = np.flatnonzero(q.view(np.complex64) if pairs else q)
        if len(active) > GATHER * len(rows):
            return q @ rows.reshape(-1, D)
        room = self.room.reshape(-1, rows.shape[1])[: len(active)]
        np.take(rows, active, 0, out=room, mode="clip")
        q = q.view(np.complex64)[active].view(np.float32) if pairs else q[active]
        return q @ room.reshape(-1, D)

    def _gated(self, x, a, encoder_v, rows):
        """y (H*N,) = relu(a Dy) * x, where x (H*N,) is not 0; a (H, D)."""
        H, _, N = self.shape
        active = np.flatnonzero(x)
        if len(active) > GATHER_DY * len(x):
            g = np.concatenate([a[h] @ encoder_v[h] for h in range(H)])
            return np.maximum(g, 0) * x
        room, y = self.room[: len(active)], np.zeros_like(x)
        np.take(rows, active, 0, out=room, mode="clip")
        cuts = np.searchsorted(active, N * np.arange(H + 1))
        g = [room[i:j] @ a[h] for h, (i, j) in enumerate(pairwise(cuts))]
        y[active] = np.maximum(np.concatenate(g), 0) * x[active]
        return y


def _ln(x: np.ndarray) -> np.ndarray:
    """fast_layer.ln of NumPy arrays."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5))


def _weights(model, dtype):
    decoder = model.decoder.reshape(*model.encoder.shape[::2], -1)
    weights = (model.encoder, model.encoder_v, decoder)
    return [model.embed.weight, *(w.astype(dtype) for w in weights)]


def step(idx, weights, count, synapses):
    """One byte idx (B, 1) on a GPU: v (B, 1, D), and the synapses (H, B, N, D) with it."""
    embed, encoder, encoder_v, decoder = weights
    (H, D, N), B, dtype = encoder.shape, idx.shape[0], encoder.dtype
    v, after = ln(embed[idx]), []
    for S in synapses:
        x = mx.maximum(v.astype(dtype).reshape(1, B, D) @ encoder, 0)  # (H, B, N)
        how = {"traditional": True, "base": ROPE_BASE, "scale": 1.0, "offset": count}
        q = mx.fast.rope(x.reshape(1, H * B, 1, N), N, **how).reshape(H, B, 1, N)
        q = q.astype(mx.float32)
        a = (q @ S).reshape(H, B, D)
        after.append(S + q.reshape(H, B, N, 1) * v.reshape(1, B, 1, D))
        y = x * mx.maximum(ln(a).astype(dtype) @ encoder_v, 0)
        o = (y @ decoder).astype(mx.float32).sum(0)
        v = residual(v, o.reshape(B, 1, D))
    return v, tuple(after)


def ahead(steps: Iterator) -> Iterator:
    """The steps of an endless stream, on a GPU each once the next has been submitted: it computes
    while the host reads its results, which would else take turns. So a state of a CUDA stream is
    stale once it is given: whoever goes on from it reads up to TURN bytes again.
    """
    if not _on_gpu():
        return (yield from steps)
    before = next(steps)
    for step in steps:
        yield before
        before = step
