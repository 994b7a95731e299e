"""AdamW for the small arrays of a BDH, Muon for the three that hold its neurons."""

import mlx.core as mx
import mlx.optimizers as optim


def orthogonal(m: mx.array, steps: int = 5) -> mx.array:
    """Roughly the nearest matrix with all singular values 1, of each matrix m (..., D, N).

    Newton-Schulz by the quintic polynomial of Keller Jordan's Muon (kellerjordan.github.io/posts/
    muon): singular values end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    m = m / (mx.sqrt(mx.sum(m * m, axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(steps):
        g = m @ m.swapaxes(-1, -2)
        m = a * m + (b * g + c * (g @ g)) @ m
    return m


class Muon(optim.AdamW):
    """Momentum 0.95, made orthogonal head by head; mlx.optimizers.Muon takes all heads as one row.

    The update's size is AdamW's usual one (0.2 an entry, arXiv 2502.16982), so that learning rate
    and weight decay mean the same for both.
    """

    def is_large(self, parameter) -> bool:
        """encoder, encoder_v (H, D, N) and decoder (H*N, D), not embed (V, D) and lm_head (D, V)"""
        return parameter.ndim == 3 or parameter.shape[0] >= 16 * parameter.shape[1]

    def init_single(self, parameter, state):
        super().init_single(parameter, state)
        if self.is_large(parameter):
            del state["v"]

    def apply_single(self, gradient, parameter, state):
        if not self.is_large(parameter):
            return super().apply_single(gradient, parameter, state)
        lr = self.learning_rate.astype(gradient.dtype)
        state["m"] = 0.95 * state["m"] + gradient
        update = gradient + 0.95 * state["m"]  # Nesterov's
        tall = update.shape[-2] > update.shape[-1]
        update = update.swapaxes(-1, -2) if tall else update
        update = orthogonal(update) * (0.2 * update.shape[-1] ** 0.5)
        update = update.swapaxes(-1, -2) if tall else update
        return parameter * (1 - lr * self.weight_decay) - lr * update
