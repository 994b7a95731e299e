"""The exponential moving average of the weights, a tree beside them; {} where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx.utils import tree_map

from bdh_mlx import BDH


def copy_tree(tree: dict) -> dict:
    """Return the same arrays in containers of their own."""
    return tree_map(lambda array: array, tree)


@contextmanager
def ema_applied(model: BDH, ema: dict) -> Iterator[None]:
    """Put the average of the weights, if there is one, into the model, to evaluate or save it.

    Meanwhile `ema` holds the weights that are trained: they change places.
    """

    def swap():
        if ema:
            weights = copy_tree(model.parameters())
            model.update(ema)
            ema.update(weights)

    swap()
    try:
        yield
    finally:
        swap()
