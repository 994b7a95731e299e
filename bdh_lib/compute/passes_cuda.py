"""A layer's passes over activations on a CUDA GPU: passes.py, each function one kernel.

These passes take as long as the memory they move, so an array is read and written as seldom as can
be. relu(h) is not written: its readers compute it. The backward pass takes y instead of g, since
relu(g) with dropout is y / x: so it needs no dropout mask, which the forward pass draws inside the
kernel, from a key and the neuron's place. Nothing else reads the mask, so it is never in memory.
"""

from functools import lru_cache
from pathlib import Path

import mlx.core as mx

from bdh_lib.compute.device import on_cuda
from bdh_lib.compute.rope import phase_increments

THREADS = 256  # per block
STEPS = 1 << 16  # of the dropout rate

# name, inputs, outputs and call of each kernel; MLX passes the arguments that a call names
TURNED = "begin, increments, {0}_shape[0], {0}_shape[1], {0}_shape[2]"
FLAT = "(size_t)h_shape[0] * h_shape[1] * h_shape[2]"
ENCODE = (
    "encode",
    ("h", "begin", "increments"),
    ("q",),
    f"bdh::encode<T, V>(h, {TURNED.format('h')}, q);",
)
GATE = ("gate", ("h", "g", "key"), ("y",), f"bdh::gate<T, V, LIMIT>(h, g, key, {FLAT}, y);")
GATE_GRADIENTS = (
    "gate_gradients",
    ("h", "y", "dy"),
    ("dg", "dx"),
    f"bdh::gate_gradients<T, V, LIMIT>(h, y, dy, {FLAT}, dg, dx);",
)
ENCODE_GRADIENT = (
    "encode_gradient",
    ("dx", "dq", "begin", "increments"),
    ("dh",),
    f"bdh::encode_gradient<T, V>(dx, dq, {TURNED.format('dx')}, dh);",
)

fits = on_cuda  # the layer asks this name whether to take these passes


def dropout_mask(key: mx.array, rate: float, shape: tuple):
    """Return four words to draw a mask from, and the rate in STEPS; None for rate 0."""
    limit = min(round(rate * STEPS), STEPS - 1)
    # one key of 8 bytes would be in the host's memory, where a kernel reads it slowly
    return (mx.random.split(key), limit) if limit else None


def encode(h, position: int, B: int):
    """Return h and q, relu(h) rotated by the positions of its bytes."""
    return h, _run(ENCODE, [_rows(h, B), *_phases(position, h.shape[-1])], h)


def gate(h, g, mask):
    """Return y = relu(h) * relu(g), with dropout, twice: the backward pass needs no g."""
    key, limit = mask or (mx.zeros((2, 2), mx.uint32), 0)
    y = _run(GATE, [h, g, key], h, limit)
    return y, y


def gate_gradients(h, y, dy, mask):
    """Return y, dg, and the rest of dh for encode_gradient, from dy."""
    return y, *_run(GATE_GRADIENTS, [h, y, dy], h, mask[1] if mask else 0)


def encode_gradient(dx, dq, position: int, B: int):
    """Return dh from dq."""
    return _run(ENCODE_GRADIENT, [_rows(dx, B), _rows(dq, B), *_phases(position, dx.shape[-1])], dx)


def _rows(x, B):
    """Reshape x (H, B*T, N) to (H*B, T, N), a view."""
    return x.reshape(x.shape[0] * B, -1, x.shape[-1])


@lru_cache(maxsize=64)
def _phases(position, N):
    return mx.array(phase_increments(position, N)), mx.array(phase_increments(1, N))


def _run(kernel, inputs, like, limit=None):
    """Run a kernel whose outputs are of the shape and type of `like`; return its only one, or all.

    The first input's rows share sines, unless there is a `limit` and so no sine.
    """
    N, rows = like.shape[-1], 1 if limit is not None else inputs[0].shape[0]
    V = 2 if N % 8 else 8
    count, template = len(kernel[2]), [("T", like.dtype), ("V", V)]
    outputs = _kernel(*kernel)(
        inputs=inputs,
        output_shapes=[like.shape] * count,
        output_dtypes=[like.dtype] * count,
        template=template + ([] if limit is None else [("LIMIT", limit)]),
        grid=(like.size // rows // V, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    return outputs if count > 1 else outputs[0]


@lru_cache
def _kernel(name, inputs, outputs, call):
    # included and not inserted: MLX hashes the text at every launch
    header = f'#include "{Path(__file__).resolve().with_suffix(".cu")}"\n'
    return mx.fast.cuda_kernel(name, list(inputs), list(outputs), call, header)
