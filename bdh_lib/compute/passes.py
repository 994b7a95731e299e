"""A layer's passes over activations (H, B*T, N), in plain operations of MLX; and dropout.

passes_cuda.py has the same functions, each one kernel. What encode, gate and gate_gradients hand on
(`x`, `saved`, `rest`) is for the functions of the same module.
"""

import math

import mlx.core as mx

from bdh_lib.compute.rope import rotate


def dropout_mask(key: mx.array, rate: float, shape: tuple):
    """Draw 8 random bits per neuron, the limit below which it is dropped, and the scale.

    The mask is None for rate 0. A 32-bit draw serves four neurons: a draw for each would cost more
    than a GEMM. 256 * rate is seldom an integer: the limit is drawn from its two neighbours, so the
    mean rate is exact.
    """
    if not rate:
        return None
    size, (bits_key, limit_key) = math.prod(shape), mx.random.split(key)
    bits = mx.random.split(bits_key, -(-size // 8)).view(mx.uint8).reshape(-1)[:size]
    limit = mx.minimum(256 * rate + mx.random.uniform(key=limit_key), 255).astype(mx.uint8)
    return bits.reshape(shape), limit, 1 / (1 - rate)


def dropout_scale(mask, dtype):
    """Return 0 or 1 / (1 - rate) for each entry of a dropout mask; 1 without a mask."""
    if mask is None:
        return 1
    bits, limit, scale = mask
    return mx.where(bits >= limit, mx.array(scale, dtype), mx.array(0, dtype))


MAIN_STREAM = mx.default_stream(mx.cpu)


def relu(x: mx.array) -> mx.array:
    """Return max(x, 0).

    mx.compile merges equal operations across streams, such as a 0 made as large as x, and then
    does not fuse them. The 0 that depends on x is not equal to that of another stream; but it
    holds x, whose memory the result could else take, so that one stream alone has a plain 0.
    """
    zero = mx.array(0, x.dtype)
    if mx.default_stream(mx.cpu) != MAIN_STREAM:
        (zero,) = mx.depends([zero], [x])
    return mx.maximum(x, zero)


@mx.compile
def _gate(x, g, mask):
    return x * (relu(g) * dropout_scale(mask, x.dtype) if mask else relu(g))


# mx.sign below stands for mx.where, which is clearer but costs ten times as much on a CPU.


@mx.compile
def _gate_dg(x, g, dy, mask):
    dg = dy * x * mx.sign(relu(g))
    return dg * dropout_scale(mask, x.dtype) if mask else dg


@mx.compile
def _gate_dh(x, g, dy, dq, mask):
    dx = dy * relu(g)
    return ((dx * dropout_scale(mask, x.dtype) if mask else dx) + dq) * mx.sign(x)


def _rotate(x, position, B, sign=1):
    return rotate(x.reshape(x.shape[0], B, -1, x.shape[-1]), position, sign).reshape(x.shape)


def encode(h, position: int, B: int):
    """Return x = relu(h) and q, x rotated by the positions of its bytes."""
    x = relu(h)
    return x, _rotate(x, position, B)


def gate(x, g, mask):
    """Return y = x * relu(g), with dropout, and what the backward pass needs of g and y."""
    return _gate(x, g, mask), g


def gate_gradients(x, saved, dy, mask):
    """Return y, dg, and the rest of dh for encode_gradient, from dy."""
    return _gate(x, saved, mask), _gate_dg(x, saved, dy, mask), (x, saved, dy, mask)


def encode_gradient(rest, dq, position: int, B: int):
    """Return dh from dq."""
    x, g, dy, mask = rest
    return _gate_dh(x, g, dy, _rotate(dq, position, B, -1), mask)
