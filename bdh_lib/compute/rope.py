"""Rotation of neurons, and of a state, by the position of their byte (RoPE)."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from bdh_lib.compute.device import on_gpu

ROPE_BASE = 2.0**16  # longest wavelength of the rotation, in units of 2 pi bytes


@lru_cache(maxsize=2)
def _rope_table(T: int, N: int) -> mx.array:
    """Return exp(i t w) of t < T and each pair's frequency w, (T, N/2), computed in float64."""
    return mx.array(rope_phases(np.arange(T), N))


@mx.compile
def _apply_rope(x: mx.array, phases: mx.array) -> mx.array:
    return (x.view(mx.complex64) * phases).view(mx.float32)


def rotate(x: mx.array, position: int = 0, sign: int = 1) -> mx.array:
    """Rotate neuron pairs (2i, 2i+1) of x (.., T, N) by the angle t * ROPE_BASE^(-2i/N).

    t is the position of a byte; `position` is that of the first. sign -1 rotates back. mx.fast.rope
    is slow on a CPU: there, pairs are complex numbers.
    """
    T, N = x.shape[-2:]
    if on_gpu() or x.dtype != mx.float32:
        flat = x.reshape(1, -1, T, N)  # the rows of the second axis share sines in its kernels
        options = {"traditional": True, "base": ROPE_BASE, "scale": float(sign), "offset": position}
        return mx.fast.rope(flat, N, **options).reshape(x.shape)
    phases = _rope_table(T, N)
    if position:
        phases = phases * mx.array(rope_phases(position, N))
    phases = phases if sign > 0 else mx.conjugate(phases)
    (phases,) = mx.depends([phases], [x])  # or mx.compile does not fuse them: see elementwise.relu
    rope = mx.custom_function(lambda x: _apply_rope(x, phases))
    rope.vjp(lambda _, cotangent, __: _apply_rope(cotangent, mx.conjugate(phases)))
    return rope(x)


def frequencies(N: int) -> np.ndarray:
    """Return the radians per byte of each pair of neurons, (N/2,) float64."""
    return ROPE_BASE ** (-np.arange(0, N, 2) / N)


def phase_increments(position: int, N: int) -> np.ndarray:
    """Return the phases of the N/2 pairs at `position`, uint32 in units of 2^-32 of a circle.

    They are computed in float64. Their sums and products wrap as angles do.
    """
    circles = position * frequencies(N) / (2 * np.pi) % 1
    return np.round(circles * 2**32).astype(np.uint64).astype(np.uint32)


def rope_phases(positions: int | np.integer | np.ndarray, N: int) -> np.ndarray:
    """Return exp(i t w) of positions t (..) for the N/2 pairs: (.., N/2) complex64.

    The angles are computed in float64, so they are exact at any position.
    """
    angles = np.multiply.outer(positions, frequencies(N))
    return np.exp(1j * angles).astype(np.complex64)


def rotate_state(S: mx.array, shift: int) -> mx.array:
    """Rotate synapses (.., N, D) to what they are if written `shift` bytes later: paper's U^shift.

    A negative shift means earlier. Only distances between positions matter, so float32 never has to
    hold a large position.
    """
    if not shift:
        return S
    *batch, N, D = S.shape
    z = rope_phases(shift, N)
    cos, sin = (mx.array(np.ascontiguousarray(part))[:, None] for part in (z.real, z.imag))
    a, b = (pair.squeeze(-2) for pair in mx.split(S.reshape(*batch, N // 2, 2, D), 2, -2))
    return mx.stack([a * cos - b * sin, a * sin + b * cos], -2).reshape(S.shape)
