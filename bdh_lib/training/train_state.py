"""What a step of training changes: a model, its optimizer, and the average of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from bdh_lib.compute.layer import Compute
from bdh_lib.settings import Settings
from bdh_lib.training.distributed import World
from bdh_mlx import BDH

BETA1 = 0.9  # AdamW's decay of the mean of gradients


class TrainState(NamedTuple):
    """A model in training, its optimizer, and its average."""

    model: BDH
    optimizer: optim.Optimizer
    ema: dict  # the exponential moving average of the weights, a tree like them; {}: none

    def trees(self) -> list[dict]:
        """Return the trees of arrays that a step changes: weights, optimizer state, average."""
        return [self.model.state, self.optimizer.state, self.ema]


def init_train_state(s: Settings, compute: Compute) -> TrainState:
    """Return a model with random weights, AdamW, and the average if EMA_DECAY is not 0."""
    mx.random.seed(s.SEED)
    model = BDH(s.BDH_CONFIG)
    model.compute = compute
    optimizer = optim.AdamW(
        s.LEARNING_RATE, [BETA1, s.BETA2], weight_decay=s.WEIGHT_DECAY, bias_correction=True
    )
    optimizer.init(model.trainable_parameters())
    return TrainState(model, optimizer, copy_tree(model.parameters()) if s.EMA_DECAY else {})


def broadcast_state(state: TrainState, world: World) -> None:
    """Give all processes the state of the first one. Call it before compiling the step."""
    state.model.update(world.broadcast(state.model.parameters()))
    for tree in (state.optimizer.state, state.ema):
        tree.update(world.broadcast(tree))


def copy_tree(tree: dict) -> dict:
    """Return the same arrays in containers of their own."""
    return tree_map(lambda array: array, tree)


@contextmanager
def ema_applied(state: TrainState) -> Iterator[None]:
    """Put the average of the weights, if there is one, into the model, to evaluate or save it.

    Meanwhile `ema` holds the weights that are trained: they change places.
    """
    _swap_weights(state)
    try:
        yield
    finally:
        _swap_weights(state)


def _swap_weights(state: TrainState) -> None:
    """Exchange the weights of the model and their average, if there is one."""
    if state.ema:
        weights = copy_tree(state.model.parameters())
        state.model.update(state.ema)
        state.ema.update(weights)
