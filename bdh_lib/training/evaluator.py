"""The evaluations of a run: the loss, the neurons at work, and advice."""

import math

import mlx.core as mx
import numpy as np

from bdh_lib.compute.layer import forward_segment, ln
from bdh_lib.errors import Diverged
from bdh_lib.loss import compile_evaluation, evaluate
from bdh_lib.progress import heartbeat
from bdh_lib.settings import Settings
from bdh_lib.training.advice import advise, byte_baselines
from bdh_lib.training.dataset import Data
from bdh_lib.training.distributed import World
from bdh_lib.training.signals import SIGNAL_NOTE, StopSignal
from bdh_lib.units import bits_per_byte
from bdh_mlx import BDH

ACTIVITY_BYTES = 4096  # validation bytes over which the active neurons are counted
ACTIVITY_CHUNK = 256  # of them at once


def neuron_activity(model: BDH, val: np.ndarray, T: int) -> dict[str, list[float] | int]:
    """Return the shares of active neurons, and the number of dead ones, for the log.

    `active_x`, `active_y`: the share by layer that is not 0; `dead`: neurons that no layer excites.
    They are counted over the first ACTIVITY_BYTES of val in blocks of T, without dropout. The paper
    names 5 % for x.
    """
    watched = val[:ACTIVITY_BYTES].astype(np.int32)
    L = model.config.n_layer
    active = np.zeros((2, L))
    excited = mx.array(False)
    for begin in range(0, len(watched), T):
        block = watched[begin : begin + T]
        S = [None] * L
        for position in range(0, len(block), ACTIVITY_CHUNK):
            v = ln(model.embed(mx.array(block[None, position : position + ACTIVITY_CHUNK])))
            for i in range(L):
                v, S[i], neurons = forward_segment(
                    v, S[i], model.weights(), position, ACTIVITY_CHUNK
                )
                x, y = neurons.x, neurons.y
                active[:, i] += [mx.mean(values > 0).item() * v.shape[1] for values in (x, y)]
                excited = excited | mx.any(x > 0, -2)
            mx.eval(excited)  # or each x would be kept to the end
    x, y = (active / len(watched)).tolist()
    return {"active_x": x, "active_y": y, "dead": excited.size - excited.sum().item()}


class Evaluator:
    """Evaluates a run on the same bytes each time. The losses are compiled once."""

    def __init__(
        self, s: Settings, n_steps: int, model: BDH, data: Data, world: World, stop: StopSignal
    ):
        """Compile the losses of `model` for the bytes of `data.val`.

        An evaluation takes the weights that `model` has at that time. The processes of `world`
        share an evaluation, and `stop` ends it early. The advice on a run of `n_steps` compares
        losses with baselines that are computed here from `data.train` and `data.val`.
        """
        self.s = s
        self.n_steps = n_steps
        self.model = model
        self.val = data.val
        self.world = world
        self.stop = stop
        self.shape = (s.BATCH_SIZE, s.BLOCK_SIZE)
        print(f"compiling the evaluation, once ({SIGNAL_NOTE})")
        with heartbeat("compiling"):
            self.losses_fn = compile_evaluation(model, len(self.val.bytes), self.shape)
        self.baselines = byte_baselines(s.LOSS_ON, data.train, data.val)

    def evaluate(self, step: int, history: list[dict]) -> dict:
        """Return losses, neurons at work and advice after `step`, for the log; {} at a signal.

        `monitored_loss` (nats) is the loss on the bytes that LOSS_ON counts. best.json, PATIENCE,
        advice and reports go by it. `history` are the lines of the log. Raises Diverged.
        """
        val_loss, nats = evaluate(self.losses_fn, self.val, self.shape, self.stop, self.world)
        if self.stop.requested:
            return {}
        if not math.isfinite(val_loss):
            raise Diverged(f"validation loss is {val_loss} at iteration {step:,}")
        results = {"step": step, "val_loss": val_loss, "val_bpb": bits_per_byte(val_loss)}
        results["monitored_loss"] = nats.get(self.s.LOSS_ON, val_loss)
        results["val_loss_fields"] = nats
        results["val_bpb_fields"] = {field: bits_per_byte(loss) for field, loss in nats.items()}
        with heartbeat("counting active neurons"):
            results |= neuron_activity(self.model, self.val.bytes, self.s.BLOCK_SIZE)
        advice = advise([*history, results], self.s, self.n_steps, self.baselines)
        return results | {"advice": advice}
