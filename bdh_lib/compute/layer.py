"""One BDH layer with a gradient of its own: time linear in T, memory bounded by a segment of T.

    h = v Dx    x = relu(h)    q = rotate(x)    a = tril(q q^T, -1) v
    g = ln(a) Dy    y = x * relu(g), dropout    o = sum over heads of y E    v' = ln(v + ln(o))

It computes the same function as BDH.quadratic_layer, which is easier to read. docs/computing.md
explains chunks, segments, groups and what is saved. The differences save time or memory:
- Scores have no softmax, so earlier chunks of C bytes add q S to a, where S is the sum of their
  q^T v. The backward pass uses R instead, the sum of q^T da over the *later* chunks.
- Activations are head-major, (H, B*T, N): each product is one batched GEMM without a transpose.
- The backward pass recomputes what was not saved, segment by segment. mx.depends makes each segment
  wait for the previous one: otherwise MLX evaluates them all at once and saves no memory.
- Elementwise operations on activations are in elementwise.py; on CUDA they are fused kernels.
- No array is larger than a segment's activation, which `segment_rows` and `max_segment_rows` bound:
  Macs limit the size of a buffer (a few GB) and the time of a command buffer; arrays of 2^31
  elements fail.

    C bytes of a chunk   n chunks of a segment   S, R (H, B, N, D) float32
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx

from bdh_lib.compute import blas, elementwise, elementwise_cuda
from bdh_lib.compute.device import on_gpu
from bdh_lib.compute.elementwise import Mask, dropout_mask, dropout_scale

CPU_ROWS = 1024  # a segment's activation stays near a CPU's caches
MAX_SEGMENTS = 32  # mx.compile takes time cubic in their number: 17 s for 64, 2 s for 32


@dataclass(frozen=True)
class Compute:
    """How a layer is computed, and what is saved for its gradient (activation checkpointing).

    Without dropout no field changes the function, only its rounding. Segments and groups also
    decide which dropout masks a key gives.
    """

    dtype: mx.Dtype = mx.float32  # of the GEMMs; sums, norms and states stay float32
    chunk: int = 128  # C: bytes whose scores are computed as a square
    segment_rows: int = 16384  # largest B * T of a segment, which has at least a chunk of each row
    max_segment_rows: int = 16384  # in its place where a block would have over MAX_SEGMENTS
    saved_activations: int = 4  # how many of Saved's last four arrays are saved
    groups: int = 1  # of heads, computed at once on a CPU, each on a core


def default_chunk(D: int) -> int:
    """Return the C at which scores and chunk states cost about the same."""
    return max(128, 2 * D)


def default_groups(H: int) -> int:
    """Return how many groups of the H heads a CPU computes at once: at most one for each core.

    It is 1 on a GPU, and with a BLAS whose products take all cores.
    """
    cores = 1 if on_gpu() or not blas.is_limited else len(os.sched_getaffinity(0))
    return max(n for n in range(1, min(H, cores) + 1) if H % n == 0)


def default_compute(H: int, D: int) -> Compute:
    """Return the Compute of a model that was given none: float32, everything saved."""
    rows = 16384 if on_gpu() else CPU_ROWS
    return Compute(chunk=default_chunk(D), segment_rows=rows, groups=default_groups(H))


def ln(x: mx.array) -> mx.array:
    """Apply LayerNorm without parameters over the last axis."""
    return mx.fast.layer_norm(x, None, None, 1e-5)


def fused_or_plain() -> ModuleType:
    """Return the module whose functions this device runs: elementwise_cuda or elementwise."""
    return elementwise_cuda if elementwise_cuda.is_available() else elementwise


def add_and_norm(v: mx.array, o: mx.array, scale_v: mx.array | int = 1) -> mx.array:
    """Return v' = ln(v + ln(o)) of v and o (B, T, D); scale_v is the dropout factor of ln(o)."""
    return ln(v + ln(o) * scale_v)


# ----------------------------------------------------------------------------------------- products


def _transpose(a: mx.array) -> mx.array:
    return a.swapaxes(-1, -2)


def _add_matmul(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    """Return total + a @ b in float32; total None is 0."""
    if total is None:
        return (a @ b).astype(mx.float32)
    return mx.addmm(total, a, b) if a.dtype == total.dtype else total + a @ b


def _chunked(a: mx.array, B: int, C: int) -> mx.array:
    """Reshape (h, B*T, d) to (h, B, n, C, d), a view; h is H or 1, d is N or D."""
    return a.reshape(a.shape[0], B, -1, min(C, a.shape[1] // B), a.shape[-1])


def _chunk_states(
    S: mx.array | None, k: mx.array, v: mx.array, reverse: bool = False
) -> tuple[mx.array | None, mx.array]:
    """Return the state before each chunk (reverse: after it), and the state with all chunks.

    k (H, B, n, C, N), v (1 or H, B, n, C, D); S (H, B, N, D) is the state before them all (reverse:
    after them), None if it is 0. The chunks' states (H, B, n, N, D) are in k's dtype, None if all
    are 0; the last state (H, B, N, D) is float32.
    """
    n, dtype = k.shape[2], k.dtype
    updates = _transpose(mx.moveaxis(k, 2, 0)) @ mx.moveaxis(v, 2, 0)
    states, total = (_prefix_sum if n < 8 else _prefix_sum_matmul)(updates, reverse)
    total = total.reshape(total.shape[1:])
    if S is not None:
        states = S.astype(dtype)[None] if states is None else states + S.astype(dtype)
        total = S + total
    return (None if states is None else mx.moveaxis(states, 0, 2)), total


def _prefix_sum(updates: mx.array, reverse: bool) -> tuple[mx.array | None, mx.array]:
    """Return exclusive prefix sums of updates (n, ...), None for n = 1, and their sum (1, ...)."""
    updates = mx.split(updates, updates.shape[0])[:: -1 if reverse else 1]
    sums, total = [mx.zeros_like(updates[0])], updates[0].astype(mx.float32)
    for update in updates[1:]:
        sums.append(total.astype(update.dtype))
        total = total + update
    return mx.concatenate(sums[:: -1 if reverse else 1]) if len(updates) > 1 else None, total


def _prefix_sum_matmul(updates: mx.array, reverse: bool) -> tuple[mx.array, mx.array]:
    """Return the same by a product with a triangle of ones: one product, but slow for small n."""
    n = updates.shape[0]
    ones = mx.tri(n + 1, n, -1, dtype=updates.dtype)
    sums = (ones[::-1, ::-1] if reverse else ones) @ updates.reshape(n, -1)
    sums = sums.reshape(n + 1, *updates.shape[1:])
    prefix, total = (sums[1:], sums[:1]) if reverse else (sums[:n], sums[n:])
    return prefix, total.astype(mx.float32)


# ------------------------------------------------------------ one segment, forward and backward

Weights = Sequence[mx.array]  # Dx, Dy (H, D, N) and E (H, N, D) in the dtype of the GEMMs


class Saved(NamedTuple):
    """What a segment's forward pass leaves for its backward pass, small arrays first.

    Compute.saved_activations says how many of the last four are saved; None stands for the others.
    """

    state: mx.array | None  # S before the segment, (H, B, N, D)
    scores: mx.array  # (H, B, n, C, C)
    a: mx.array  # (H, B*T, D)
    prefix_states: mx.array | None = None  # S before each chunk, (H, B, n, N, D)
    # what encode and gate pass to the backward pass, (H, B*T, N) each: x and g, on CUDA h and y
    encoded: mx.array | None = None
    gate_output: mx.array | None = None
    q: mx.array | None = None  # (H, B*T, N)


N_ALWAYS_SAVED = 3  # the fields of Saved that are always saved


class Neurons(NamedTuple):
    """The activations of a segment, (H, B*T, N)."""

    x: mx.array
    q: mx.array  # rotated x
    y: mx.array


class Segment(NamedTuple):
    """What the forward and the backward pass of a segment take beside its bytes."""

    weights: Weights
    position: int  # of its first byte
    C: int
    mask: Mask | None = None


def forward_segment(
    vs: mx.array, S: mx.array | None, weights: Weights, position: int, C: int
) -> tuple[mx.array, mx.array, Neurons]:
    """Return v' (B, T, D), the float32 state after the segment (H, B, N, D), and its Neurons.

    vs is (B, T, D); S is the state before it, None if that is 0; `position` is that of its first
    byte.
    """
    o, S, saved, y = _forward_heads(vs, S, Segment(weights, position, C))
    x = elementwise.relu(saved.encoded)  # on CUDA it is h
    return add_and_norm(vs, o), S, Neurons(x, saved.q, y)


def read_segment(
    vs: mx.array, S: mx.array | None, weights: Weights, position: int, compute: Compute
) -> tuple[mx.array, mx.array]:
    """Return v' and the state as forward_segment does, computed by groups of heads."""

    def read_group(Dx, Dy, E, S=None):
        return _forward_heads(vs, S, Segment((Dx, Dy, E), position, compute.chunk))[:2]

    arrays = [*weights] if S is None else [*weights, S]
    o, states = zip(*by_groups(compute.groups, read_group, *arrays), strict=True)
    return add_and_norm(vs, sum(o[1:], o[0])), mx.concatenate(states)


def _forward_heads(
    vs: mx.array, S: mx.array | None, segment: Segment
) -> tuple[mx.array, mx.array, Saved, mx.array]:
    """Return o (B, T, D), the sum over these heads, their state after it, Saved, and y (H, B*T, N).

    The backward pass computes y anew.
    """
    (Dx, Dy, E), position, C, mask = segment
    B, T, D = vs.shape
    ops = fused_or_plain()
    v = vs.astype(Dx.dtype).reshape(1, B * T, D)
    encoded, q = ops.encode(v @ Dx, position, B)
    k, vc = _chunked(q, B, C), _chunked(v, B, C)
    scores = mx.tril(k @ _transpose(k), -1)
    prefix_states, new_state = _chunk_states(S, k, vc)
    a = (scores @ vc).astype(mx.float32)
    a = (a if prefix_states is None else a + k @ prefix_states).reshape(-1, B * T, D)
    g = ln(a).astype(Dx.dtype) @ Dy
    y, gate_output = ops.gate(encoded, g, mask)
    o = (y @ E).astype(mx.float32).sum(0).reshape(B, T, D)
    return o, new_state, Saved(S, scores, a, prefix_states, encoded, gate_output, q), y


class LaterSums(NamedTuple):
    """What the backward pass sums over the later segments, in float32; None is 0."""

    R: mx.array | None = None  # (H, B, N, D)
    dW: tuple[mx.array | None, ...] = (None, None, None)  # the gradients of the weights


def _backward_heads(
    vs: mx.array, do: mx.array, sums: LaterSums, saved: Saved, segment: Segment
) -> tuple[mx.array, LaterSums]:
    """Return dv (B, T, D) from do (B, T, D), and the sums with this segment added.

    dv lacks what reaches vs through the sum v + ln(o), which autodiff adds.
    """
    (Dx, Dy, E), position, C, mask = segment
    B, T, D = vs.shape
    ops = fused_or_plain()
    S, scores, a, prefix_states, encoded, gate_output, q = saved
    v = vs.astype(Dx.dtype).reshape(1, B * T, D)
    an = ln(a).astype(Dx.dtype)
    # what was not saved
    if q is None:
        h = v @ Dx if encoded is None else encoded  # relu(relu(h)) is relu(h)
        encoded, q = ops.encode(h, position, B)
    if gate_output is None:
        _, gate_output = ops.gate(encoded, an @ Dy, mask)

    # through o = y E, y = x * relu(g) and g = ln(a) Dy
    do = do.astype(Dx.dtype).reshape(1, B * T, D)
    dy = do @ _transpose(E)
    y, dg, residuals = ops.gate_gradients(encoded, gate_output, dy, mask)
    dan = (dg @ _transpose(Dy)).astype(mx.float32)
    da = mx.vjp(ln, [a], [dan])[1][0].astype(Dx.dtype)

    # through a, and through the states of other chunks and segments
    k, vc, dac = _chunked(q, B, C), _chunked(v, B, C), _chunked(da, B, C)
    if prefix_states is None:
        prefix_states, _ = _chunk_states(S, k, vc)
    suffix_states, R = _chunk_states(sums.R, k, dac, reverse=True)
    dscores = mx.tril(dac @ _transpose(vc), -1)
    dq = (dscores + _transpose(dscores)) @ k
    dvc = (_transpose(scores) @ dac).astype(mx.float32)
    if prefix_states is not None:
        dq = mx.addmm(dq, dac, _transpose(prefix_states))
    if suffix_states is not None:
        dq = mx.addmm(dq, vc, _transpose(suffix_states))
        dvc = dvc + k @ suffix_states
    dh = ops.encode_gradient(residuals, dq.reshape(q.shape), position, B)

    # the weights, and v
    dW = (
        _add_matmul(sums.dW[0], _transpose(v), dh),
        _add_matmul(sums.dW[1], _transpose(an), dg),
        _add_matmul(sums.dW[2], _transpose(y), do),
    )
    dv = (dvc.reshape(-1, B * T, D) + dh @ _transpose(Dx)).sum(0).reshape(B, T, D)
    return dv, LaterSums(R, dW)


# -------------------------------------------------------------------------------------------- layer


def segments(B: int, T: int, compute: Compute) -> list[tuple[int, int]]:
    """Return (begin, end) of each segment of T bytes: whole chunks, B * T up to segment_rows.

    An incomplete last chunk is a segment of its own. The segments of a very long block are larger,
    up to max_segment_rows, so that there are few to compile.
    """
    C = compute.chunk
    longest = min(math.ceil(T / MAX_SEGMENTS / C), compute.max_segment_rows // B // C) * C
    length = max(C, compute.segment_rows // B // C * C, longest)
    cuts = sorted({*range(0, T, length), T - T % C, T})
    return list(pairwise(cuts))


@lru_cache
def _streams(n: int) -> list[mx.Stream]:
    """Return n streams of the CPU; each computes in a thread of its own."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(n)]


def by_groups(n: int, function: Callable, *arrays: mx.array) -> list:
    """Split the arrays' first axis, the heads, into n groups; return `function` of each group.

    MLX's CPU computes the operations of a stream one after the other in one thread, so each group
    has a stream of its own.
    """
    if n == 1:
        return [function(*arrays)]
    results = []
    for stream, *part in zip(_streams(n), *(mx.split(a, n) for a in arrays), strict=True):
        with mx.stream(stream):
            results.append(function(*part))
    return results


def layer(
    v: mx.array,
    weights: Weights,
    compute: Compute,
    key: mx.array | None = None,
    dropout: float = 0.0,
    dropout_v: float = 0.0,
) -> mx.array:
    """Apply the layer to v (B, T, D); return v' (B, T, D) in float32.

    With a PRNG `key` the share `dropout` of y is dropped, and the share `dropout_v` of ln(o). The
    same key and Compute give the same masks. Without a key there is no dropout.
    """
    n = compute.groups
    mask_v = None
    if key is None:
        key = mx.random.key(0)  # nothing is drawn from it
        dropout = dropout_v = 0.0
    if dropout_v:
        key, key_v = mx.random.split(key)  # a key that no mask on y has
        mask_v = dropout_mask(key_v, dropout_v, v.shape)
    keys = key[None] if n == 1 else mx.random.split(key, n)

    def run_group(group_key, *group_weights):
        return _group_output(v, group_weights, compute, group_key[0], dropout)

    o = by_groups(n, run_group, keys, *weights)
    return add_and_norm(v, sum(o[1:], o[0]), dropout_scale(mask_v, mx.float32))


def _group_output(
    v: mx.array, weights: Weights, compute: Compute, key: mx.array, dropout: float
) -> mx.array:
    """Return o (B, T, D), the sum over these heads.

    Its gradient is computed in the same stream, on the same core, as o.
    """
    parts = segments(*v.shape[:2], compute)
    segmented = _SegmentedHeads(compute, parts, mx.random.split(key, len(parts)), dropout)
    stream = None if compute.groups == 1 else mx.default_stream(mx.cpu)
    forward = mx.custom_function(segmented.forward)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        with mx.stream(stream) if stream else nullcontext():
            return segmented.gradients(primals, cotangents[0], outputs[1:])

    return forward(v, *weights)[0]


class _SegmentedHeads(NamedTuple):
    """Heads over all segments of a block, one after the other, forward and backward."""

    compute: Compute
    parts: list[tuple[int, int]]  # (begin, end) of each segment
    keys: mx.array  # of each segment's dropout
    dropout: float  # the share of y that is dropped

    def forward(self, v: mx.array, *weights: mx.array) -> tuple[mx.array, ...]:
        """Return o (B, T, D), and what each segment saves: `n_saved` arrays, one after the other.

        An array of shape (1,) stands for None.
        """
        out, saved = [], []
        S = None
        weights = [w.astype(self.compute.dtype) for w in weights]
        for key_i, (begin, end) in zip(self.keys, self.parts, strict=True):
            # wait for the previous segment; without key_i here, all masks are drawn at once
            vs, key_i = mx.depends([v[:, begin:end], key_i], out[-1:] or [v])
            segment = self.segment(weights, vs, begin, key_i)
            o, S, arrays, _ = _forward_heads(vs, S, segment)
            out.append(o)
            saved += [mx.zeros(1) if a is None else a for a in arrays[: self.n_saved]]
        return mx.concatenate(out, 1), *saved

    def gradients(
        self, primals: Sequence[mx.array], do: mx.array, saved: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        """Return dv and dW from do (B, T, D); `primals` are the inputs of `forward`."""
        v, *weights = primals
        weights = [w.astype(self.compute.dtype) for w in weights]
        n = self.n_saved
        dv = []
        sums = LaterSums()
        for i, (begin, end) in reversed(list(enumerate(self.parts))):
            inputs = [v[:, begin:end], do[:, begin:end], self.keys[i], *saved[i * n : (i + 1) * n]]
            vs, do_i, key_i, *arrays = mx.depends(inputs, [dv[-1], *sums.dW] if dv else [do])
            arrays = Saved(*(None if a.shape == (1,) else a for a in arrays))
            segment = self.segment(weights, vs, begin, key_i)
            dv_i, sums = _backward_heads(vs, do_i, sums, arrays, segment)
            dv.append(dv_i)
        return *mx.depends([mx.concatenate(dv[::-1], 1)], list(sums.dW)), *sums.dW

    @property
    def n_saved(self) -> int:
        """Return how many fields of Saved are saved."""
        return N_ALWAYS_SAVED + self.compute.saved_activations

    def segment(self, weights: Weights, vs: mx.array, begin: int, key: mx.array) -> Segment:
        """Return the Segment of vs (B, T, D), with its mask drawn."""
        (B, T, _), (H, _, N) = vs.shape, weights[0].shape
        mask = fused_or_plain().dropout_mask(key, self.dropout, (H, B * T, N))
        return Segment(weights, begin, self.compute.chunk, mask)
