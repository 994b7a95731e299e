"""One run on several processes, each with a part of every step's sequences: data-parallel.

    mlx.launch -n 2 -- python train_mlx.py           # two on this machine
    mlx.launch --hosts 10.0.0.1,10.0.0.2 -- python train_mlx.py

MLX's own distributed layer carries it (ring, NCCL, MPI); only its all_sum is used, which all have.
The processes hold the same weights and take the same decisions; the first one alone writes.
"""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from bdh_lib import files
from bdh_lib.errors import UserError

LOST = ("[ring]", "[nccl]", "NCCL", "[mpi]", "[jaccl]")  # how the errors of a lost peer begin


class World:
    """The processes of this run; where there is one, no method waits or changes anything."""

    def __init__(self):
        """Join the processes that the environment names. Raises UserError if that fails."""
        self.group = _join()
        self.size = self.group.size()
        self.rank = self.group.rank()
        self.is_main = self.rank == 0  # it alone writes

    def all_reduce_sum(self, tree):
        """Return the sum of float32 arrays over the processes, which has no gradient.

        With several processes the sum is evaluated in this call, so all must pass the arrays in the
        same order. A single process gets its own arrays back, not evaluated.
        """
        return tree if self.size == 1 else tree_map(self._sum, tree)

    def broadcast(self, tree):
        """Return the first process's arrays; the others give arrays of the same shapes."""
        if self.size == 1:
            return tree
        named = sorted(tree_flatten(tree))  # a loaded tree has another order, and order is all here
        return tree_unflatten(
            [(k, self._sum(a if self.is_main else mx.zeros_like(a))) for k, a in named]
        )

    def all_gather_object(self, value) -> list:
        """Return what each process gave, in their order: anything that JSON holds."""
        if self.size == 1:
            return [value]
        raw = json.dumps(value).encode()
        lengths = np.zeros(self.size, np.int32)
        lengths[self.rank] = len(raw)
        lengths = np.array(self._sum(mx.array(lengths)))
        rows = np.zeros((self.size, lengths.max()), np.int32)
        rows[self.rank, : len(raw)] = list(raw)
        rows = np.array(self._sum(mx.array(rows)))
        return [json.loads(bytes(r[:n].tolist())) for r, n in zip(rows, lengths, strict=True)]

    def broadcast_object(self, value):
        """Return what the first process gave."""
        return self.all_gather_object(value if self.is_main else None)[0]

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.all_gather_object(None)

    def _sum(self, array: mx.array) -> mx.array:
        summed = mx.distributed.all_sum(array, group=self.group)
        # Now: all processes must take their sums in one order, and macOS ends a program whose GPU
        # waits some 5 s for another process.
        mx.eval(summed)
        return summed


def _join() -> mx.distributed.Group:
    rank, hosts = (os.environ.get(name) for name in ("MLX_RANK", "MLX_HOSTFILE"))
    try:
        if rank and not rank.isdecimal():  # MLX would take it for 0
            raise ValueError("a rank is 0, 1 and so on")
        if rank and hosts and len(files.parse_json(Path(hosts).read_text())) < 2:
            raise ValueError("a ring has two hosts or more")  # MLX would crash, or wait for ever
        return mx.distributed.init()
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"MLX_RANK is {rank} and MLX_HOSTFILE {hosts}, by which the processes of this run "
            f"cannot meet: {error}; start them by mlx.launch, or unset both to train on one"
        ) from None


def refuse_launcher() -> None:
    """Raise UserError if mlx.launch started this process, which does something by itself."""
    if os.environ.get("MLX_RANK"):
        raise UserError("--selfcheck, --plan and --tune take one process: leave out mlx.launch")


class ProcessLost(UserError):
    """Another process of the run is gone."""

    exit_code = 1


def is_lost(error: RuntimeError) -> bool:
    """Tell whether MLX says by an error that another process is gone."""
    return any(text in str(error) for text in LOST)
