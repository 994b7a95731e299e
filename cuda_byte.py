"""One byte through the layers on a CUDA GPU: kernels that touch active neurons only.

Of a trained model about a quarter of the neurons are active: most rows of encoder_v and of decoder
and half of the synapses need not be read. MLX has no product that skips rows, and no operation that
changes its input; `recall` (cuda_byte.cu) adds the byte to the synapses where they lie. On other
devices state.step does the same with plain operations.
"""

from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from fast_layer import frequencies, ln

G = 16  # pairs of neurons that a warp takes at a time, at most 16 (LOG.md)
THREADS = 512  # of a block, at most
BLOCKS = 256  # about as many fill a GPU; each leaves a part, and parts cost time too

# name, inputs, outputs and call of each kernel; MLX adds the arguments that a call mentions
RECALL = (
    "recall",
    ("v", "S", "turns", "count", "before", "x"),
    ("parts",),
    "bdh::recall<T, D, W, G>(x, (T*)nullptr, v, (const T*)nullptr, (float*)S, turns, count[0], "
    "x_shape[1], x_shape[2], parts);",
)
RECALL_ONE = (
    "recall_one",
    ("v", "S", "turns", "count", "before", "encoder"),
    ("parts", "x"),
    "bdh::recall<T, D, W, G>((const T*)nullptr, x, v, encoder, (float*)S, turns, count[0], "
    "1, encoder_shape[1], parts);",
)
FIRE = (
    "fire",
    ("x", "a", "v", "encoder_v", "decoder", "done"),
    ("parts", "out", "low"),
    "bdh::fire<T, D, W, G>(x, a, a_shape[0], v, encoder_v, decoder, (unsigned*)done, x_shape[0], "
    "x_shape[1], x_shape[2], parts, out, low);",
)


def fits(config) -> bool:
    """Whether this machine and the model's shape suit the kernels."""
    D, on_cuda = config.n_embd, mx.default_device() == mx.gpu and mx.cuda.is_available()
    return on_cuda and D % 4 == 0 and D <= 256 and THREADS // D * D % 32 == 0


def weights_of(model, dtype: mx.Dtype) -> list[mx.array]:
    """What `step` takes: rows of neurons, (H, N, D) in `dtype`, and each pair's turn a byte."""
    H, D, N = model.encoder.shape
    across = (mx.contiguous(w.swapaxes(-1, -2)) for w in (model.encoder, model.encoder_v))
    rows = [w.astype(dtype) for w in (*across, model.decoder.reshape(H, N, D))]
    turns = np.round(frequencies(N) / (2 * np.pi) * 2**32)  # in 2^-32 of a circle
    return [ln(model.embed.weight), *rows, mx.array(turns.astype(np.uint32))]


def step(idx, weights, count, synapses, before):
    """v (B, 1, D) of one byte idx (B, 1), which is added to the synapses (H, B, N, D) in place.

    These must be the caller's own. No graph shows that they change: `before`, v of the byte before,
    makes this one wait, and whoever reads them otherwise must wait for v.
    """
    embed, encoder, encoder_v, decoder, turns = weights
    (H, N, D), B, dtype = encoder.shape, idx.shape[0], encoder.dtype
    W = THREADS // D * D // 32
    most = -(-BLOCKS // (H * B))
    pairs, single = (min(most, -(-n // (W * G))) for n in (N // 2, N))  # blocks of a row's head

    def run(kernel, P, inputs, *outputs):
        return _kernel(*kernel)(
            inputs=inputs,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[kind for _, kind in outputs],
            template=[("T", dtype), ("D", D), ("W", W), ("G", G)],
            grid=(32 * W * P, H * B, 1),
            threadgroup=(32 * W, 1, 1),
        )

    # arrays of up to 8 bytes lie in the host's memory, where blocks would count very slowly
    v, done = embed[idx].reshape(B, D), mx.zeros(B + 2, mx.uint32)
    low = v.astype(dtype)
    for S in synapses:
        inputs, parts = [v, S, turns, count, before], ((pairs, H * B, D), mx.float32)
        if B == 1:
            a, x = run(RECALL_ONE, pairs, [*inputs, encoder], parts, ((H, B, N), dtype))
        else:
            x = low[None] @ encoder.swapaxes(-1, -2)
            (a,) = run(RECALL, pairs, [*inputs, x], parts)
        outputs = ((single * H, B, D), mx.float32), ((B, D), mx.float32), ((B, D), dtype)
        _, v, low = run(FIRE, single, [x, a, v, encoder_v, decoder, done], *outputs)
    return v[:, None]


@lru_cache
def _kernel(name, inputs, outputs, call):
    source = Path(__file__).with_suffix(".cu").read_text()
    return mx.fast.cuda_kernel(name, list(inputs), list(outputs), call, source)
