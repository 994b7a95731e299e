"""The rotation of neurons by the position of their byte, and of a state with it."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

ROPE_BASE = 2.0**16  # longest wavelength of the rotation, in units of 2 pi bytes


@lru_cache(maxsize=2)
def _rope_table(T: int, N: int) -> mx.array:
    """exp(i t w) of t < T and each neuron pair's w, (T, N/2), from float64."""
    return mx.array(rope_phases(np.arange(T), N))


@mx.compile
def _apply_rope(x, turns):
    return (x.view(mx.complex64) * turns).view(mx.float32)


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def rotate(x: mx.array, position: int = 0, sign: int = 1) -> mx.array:
    """Turn neuron pairs (2i, 2i+1) of x (.., T, N) by t * ROPE_BASE^(-2i/N), t from `position` on.

    sign -1 turns back. mx.fast.rope is slow on a CPU, where pairs are read as complex numbers.
    """
    T, N = x.shape[-2:]
    if on_gpu() or x.dtype != mx.float32:
        flat = x.reshape(1, -1, T, N)  # its kernels share a sine among the rows of the second axis
        how = {"traditional": True, "base": ROPE_BASE, "scale": float(sign), "offset": position}
        return mx.fast.rope(flat, N, **how).reshape(x.shape)
    turns = _rope_table(T, N)
    if position:
        turns = turns * mx.array(rope_phases(position, N))
    turns = turns if sign > 0 else mx.conjugate(turns)
    turned = mx.custom_function(lambda x: _apply_rope(x, turns))
    turned.vjp(lambda _, cotangent, __: _apply_rope(cotangent, mx.conjugate(turns)))
    return turned(x)


def frequencies(N: int) -> np.ndarray:
    """Radians that each pair of neurons turns at a byte, (N/2,) float64."""
    return ROPE_BASE ** (-np.arange(0, N, 2) / N)


def phase_increments(position: int, N: int) -> np.ndarray:
    """By how much the N/2 pairs have turned at `position`, uint32 in 2^-32 of a circle: such sums
    and products wrap as angles do. As exact as `rope_phases`.
    """
    circles = position * frequencies(N) / (2 * np.pi) % 1
    return np.round(circles * 2**32).astype(np.uint64).astype(np.uint32)


def rope_phases(positions, N: int) -> np.ndarray:
    """exp(i t w) of positions t for the N/2 pairs of neurons: (.., N/2) complex64 from float64."""
    angles = np.multiply.outer(positions, frequencies(N))
    return np.exp(1j * angles).astype(np.complex64)


def rotate_state(S: mx.array, by: int) -> mx.array:
    """Synapses (.., N, D) as written `by` bytes later (earlier if negative): the paper's U^by.

    Only distances between positions matter, so a stream need never reach positions that float32
    cannot hold.
    """
    if not by:
        return S
    *rest, N, D = S.shape
    z = rope_phases(by, N)
    cos, sin = (mx.array(np.ascontiguousarray(part))[:, None] for part in (z.real, z.imag))
    a, b = (s.squeeze(-2) for s in mx.split(S.reshape(*rest, N // 2, 2, D), 2, -2))
    return mx.stack([a * cos - b * sin, a * sin + b * cos], -2).reshape(S.shape)
