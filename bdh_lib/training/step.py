"""The model that is trained, the loss, and the two halves of a step."""

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from bdh_lib.compute.layer import Compute
from bdh_lib.flags import Settings
from bdh_lib.training.ema import copy_tree
from bdh_mlx import BDH


def init_model(s: Settings, compute: Compute) -> tuple[BDH, optim.AdamW, dict]:
    """Return a model with fresh weights, its optimizer, and the average of its weights ({}:
    none).
    """
    mx.random.seed(s.SEED)
    model = BDH(s.BDH_CONFIG)
    model.compute = compute
    optimizer = optim.AdamW(
        s.LEARNING_RATE, [0.9, s.BETA2], weight_decay=s.WEIGHT_DECAY, bias_correction=True
    )
    optimizer.init(model.trainable_parameters())
    return model, optimizer, copy_tree(model.parameters()) if s.EMA_DECAY else {}


def byte_losses(model: BDH, idx: mx.array, targets: mx.array, key=None) -> mx.array:
    """Return the loss of each target in nats, (B, T), in training and in evaluation."""
    return nn.losses.cross_entropy(model(idx, key=key)[0], targets)


def corrupt_bytes(idx: mx.array, share: float, key: mx.array) -> mx.array:
    """Replace `share` of the bytes of idx by bytes from anywhere in it."""
    where, which = mx.random.split(key)
    others = idx.reshape(-1)[mx.random.randint(0, idx.size, idx.shape, key=which)]
    return mx.where(mx.random.uniform(shape=idx.shape, key=where) < share, others, idx)


def compile_steps(
    model: BDH, optimizer: optim.Optimizer, ema: dict, s: Settings
) -> tuple[Callable, Callable, list]:
    """Return the two halves of a step, compiled, and the state that they change.

    micro_step(idx, targets, weights, key) -> loss, gradients, both weighted sums over the bytes;
    apply_update(loss, gradients), each summed over the batches -> norm. Of `s` they take
    BYTE_NOISE, GRAD_CLIP and EMA_DECAY.
    """
    state = [model.state, optimizer.state, ema]
    compiled = partial(mx.compile, inputs=state, outputs=state)

    @compiled
    def micro_step(idx, targets, weights, key):
        if s.BYTE_NOISE:
            noise_key, key = mx.random.split(key)
            idx = corrupt_bytes(idx, s.BYTE_NOISE, noise_key)

        def loss():
            return mx.sum(byte_losses(model, idx, targets, key) * weights)

        return nn.value_and_grad(model, loss)()

    @compiled
    def apply_update(loss, gradients):
        """Update the weights by AdamW; nothing changes where loss or gradient is not finite."""
        gradients, norm = optim.clip_grad_norm(gradients, s.GRAD_CLIP or math.inf)
        before = copy_tree(state)
        optimizer.update(model, gradients)
        if ema:  # the decay rises to its value, as in TensorFlow: random weights are forgotten soon
            rate = 1 - mx.minimum(s.EMA_DECAY, optimizer.step / (optimizer.step + 9))
            ema.update(tree_map(lambda m, w: m + rate * (w - m), ema, model.parameters()))
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        after = tree_map(lambda new, old: mx.where(finite, new, old), state, before)
        model.update(after[0])
        optimizer.state.update(after[1])
        ema.update(after[2])
        return norm

    return micro_step, apply_update, state
