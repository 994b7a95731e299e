"""One byte through the layers on a CPU, in NumPy, which multiplies a vector by GEMV; MLX by GEMM.

S, 201 MB for six layers, is not rewritten at each byte: a buffer holds the last bytes
(state.py). If few neurons are active, only their rows of S, encoder_v and decoder are read.
"""

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_lib.compute.rope import rope_phases

BUFFER_BYTES = 64  # at the default shape, reading these costs as much as adding them to S
GATHER, GATHER_DY = 0.3, 0.15  # largest active fractions at which rows are gathered (docs/log.md)


class ByteBuffer(NamedTuple):
    """The last `count` bytes, which are not in the synapses yet.

    States share the arrays. A state that holds all their bytes (`shared_length`) writes the next
    byte in place; any other copies the arrays first.
    """

    count: int
    keys: tuple[np.ndarray, ...]  # per layer, rotated x: (H, B, BUFFER_BYTES, N)
    values: tuple[np.ndarray, ...]  # (B, BUFFER_BYTES, D)
    shared_length: list[int]  # how many bytes the arrays hold, over all that share them
    begin: int  # position of the buffer's first byte
    base_synapses: list[np.ndarray]  # per layer, the synapses; [] if they are empty
    decode_step: "DecodeStep"  # the step that reads and writes it

    is_int8 = False  # class attribute: the step reads the float32 synapses

    def keys_and_values(self) -> list[tuple[mx.array, mx.array]]:
        """Return the keys (H, B, N, count) and values (B, count, D) per layer."""
        layers = zip(self.keys, self.values, strict=True)
        cut = [(k[..., : self.count, :], v[:, : self.count]) for k, v in layers]
        return [(mx.array(k).swapaxes(-1, -2), mx.array(v)) for k, v in cut]


class DecodeStep:
    """Reads one byte, with the model's weights as NumPy arrays."""

    def __init__(self, model, source: tuple = ()):
        self.source = source  # what it is made of; state.py makes another when that has changed
        H, D, N = model.encoder.shape
        self.shape = H, D, N, model.config.n_layer
        rows = mx.contiguous(model.encoder_v.swapaxes(-1, -2)).reshape(H * N, D)
        arrays = (model.embed.weight, model.encoder, model.encoder_v, rows, model.decoder)
        self.weights = [np.array(array, copy=False) for array in arrays]
        self.gathered = np.empty((H * N, D), np.float32)  # a buffer for rows

    def new_buffer(self, position: int, synapses: tuple[mx.array, ...], B: int) -> ByteBuffer:
        """Make an empty buffer for B rows."""
        H, D, N, L = self.shape
        shapes = [(H, B, BUFFER_BYTES, N), (B, BUFFER_BYTES, D)]
        keys, values = (tuple(np.empty(s, np.float32) for _ in range(L)) for s in shapes)
        base_synapses = [np.array(S, copy=False) for S in synapses]
        return ByteBuffer(0, keys, values, [0], position, base_synapses, self)

    def step(self, idx: mx.array, buffer: ByteBuffer) -> tuple[mx.array, ByteBuffer]:
        """Read one byte idx (B, 1); return v (B, 1, D) and the new buffer.

        Rows are separate: each has its own active neurons.
        """
        if buffer.shared_length[0] > buffer.count:
            keys, values = (tuple(map(np.copy, arrays)) for arrays in (buffer.keys, buffer.values))
            buffer = buffer._replace(keys=keys, values=values, shared_length=[buffer.count])
        phase = rope_phases(buffer.begin + buffer.count, self.shape[2])
        rows = [self._row(byte, b, phase, buffer) for b, byte in enumerate(np.array(idx)[:, 0])]
        buffer.shared_length[0] = buffer.count + 1
        return mx.array(np.stack(rows)[:, None]), buffer._replace(count=buffer.count + 1)

    def _row(self, byte: int, b: int, phase: np.ndarray, buffer: ByteBuffer) -> np.ndarray:
        """Read one byte of row b; return v (D,) and write its key and value into the buffer.

        phase (N/2,) is exp(i t w) of the byte's position t.
        """
        embed, encoder, encoder_v, encoder_v_rows, decoder = self.weights
        H, D, N, _ = self.shape
        count = buffer.count
        v = _ln(embed[byte])
        for layer, (keys, values) in enumerate(zip(buffer.keys, buffer.values, strict=True)):
            x = np.maximum(np.stack([v @ encoder[h] for h in range(H)]), 0)
            q = (x.view(np.complex64) * phase).view(np.float32)
            a = np.zeros((H, D), np.float32)
            for h in range(H):
                if buffer.base_synapses:
                    S = buffer.base_synapses[layer]
                    S = S[h, b if S.shape[1] > 1 else 0]
                    a[h] = self._rows_by(q[h], S.reshape(N // 2, 2 * D), pairs=True)
                a[h] += (keys[h, b, :count] @ q[h]) @ values[b, :count]
            keys[:, b, count], values[b, count] = q, v
            y = self._gated(x.reshape(-1), _ln(a), encoder_v, encoder_v_rows)
            v = _ln(v + _ln(self._rows_by(y, decoder)))
        return v

    def _rows_by(self, q: np.ndarray, rows: np.ndarray, pairs: bool = False) -> np.ndarray:
        """Return q (n,) @ rows (n, D), reading only the rows where q is not 0 if these are few.

        With `pairs`, rows is (n/2, 2 * D): q's neurons rotate in pairs, so both are 0 or none.
        """
        D = self.shape[1]
        active = np.flatnonzero(q.view(np.complex64) if pairs else q)
        if len(active) > GATHER * len(rows):
            return q @ rows.reshape(-1, D)
        gathered = self.gathered.reshape(-1, rows.shape[1])[: len(active)]
        np.take(rows, active, 0, out=gathered, mode="clip")
        q = q.view(np.complex64)[active].view(np.float32) if pairs else q[active]
        return q @ gathered.reshape(-1, D)

    def _gated(
        self, x: np.ndarray, a: np.ndarray, encoder_v: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Return y (H*N,) = relu(a Dy) * x of x (H*N,), a (H, D), by active neurons if few are.

        encoder_v is Dy (H, D, N); rows (H*N, D) is the same with a row for each neuron.
        """
        H, _, N, _ = self.shape
        active = np.flatnonzero(x)
        if len(active) > GATHER_DY * len(x):
            g = np.concatenate([a[h] @ encoder_v[h] for h in range(H)])
            return np.maximum(g, 0) * x
        gathered = self.gathered[: len(active)]
        y = np.zeros_like(x)
        np.take(rows, active, 0, out=gathered, mode="clip")
        cuts = np.searchsorted(active, N * np.arange(H + 1))
        g = [gathered[i:j] @ a[h] for h, (i, j) in enumerate(pairwise(cuts))]
        y[active] = np.maximum(np.concatenate(g), 0) * x[active]
        return y


def _ln(x: np.ndarray) -> np.ndarray:
    """Compute layer.ln with NumPy."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5))
