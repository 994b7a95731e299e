"""The two halves of a step: the gradients of a batch, and the update of the weights."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from bdh_lib.compute.device import on_cuda
from bdh_lib.loss import byte_losses
from bdh_lib.settings import Settings
from bdh_lib.training.batches import Batch
from bdh_lib.training.distributed import World
from bdh_lib.training.signals import StopSignal
from bdh_lib.training.train_state import TrainState, copy_tree


def corrupt_bytes(idx: mx.array, share: float, key: mx.array) -> mx.array:
    """Replace `share` of the bytes of idx by bytes from anywhere in it."""
    mask_key, source_key = mx.random.split(key)
    others = idx.reshape(-1)[mx.random.randint(0, idx.size, idx.shape, key=source_key)]
    return mx.where(mx.random.uniform(shape=idx.shape, key=mask_key) < share, others, idx)


def compile_steps(state: TrainState, s: Settings) -> tuple[Callable, Callable]:
    """Return the two halves of a step on `state`, compiled.

    micro_step(idx, targets, loss_weights, key) -> loss, gradients, both weighted sums over the
    bytes; apply_update(loss, gradients), each summed over the batches -> norm, the global norm of
    the gradients before clipping. Of `s` they take BYTE_NOISE, GRAD_CLIP and EMA_DECAY.
    """
    model, optimizer, ema = state
    # the compiled functions hold these very dicts: update them, never replace them
    trees = state.trees()
    compiled = partial(mx.compile, inputs=trees, outputs=trees)

    @compiled
    def micro_step(idx, targets, loss_weights, key):
        """Return the weighted sum of the losses of a batch, and its gradients."""
        if s.BYTE_NOISE:
            noise_key, key = mx.random.split(key)
            idx = corrupt_bytes(idx, s.BYTE_NOISE, noise_key)

        def loss():
            return mx.sum(byte_losses(model, idx, targets, key) * loss_weights)

        return nn.value_and_grad(model, loss)()

    @compiled
    def apply_update(loss, gradients):
        """Update the weights by AdamW; nothing changes where loss or gradient is not finite."""
        gradients, norm = optim.clip_grad_norm(gradients, s.GRAD_CLIP or math.inf)
        before = copy_tree(trees)  # their arrays, which the update below replaces in the dicts
        optimizer.update(model, gradients)
        if ema:  # the decay rises to EMA_DECAY, as in TensorFlow: random weights are forgotten soon
            rate = 1 - mx.minimum(s.EMA_DECAY, optimizer.step / (optimizer.step + 9))
            ema.update(tree_map(lambda a, w: a + rate * (w - a), ema, model.parameters()))
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        new_weights, new_optimizer_state, new_ema = tree_map(
            lambda new, old: mx.where(finite, new, old), trees, before
        )
        model.update(new_weights)
        optimizer.state.update(new_optimizer_state)
        ema.update(new_ema)
        return norm

    return micro_step, apply_update


def sum_gradients(
    s: Settings, micro_step: Callable, batches: Iterable[Batch], stop: StopSignal, world: World
) -> tuple[mx.array, dict]:
    """Return the loss and the gradients of a step, summed over its batches on all processes.

    `batches` are the GRAD_ACCUM batches of this process. A run of one process stops at a signal:
    its sums then lack the batches that were left. Several processes compute all of theirs, because
    they stop together at the next sync.
    """
    loss = 0.0
    gradients = None
    for i, batch in enumerate(batches, 1):
        with stop.while_tracing():
            micro_loss, micro_gradients = micro_step(*batch)
        loss = loss + micro_loss
        gradients = tree_map(mx.add, gradients, micro_gradients) if gradients else micro_gradients
        if i < s.GRAD_ACCUM or not on_cuda():
            mx.eval(loss, gradients)  # bounds the memory, and lets a signal in
        if stop.requested:
            break
    return world.all_reduce_sum((loss, gradients))


def start_computing(state: TrainState, norm: mx.array, finish: bool) -> None:
    """Compute a step, or on CUDA, without `finish`, only start to.

    On CUDA the host then prepares the next step while the GPU computes this one.
    """
    (mx.async_eval if on_cuda() and not finish else mx.eval)(state.trees(), norm)
