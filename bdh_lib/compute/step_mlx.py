"""One byte through the layers on a GPU, in plain MLX operations: the only form that Metal can run.

S is not rewritten at each byte: a buffer holds the last bytes (state.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from bdh_lib.compute.layer import add_and_norm, ln
from bdh_lib.compute.rope import phase_increments

BUFFER_BYTES = 24  # each byte rewrites their keys; S is rewritten once in so many bytes
PARTS = 32  # of the neurons in `recall`, at most; a power of two


class ByteBuffer(NamedTuple):
    """The last `count` bytes, which are not in the synapses yet."""

    count: int
    keys: tuple[mx.array, ...]  # per layer, rotated x: (H, B, BUFFER_BYTES, N)
    values: tuple[mx.array, ...]  # (B, BUFFER_BYTES, D)
    begin: mx.array  # phases of the buffer's first byte
    base_synapses: tuple[mx.array, ...]  # per layer, the synapses
    decode_step: "DecodeStep"  # the step that reads and writes it

    is_int8 = False  # class attribute: the step reads the float32 synapses

    def keys_and_values(self) -> list[tuple[mx.array, mx.array]]:
        """Return the keys (H, B, N, count) and values (B, count, D) per layer, float32."""
        layers = zip(self.keys, self.values, strict=True)
        cut = [(k[..., : self.count, :], v[:, : self.count]) for k, v in layers]
        return [(k.swapaxes(-1, -2).astype(mx.float32), v) for k, v in cut]


class DecodeStep:
    """Reads one byte, with the model's weights in the dtype of the products."""

    def __init__(self, model, source: tuple = ()):
        self.source = source  # what it is made of; state.py makes another when that has changed
        H, D, N = model.encoder.shape
        self.dtype = model.compute.dtype
        encoder, encoder_v, decoder = model.weights()
        decoder = mx.contiguous(decoder.swapaxes(-1, -2))  # (H, D, N), see `step`
        weights = [w.astype(self.dtype) for w in (encoder, encoder_v, decoder)]
        self.weights = [ln(model.embed.weight), *weights, mx.array(phase_increments(1, N))]
        self.shape = H, D, N, model.config.n_layer
        self.compiled = mx.compile(step)
        mx.eval(self.weights)

    def new_buffer(self, position: int, synapses: tuple[mx.array, ...], B: int) -> ByteBuffer:
        """Make an empty buffer for B rows."""
        H, D, N, L = self.shape
        keys = tuple(mx.zeros((H, B, BUFFER_BYTES, N), self.dtype) for _ in range(L))
        values = tuple(mx.zeros((B, BUFFER_BYTES, D)) for _ in range(L))
        base_synapses = tuple(synapses) or (mx.zeros((H, 1, N, D)),) * L
        return ByteBuffer(
            0, keys, values, mx.array(phase_increments(position, N)), base_synapses, self
        )

    def step(self, idx: mx.array, buffer: ByteBuffer) -> tuple[mx.array, ByteBuffer]:
        """Read one byte idx (B, 1); return v (B, 1, D) and the new buffer."""
        arrays = buffer.keys, buffer.values, buffer.begin, buffer.base_synapses
        v, keys, values = self.compiled(idx, self.weights, mx.array(buffer.count), arrays)
        return v, buffer._replace(count=buffer.count + 1, keys=keys, values=values)


def recall(q: mx.array, S: mx.array) -> mx.array:
    """Return q @ S (H, B, 1, D) of q (H, B, 1, N) and S (H, B or 1, N, D).

    The neurons are split into parts, whose products are summed. In one product, Metal would compute
    the D sums of a head in D / 32 threadgroups, too few to occupy its GPU.
    """
    (H, B, _, N), (*rows, _, D) = q.shape, S.shape
    parts = math.gcd(N, PARTS)
    return (q.reshape(H, B, parts, 1, -1) @ S.reshape(*rows, parts, -1, D)).sum(2)


def step(
    idx: mx.array, weights: Sequence[mx.array], count: mx.array, arrays: tuple
) -> tuple[mx.array, tuple[mx.array, ...], tuple[mx.array, ...]]:
    """Read one byte idx (B, 1); return v (B, 1, D) and the new keys and values.

    `weights` is that of DecodeStep, `arrays` are keys, values, begin and base_synapses of
    ByteBuffer. `decoder` is (H, D, N): Metal multiplies by a transposed matrix in more
    threadgroups.
    """
    keys, values, begin, base_synapses = arrays
    embed, encoder, encoder_v, decoder, increments = weights
    (H, D, N), B, dtype = encoder.shape, idx.shape[0], encoder.dtype
    angles = (begin + count.astype(mx.uint32) * increments).view(mx.int32) * (math.pi / 2**31)
    cos, sin = mx.cos(angles), mx.sin(angles)
    slot = mx.arange(keys[0].shape[2])
    is_new = (slot == count)[:, None]
    v = embed[idx]
    updated = []
    for S, K, V in zip(base_synapses, keys, values, strict=True):
        x = mx.maximum(v.astype(dtype).reshape(1, B, D) @ encoder, 0)  # (H, B, N)
        x0, x1 = mx.split(x.astype(mx.float32).reshape(H, B, N // 2, 2), 2, -1)
        x0, x1 = x0[..., 0], x1[..., 0]
        q = mx.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).reshape(H, B, 1, N)
        scores = mx.where(mx.less(slot, count), q.astype(dtype) @ K.swapaxes(-1, -2), 0)
        a = (recall(q, S) + scores.astype(mx.float32) @ V).reshape(H, B, D)
        y = x * mx.maximum(ln(a).astype(dtype) @ encoder_v, 0)
        o = (y @ decoder.swapaxes(-1, -2)).astype(mx.float32).sum(0)
        updated.append((mx.where(is_new, q.astype(dtype), K), mx.where(is_new, v, V)))
        v = add_and_norm(v, o.reshape(B, 1, D))
    return v, *zip(*updated, strict=True)
