"""One byte through the layers on a CUDA GPU, by kernels that read only active neurons.

In a trained model about a quarter of the neurons are active, so most rows of encoder_v and decoder
and half of the synapses are not needed. MLX has no product that skips rows; the kernels `recall`
and `fire` (step_cuda.cu) skip them. With bfloat16 products the kernels read int8 synapses with one
scale per row, whose error is a fifteenth of that of bfloat16 weights. The state stays float32:
`fold` adds the buffer to it and makes the int8 copy in one pass. With float32 products only MLX's
own products round: on CUDA they are TF32 unless MLX_ENABLE_TF32=0.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from bdh_lib.compute.cuda_kernel import Kernel, cuda_kernel
from bdh_lib.compute.device import on_gpu
from bdh_lib.compute.layer import ln
from bdh_lib.compute.rope import phase_increments

BUFFER_BYTES = 64  # a warp's lanes hold two scores each
PAIRS, PAIRS_ONE = 32, 16  # of a warp at a time, at most; for B = 1 it also computes x
NEURONS, NEURONS_ONE = 128, 32  # the same for `fire`
THREADS = 256  # per block, at most
BLOCKS = 2048  # per launch; `fire` takes half as many, the others twice (docs/log.md)

OutputSpec = tuple[tuple[int, ...], mx.Dtype]  # shape and type
RECALL_INPUTS = ("v", "S", "scales", "keys", "values")
RECALL_INPUTS += ("begin", "increments", "count", "done", "previous_v")
BUFFER_ARGUMENTS = (
    "(const Q*)S, scales, S_shape[1], (T*)keys, (T*)values, begin, increments, count[0], "
    "(unsigned*)done, "
)
RECALL = (
    "recall",
    (*RECALL_INPUTS, "x"),
    ("parts", "a"),
    "bdh::recall<true, T, Q, D, W, G, K>(x, (T*)nullptr, v, (const T*)nullptr, "
    + BUFFER_ARGUMENTS
    + "x_shape[1], x_shape[2], parts, a);",
)
RECALL_ONE = (
    "recall_one",
    (*RECALL_INPUTS, "encoder"),
    ("parts", "a", "x"),
    "bdh::recall<false, T, Q, D, W, G, K>((const T*)nullptr, x, v, encoder, "
    + BUFFER_ARGUMENTS
    + "1, encoder_shape[1], parts, a);",
)
FIRE = (
    "fire",
    ("x", "g", "v", "decoder", "done"),
    ("parts", "v_out", "v_cast"),
    "bdh::fire<true, T, D, W, G>(x, g, (const T*)nullptr, v, (const T*)nullptr, decoder, "
    "(unsigned*)done, x_shape[0], x_shape[1], x_shape[2], parts, v_out, v_cast);",
)
FIRE_ONE = (
    "fire_one",
    ("x", "a", "v", "encoder_v", "decoder", "done"),
    ("parts", "v_out", "v_cast"),
    "bdh::fire<false, T, D, W, G>(x, (const T*)nullptr, a, v, encoder_v, decoder, "
    "(unsigned*)done, x_shape[0], 1, x_shape[2], parts, v_out, v_cast);",
)
FOLD = (
    "fold",
    ("S", "keys", "values", "previous_v"),
    ("S_sum", "S_int8", "scales"),
    "bdh::fold<true, D, W, K>(S, S_shape[1], (const unsigned short*)keys, "
    "(const unsigned short*)values, values_shape[0], S_shape[2], S_sum, (int8_t*)S_int8, scales);",
)
QUANTIZE = (
    "quantize",
    ("S",),
    ("S_int8", "scales"),
    "bdh::fold<false, D, W, K>(S, S_shape[1], nullptr, nullptr, S_shape[1], S_shape[2], nullptr, "
    "(int8_t*)S_int8, scales);",
)


class ByteBuffer(NamedTuple):
    """The last `count` bytes, which are not in the synapses yet.

    States share the arrays. A state that holds all their bytes (`shared_length`) writes the next
    byte in place; any other copies them first. MLX's graph does not show the write, so later work
    must wait for the byte's v.
    """

    count: int
    keys: tuple[mx.array, ...]  # per layer, rotated x: (H, B, N/2, BUFFER_BYTES, 2)
    values: tuple[mx.array, ...]  # (B, BUFFER_BYTES, D)
    shared_length: list[int]  # how many bytes the arrays hold, over all that share them
    begin: mx.array  # phases of the buffer's first byte
    base_synapses: tuple[tuple[mx.array, mx.array], ...]  # per layer, the synapses and row scales
    done: mx.array  # zeros, in which the kernels count finished blocks
    previous_v: mx.array  # v of the previous byte
    decode_step: "DecodeStep"  # the step that reads and writes it

    def keys_and_values(self) -> list[tuple[mx.array, mx.array]]:
        """Return the keys (H, B, N, count) and values (B, count, D) per layer, float32."""
        mx.eval(self.previous_v)
        H, B, pairs, *_ = self.keys[0].shape
        layers = []
        for k, v in zip(self.keys, self.values, strict=True):
            k = k[..., : self.count, :].swapaxes(-1, -2).astype(mx.float32)
            layers.append((k.reshape(H, B, 2 * pairs, -1), v[:, : self.count].astype(mx.float32)))
        return layers

    @property
    def is_int8(self) -> bool:
        """Tell whether the kernels read int8 synapses."""
        return self.keys[0].dtype != mx.float32

    def flush(
        self, synapses: Sequence[mx.array], position: int
    ) -> tuple[tuple[mx.array, ...], "ByteBuffer"]:
        """Add the bytes of a full int8 buffer to the synapses; return them and an empty buffer."""
        layers = zip(synapses, self.keys, self.values, strict=True)
        S, *quantized = zip(*(fold(*layer, self.previous_v) for layer in layers), strict=True)
        base_synapses = list(zip(*quantized, strict=True))
        return S, self.decode_step.empty_buffer(position, base_synapses, len(self.values[0]))


@lru_cache
def _count(n: int) -> mx.array:
    """Return the array [n] in the GPU's memory; MLX puts new arrays of up to 8 bytes elsewhere."""
    count = mx.arange(BUFFER_BYTES + 1)[n : n + 1]
    mx.eval(count)
    return count


def supports(model) -> bool:
    """Test whether the kernels support this machine and the model's shape."""
    D = model.config.n_embd
    return D % 16 == 0 and D <= 256 and THREADS // D * D % 32 == 0 and on_gpu() and _has_ampere()


@lru_cache
def _has_ampere() -> bool:
    """Test for asynchronous copies and bfloat16 products (CUDA, GPUs of 2020 or later)."""
    return mx.cuda.is_available() and mx.device_info().get("compute_capability_major", 0) >= 8


class DecodeStep:
    """Reads one byte, with the model's weights as rows of neurons, (H, N, D)."""

    def __init__(self, model, source: tuple = ()):
        self.source = source  # what it is made of; state.py makes another when that has changed
        H, D, N = model.encoder.shape
        self.dtype = model.compute.dtype
        transposed = (mx.contiguous(w.swapaxes(-1, -2)) for w in (model.encoder, model.encoder_v))
        rows = [w.astype(self.dtype) for w in (*transposed, model.weights()[2])]
        self.weights = [ln(model.embed.weight), *rows, mx.array(phase_increments(1, N))]
        self.shape = H, D, N, model.config.n_layer
        self.compiled = mx.compile(step)
        mx.eval(self.weights)

    def new_buffer(self, position: int, synapses: tuple[mx.array, ...], B: int) -> ByteBuffer:
        """Make an empty buffer for B rows."""
        H, D, N, L = self.shape
        synapses = synapses or [mx.zeros((H, 1, N, D))] * L
        exact = self.dtype == mx.float32
        return self.empty_buffer(position, [(S, S) if exact else quantize(S) for S in synapses], B)

    def empty_buffer(
        self, position: int, base_synapses: Sequence[tuple[mx.array, mx.array]], B: int
    ) -> ByteBuffer:
        """Make an empty buffer for B rows over `base_synapses`."""
        H, D, N, L = self.shape
        keys = tuple(mx.zeros((H, B, N // 2, BUFFER_BYTES, 2), self.dtype) for _ in range(L))
        values = tuple(mx.zeros((B, BUFFER_BYTES, D), self.dtype) for _ in range(L))
        # + 2: an array of up to 8 bytes is in the host's memory, where counting is very slow
        done = mx.zeros(H * B + 2, mx.uint32)
        begin = mx.array(phase_increments(position, N))
        buffer = ByteBuffer(
            0, keys, values, [0], begin, tuple(base_synapses), done, mx.zeros((B, 1, D)), self
        )
        mx.async_eval(buffer)
        return buffer

    def step(self, idx: mx.array, buffer: ByteBuffer) -> tuple[mx.array, ByteBuffer]:
        """Read one byte idx (B, 1); return v (B, 1, D) and the new buffer."""
        if buffer.shared_length[0] > buffer.count:
            buffer = self._copy(buffer)
        arrays = buffer.keys, buffer.values, buffer.begin, buffer.base_synapses
        arrays = *arrays, buffer.done, buffer.previous_v
        v = self.compiled(idx, self.weights, _count(buffer.count), arrays)
        buffer.shared_length[0] += 1
        return v, buffer._replace(count=buffer.count + 1, previous_v=v)

    def _copy(self, buffer: ByteBuffer) -> ByteBuffer:
        """Copy the buffer's arrays, without the bytes that other states wrote after `count`."""
        mx.eval(buffer.previous_v)
        valid = mx.arange(BUFFER_BYTES)[:, None] < buffer.count
        keys, values = (
            tuple(mx.where(valid, a, mx.zeros((), a.dtype)) for a in arrays)
            for arrays in (buffer.keys, buffer.values)
        )
        buffer = buffer._replace(keys=keys, values=values, shared_length=[buffer.count])
        buffer = buffer._replace(done=mx.zeros(buffer.done.shape, mx.uint32))
        mx.eval(buffer)
        return buffer


def step(idx: mx.array, weights: Sequence[mx.array], count: mx.array, arrays: tuple) -> mx.array:
    """Read one byte idx (B, 1), write its key and value in place, and return v (B, 1, D).

    `weights` is that of DecodeStep, `arrays` are all arrays of ByteBuffer, in order. No other
    state may share keys and values. MLX's graph does not show the write: this byte waits for
    previous_v, v of the previous byte, and any other reader must wait for v.
    """
    keys, values, begin, base_synapses, done, previous_v = arrays
    embed, encoder, encoder_v, decoder, increments = weights
    (H, N, D), B, dtype = encoder.shape, idx.shape[0], encoder.dtype
    W = THREADS // D * D // 32
    single = B == 1
    kinds = [("T", dtype), ("Q", mx.float32 if dtype == mx.float32 else mx.int8)]
    G, G_fire = (PAIRS_ONE, NEURONS_ONE) if single else (PAIRS, NEURONS)

    def blocks(n: int, G: int, limit: int) -> int:
        """Return the blocks for one row's head of n pairs or neurons."""
        return min(-(-limit // (H * B)), -(-n // (W * G)))

    def run(
        kernel: Kernel, P: int, G: int, inputs: list[mx.array], *outputs: OutputSpec
    ) -> list[mx.array]:
        template = [*kinds, ("D", D), ("W", W), ("G", G), ("K", BUFFER_BYTES)]
        return _launch(kernel, template, (P, H * B), 32 * W, inputs, outputs)

    P, P_fire = blocks(N // 2, G, 2 * BLOCKS), blocks(N, G_fire, BLOCKS // 2)
    v = embed[idx].reshape(B, D)
    v_cast = v.astype(dtype)
    for (S, scales), key, value in zip(base_synapses, keys, values, strict=True):
        read = [v, S, scales, key, value, begin, increments, count, done, previous_v]
        recalled = ((P, H * B, D + BUFFER_BYTES), mx.float32), ((H, B, D), dtype)
        fired = ((P_fire * H, B, D), mx.float32), ((B, D), mx.float32), ((B, D), dtype)
        if single:
            _, a, x = run(RECALL_ONE, P, G, [*read, encoder], *recalled, ((H, B, N), dtype))
            inputs = [x, a, v, encoder_v, decoder, done]
            _, v, v_cast = run(FIRE_ONE, P_fire, G_fire, inputs, *fired)
        else:
            x = v_cast[None] @ encoder.swapaxes(-1, -2)
            _, a = run(RECALL, P, G, [*read, x], *recalled)
            g = a @ encoder_v.swapaxes(-1, -2)
            _, v, v_cast = run(FIRE, P_fire, G_fire, [x, g, v, decoder, done], *fired)
    return v[:, None]


def quantize(S: mx.array) -> tuple[mx.array, mx.array]:
    """Convert S (H, B, N, D) to int8; return it and the scale of each row (H, B, N)."""
    return _run_rows(QUANTIZE, S, S.shape[1], [S], *_int8_outputs(S.shape))


def fold(
    S: mx.array, keys: mx.array, values: mx.array, previous_v: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Add a full buffer's bytes to S (H, B or 1, N, D); return it, its int8 copy and its scales."""
    (H, _, N, D), B = S.shape, values.shape[0]
    outputs = ((H, B, N, D), mx.float32), *_int8_outputs((H, B, N, D))
    return _run_rows(FOLD, S, B, [S, keys, values, previous_v], *outputs)


def _int8_outputs(shape: tuple[int, ...]) -> tuple[OutputSpec, OutputSpec]:
    """Return the Outputs for int8 S and its scales.

    8 int8 are one uint64: MLX counts the numbers in arrays, and submits work after 10^9 of them.
    """
    *rows, D = shape
    return ((*rows, D // 8), mx.uint64), (tuple(rows), mx.float32)


def _run_rows(
    kernel: Kernel, S: mx.array, B: int, inputs: list[mx.array], *outputs: OutputSpec
) -> list[mx.array]:
    """Run a kernel in which each warp takes 8 rows of S at a time."""
    (H, _, N, D), W = S.shape, THREADS // 32
    blocks = min(-(-2 * BLOCKS // (H * B)), -(-N // (8 * W)))
    template = [("D", D), ("W", W), ("K", BUFFER_BYTES)]
    return _launch(kernel, template, (blocks, H * B), THREADS, inputs, outputs)


def _launch(
    kernel: Kernel,
    template: list[tuple[str, int | mx.Dtype]],
    blocks: tuple[int, int],
    threads: int,
    inputs: list[mx.array],
    outputs: Sequence[OutputSpec],
) -> list[mx.array]:
    """Run a kernel on a grid of `blocks` (x, y) of `threads` each; return its outputs."""
    shapes, kinds = zip(*outputs, strict=True)
    return cuda_kernel("step_cuda.cu", kernel)(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=kinds,
        template=template,
        grid=(blocks[0] * threads, blocks[1], 1),
        threadgroup=(threads, 1, 1),
    )
