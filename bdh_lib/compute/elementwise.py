"""A layer's elementwise operations on activations (H, B*T, N) in plain MLX, and dropout.

elementwise_cuda.py has the same four functions, each as one kernel: encode, gate, and their
gradients. The two modules pass different arrays from one function to the next (`encoded` and
`gate_output` of layer.py, and `residuals`), so take all four from the same module.
"""

import math
from typing import Any

import mlx.core as mx

from bdh_lib.compute.rope import rotate

Mask = tuple[Any, ...]  # what dropout_mask of a module gives to the other functions of it


def dropout_mask(key: mx.array, rate: float, shape: tuple[int, ...]) -> Mask | None:
    """Draw a mask: 8 random bits per neuron, the limit below which it is dropped, and the scale.

    The mask is None for rate 0. A 32-bit draw serves four neurons: a draw for each would cost more
    than a GEMM. 256 * rate is seldom an integer: the limit is drawn from its two neighbours, so the
    mean rate is exact up to 255/256.
    """
    if not rate:
        return None
    size = math.prod(shape)
    bits_key, limit_key = mx.random.split(key)
    bits = mx.random.split(bits_key, -(-size // 8)).view(mx.uint8).reshape(-1)[:size]
    limit = mx.minimum(256 * rate + mx.random.uniform(key=limit_key), 255).astype(mx.uint8)
    return bits.reshape(shape), limit, 1 / (1 - rate)


def dropout_scale(mask: Mask | None, dtype: mx.Dtype) -> mx.array | int:
    """Return the factor of each neuron, 0 or 1 / (1 - rate), in the mask's shape; 1 without one."""
    if mask is None:
        return 1
    bits, limit, scale = mask
    return mx.where(bits >= limit, mx.array(scale, dtype), mx.array(0, dtype))


MAIN_STREAM = mx.default_stream(mx.cpu)


def relu(x: mx.array) -> mx.array:
    """Return max(x, 0).

    With several streams, mx.compile merges their equal operations, such as the broadcast of a 0,
    and then does not fuse them. There the 0 depends on x, so that no other stream's is equal. In
    the main stream it is a plain 0: one that depends on x keeps x's memory from the result.
    """
    zero = mx.array(0, x.dtype)
    if mx.default_stream(mx.cpu) != MAIN_STREAM:
        (zero,) = mx.depends([zero], [x])
    return mx.maximum(x, zero)


@mx.compile
def _gate(x: mx.array, g: mx.array, mask: Mask | None) -> mx.array:
    return x * (relu(g) * dropout_scale(mask, x.dtype) if mask else relu(g))


# mx.sign below stands for mx.where, which is clearer but costs ten times as much on a CPU.


@mx.compile
def _gate_dg(x: mx.array, g: mx.array, dy: mx.array, mask: Mask | None) -> mx.array:
    dg = dy * x * mx.sign(relu(g))
    return dg * dropout_scale(mask, x.dtype) if mask else dg


@mx.compile
def _gate_dh(x: mx.array, g: mx.array, dy: mx.array, dq: mx.array, mask: Mask | None) -> mx.array:
    dx = dy * relu(g)
    return ((dx * dropout_scale(mask, x.dtype) if mask else dx) + dq) * mx.sign(x)


def _rotate(x: mx.array, position: int, B: int, sign: int = 1) -> mx.array:
    return rotate(x.reshape(x.shape[0], B, -1, x.shape[-1]), position, sign).reshape(x.shape)


def encode(h: mx.array, position: int, B: int) -> tuple[mx.array, mx.array]:
    """Return x = relu(h), and q: x rotated by the positions of its bytes, the first `position`."""
    x = relu(h)
    return x, _rotate(x, position, B)


def gate(x: mx.array, g: mx.array, mask: Mask | None) -> tuple[mx.array, mx.array]:
    """Return y = x * relu(g) with dropout, and g, which the backward pass takes."""
    return _gate(x, g, mask), g


def gate_gradients(
    x: mx.array, g: mx.array, dy: mx.array, mask: Mask | None
) -> tuple[mx.array, mx.array, tuple]:
    """Return y, dg, and `residuals`, from which encode_gradient takes dy's part of dh."""
    return _gate(x, g, mask), _gate_dg(x, g, dy, mask), (x, g, dy, mask)


def encode_gradient(residuals: tuple, dq: mx.array, position: int, B: int) -> mx.array:
    """Return dh from `residuals` and dq."""
    x, g, dy, mask = residuals
    return _gate_dh(x, g, dy, _rotate(dq, position, B, -1), mask)
