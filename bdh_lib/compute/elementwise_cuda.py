"""The functions of elementwise.py on a CUDA GPU, each as one kernel of elementwise_cuda.cu.

Such a kernel takes as long as the memory that it moves, so it reads and writes few arrays. relu(h)
is not written: its readers compute it. The backward pass takes y instead of g: relu(g) with dropout
is y / x. So only the forward pass needs the dropout mask. Its kernel draws the mask from a key and
the neuron's index, and the mask is never in memory.
"""

from functools import lru_cache

import mlx.core as mx

from bdh_lib.compute.cuda_kernel import Kernel, cuda_kernel
from bdh_lib.compute.device import on_cuda
from bdh_lib.compute.elementwise import Mask
from bdh_lib.compute.rope import phase_increments

THREADS = 256  # per block
STEPS = 1 << 16  # of the dropout rate

ROPE_ARGUMENTS = "begin, increments, {0}_shape[0], {0}_shape[1], {0}_shape[2]"
FLAT = "(size_t)h_shape[0] * h_shape[1] * h_shape[2]"
ENCODE = (
    "encode",
    ("h", "begin", "increments"),
    ("q",),
    f"bdh::encode<T, V>(h, {ROPE_ARGUMENTS.format('h')}, q);",
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
    f"bdh::encode_gradient<T, V>(dx, dq, {ROPE_ARGUMENTS.format('dx')}, dh);",
)


def is_available() -> bool:
    """Tell whether the kernels run on this device."""
    return on_cuda()


def dropout_mask(key: mx.array, rate: float, shape: tuple[int, ...]) -> Mask | None:
    """Return four words from which `gate` draws a mask, and the rate in STEPS; None for rate 0."""
    limit = min(round(rate * STEPS), STEPS - 1)
    # one key of 8 bytes would be in the host's memory, where a kernel reads it slowly
    return (mx.random.split(key), limit) if limit else None


def encode(h: mx.array, position: int, B: int) -> tuple[mx.array, mx.array]:
    """Return h, and q: relu(h) rotated by the positions of its bytes, the first `position`."""
    return h, _run_kernel(ENCODE, [_unfold_batch(h, B), *_phases(position, h.shape[-1])], h)


def gate(h: mx.array, g: mx.array, mask: Mask | None) -> tuple[mx.array, mx.array]:
    """Return y = relu(h) * relu(g) with dropout, twice: the backward pass takes y, not g."""
    key, limit = mask or (mx.zeros((2, 2), mx.uint32), 0)
    y = _run_kernel(GATE, [h, g, key], h, limit)
    return y, y


def gate_gradients(
    h: mx.array, y: mx.array, dy: mx.array, mask: Mask | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Return y, dg, and dx: dy's part of dh, which encode_gradient takes."""
    return y, *_run_kernel(GATE_GRADIENTS, [h, y, dy], h, mask[1] if mask else 0)


def encode_gradient(dx: mx.array, dq: mx.array, position: int, B: int) -> mx.array:
    """Return dh from dx and dq."""
    phases = _phases(position, dx.shape[-1])
    return _run_kernel(ENCODE_GRADIENT, [_unfold_batch(dx, B), _unfold_batch(dq, B), *phases], dx)


def _unfold_batch(x: mx.array, B: int) -> mx.array:
    """Reshape x (H, B*T, N) to (H*B, T, N), a view."""
    return x.reshape(x.shape[0] * B, -1, x.shape[-1])


@lru_cache(maxsize=64)
def _phases(position: int, N: int) -> tuple[mx.array, mx.array]:
    """Return the phases of `position` and their increments per byte, (N/2,) uint32 each."""
    return mx.array(phase_increments(position, N)), mx.array(phase_increments(1, N))


def _run_kernel(
    kernel: Kernel, inputs: list[mx.array], like: mx.array, limit: int | None = None
) -> mx.array | list[mx.array]:
    """Run a kernel whose outputs have the shape and type of `like`; return its only one, or all.

    A kernel with a dropout `limit` takes each neuron by itself. One without rotates: a thread takes
    a position in every row of the first input, since the rows share sines.
    """
    N, rows = like.shape[-1], 1 if limit is not None else inputs[0].shape[0]
    V = 2 if N % 8 else 8
    count = len(kernel[2])
    template = [("T", like.dtype), ("V", V)]
    outputs = cuda_kernel("elementwise_cuda.cu", kernel)(
        inputs=inputs,
        output_shapes=[like.shape] * count,
        output_dtypes=[like.dtype] * count,
        template=template + ([] if limit is None else [("LIMIT", limit)]),
        grid=(like.size // rows // V, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    return outputs if count > 1 else outputs[0]
