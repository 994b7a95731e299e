"""Train a BDH on an instruction data set, byte by byte, with MLX.

    python train_mlx.py                                 # the settings below
    python train_mlx.py --preset tiny --dataset sample  # minutes on two CPU cores, no network
    python train_mlx.py --plan                          # what the run would be, and its data

The same command once more continues where the run stopped. A run is a folder,
checkpoints_mlx/<run>: step-000500 and others (weights, optimizer, settings), best.json,
metrics.jsonl, and report.html to look at.
"""

if __name__ == "__main__":  # cli.run imports it as a module: errors in settings are one line
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback
    from bdh_lib import cli

    cli.run(__file__)

import bdh_mlx
from bdh_mlx import BDHConfig

# Settings, in plain Python: change a line, paste one over it, add one of your own. Each is also a
# flag (BLOCK_SIZE: --block-size, n_layer: --n-layer); flags beat presets, presets beat these lines.
# Where None is allowed, the flag takes `none`.
# Data
TRAINING_MODE: str = "both"  # what to train on: "system", "instruction", "both" or "full"
LOSS_ON: str = "all"  # bytes that count in the training loss: "all", or "response" (mode full only)
DATASET: str = "Severian/Internal-Knowledge-Map"  # hub name, file, folder, or "sample"
COLUMNS: str | None = None  # "instruction=query,response=reply"; none: by the names of columns
# Training
BLOCK_SIZE: int = 4096  # context length in training, in bytes
BATCH_SIZE: int = 2  # sequences computed at once, by each process
GRAD_ACCUM: int = 1  # micro-batches per update (gradient accumulation)
MAX_ITERS: int | None = 5000  # updates; the run ends here or after EPOCHS, whichever comes first
EPOCHS: float | None = 3  # passes over the training bytes; none: as many as MAX_ITERS takes
PATIENCE: int | None = 5  # evaluations without a new best that end the run; none: never stop early
LEARNING_RATE: float = 5e-5  # at the end of the warm-up
MIN_LR_RATIO: float = 0.1  # at the end of the cosine, as a share of LEARNING_RATE
WARMUP_ITERS: int = 100  # linear warm-up, in updates
LR_DECAY_ITERS: int | None = None  # update at which the cosine ends; none: the end of the run
WEIGHT_DECAY: float = 0.1  # AdamW's, as in the paper
GRAD_CLIP: float | None = 1.0  # largest global norm of a gradient; none: no clipping
EMA_DECAY: float = 0.0  # decay of the exponential moving average of the weights; 0: off
BYTE_NOISE: float = 0.0  # share of the input bytes replaced by others of the batch, in training
MAX_CONSECUTIVE_SKIPS: int = 10  # updates in a row that are not finite before the run stops
# Model, and how it is computed
BDH_CONFIG = bdh_mlx.BDHConfig()  # n_layer=6, n_embd=256, n_head=4, dropout=0.1: 25.3M parameters
DTYPE: str = "auto"  # of matrix products: "bfloat16", "float32"; auto: bfloat16 on a GPU
MEMORY_MODE: str = "auto"  # "fast", "balanced" or "small", from fast to slow; auto: what fits
IGNORE_MEMORY_CHECK: bool = False  # start even if the estimate exceeds the available memory
# Evaluation, log and checkpoints
SEED: int = 1337  # of weights, split, data order, dropout and samples
VAL_FRACTION: float = 0.1  # of the records, held out
EVAL_BYTES: int | None = 1_000_000  # validation bytes read at most, always the same; none: all
LOG_FREQ: int = 50  # updates between lines
EVAL_FREQ: int = 250  # updates between validations and samples
SAVE_FREQ: int = 500  # updates between checkpoints
KEEP_CHECKPOINTS: int = 3  # latest checkpoints kept, besides the best
SAMPLE_BYTES: int = 200  # length of each sample
# Runs
CHECKPOINT_DIR: str = "checkpoints_mlx"  # holds one folder per run, and the prepared data
RUN_NAME: str | None = None  # folder of this run; none: the training mode
INIT_FROM: str | None = None  # run or checkpoint whose weights start this run (phase 2)
PHASES: str | None = None  # a chain, mode:EPOCHS@LEARNING_RATE each: "system:3,full:2@3e-5"

ACTIONS = {
    "plan": "print the planned run and problems of its data, then exit",
    "json": "log lines are JSON objects, alone on stdout; all else goes to stderr",
    "refresh_data": "ignore the cache and prepare the data again",
    "selfcheck": "check in seconds that model and trainer work on this machine: exit code 0 or 1",
}

# Each preset is flags: four for a Mac with 64 GB (phase 2 starts from the weights of phase 1), one
# for 16 GB, and `tiny` for a first look.
LARGE = "--block-size 4096 --batch-size 2 --training-mode "
PRESETS = {
    "both-64gb": LARGE + "both --max-iters 5000 --learning-rate 5e-5 --epochs 3",
    "full-64gb": LARGE + "full --max-iters 8000 --learning-rate 3e-5 --epochs 3",
    "phase1-64gb": LARGE + "system --max-iters 3000 --learning-rate 1e-4",
    "phase2-64gb": LARGE + "instruction --max-iters 3000 --learning-rate 5e-5 --init-from system",
    "both-16gb": "--training-mode both --block-size 2048 --batch-size 1 --max-iters 5000 "
    "--learning-rate 5e-5",
    "tiny": "--n-layer 3 --n-embd 64 --mlp-internal-dim-multiplier 32 --dropout 0.05 "
    "--training-mode full --block-size 256 --batch-size 8 --max-iters 350 --epochs none "
    "--learning-rate 4e-3 --warmup-iters 20 --log-freq 25 --eval-freq 175 --save-freq 175",
    # The recipe that docs/log.md measures on a megabyte of text, 6.4M parameters
    "small-data": "--mlp-internal-dim-multiplier 32 --dropout 0.5 --dropout-v 0.1 "
    "--byte-noise 0.05 --weight-decay 1 --ema-decay 0.99 --block-size 512 --batch-size 32 "
    "--max-iters 2000 --epochs none --learning-rate 1e-3 --eval-freq 100",
}

# The imports come after the settings, so that the settings are at the top of the file.

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from bdh_lib import cli, files, flags
from bdh_lib.compute import memory
from bdh_lib.compute.state import WINDOW_PARTS
from bdh_lib.data.columns import parse_columns
from bdh_lib.data.describe import data_changes, describe
from bdh_lib.data.formats import (
    FIELDS,
    MAX_NEW_TOKENS,
    REQUIRED_FIELDS,
    SAMPLE_NOTES,
    format_example,  # noqa: F401  what a record becomes, for other scripts
    sample_prompts,
)
from bdh_lib.data.prepare import data_settings, prepare
from bdh_lib.data.split import bytes_to_evaluate, has_field
from bdh_lib.errors import UserError, escape_controls
from bdh_lib.flags import Settings
from bdh_lib.generation.decoding import complete_prompts
from bdh_lib.rules import Rule, check, choice, number, switch, text, whole
from bdh_lib.training import checkpoints, phases, plan, selfcheck
from bdh_lib.training.advice import advise, byte_baselines
from bdh_lib.training.distributed import World, is_lost
from bdh_lib.training.evaluation import byte_losses, compile_shapes, evaluate, neuron_activity
from bdh_lib.training.report import redraw
from bdh_lib.training.runlog import Meter, RunLog, main_process_prints
from bdh_lib.training.signals import StopSignal, default_signals
from bdh_mlx import BDH, load_model

# -------------------------------------------------------------------------------------------- data


@lru_cache(maxsize=2)
def epoch_starts(n_bytes: int, T: int, seed: int, epoch: int) -> np.ndarray:
    """First byte of each block of an epoch, in the order of the epoch.

    The blocks tile the stream, which is taken as a ring, from an offset that each epoch draws: each
    byte is a target once, and fewer than T of them twice.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = rng.integers(n_bytes) + T * np.arange(math.ceil(n_bytes / T))
    return rng.permutation(starts) % n_bytes


def block_starts(n_bytes: int, first: int, count: int, T: int, seed: int) -> np.ndarray:
    """First byte of the blocks first .. first+count-1 of a run, over as many epochs as needed."""
    n_blocks = math.ceil(n_bytes / T)
    indices = [divmod(block, n_blocks) for block in range(first, first + count)]
    return np.array([epoch_starts(n_bytes, T, seed, epoch)[i] for epoch, i in indices])


def get_batch(
    stream: np.ndarray, first: int, B: int, T: int, seed: int
) -> tuple[mx.array, mx.array]:
    """Blocks first .. first+B-1 of a run as idx and targets (B, T).

    They are a function of the arguments alone, so that a resumed run reads on where it stopped.
    """
    starts = block_starts(len(stream), first, B, T, seed)
    blocks = stream[(starts[:, None] + np.arange(T + 1)) % len(stream)].astype(np.int32)
    return mx.array(blocks[:, :-1]), mx.array(blocks[:, 1:])


# ------------------------------------------------------------------------------- loss and schedule


def learning_rate(step: int, total: int, s: Settings) -> float:
    """Rate of update number `step` (from 0): a linear rise, then half a cosine down to the end."""
    if step < s.WARMUP_ITERS:
        return s.LEARNING_RATE * (step + 1) / s.WARMUP_ITERS
    end = s.LR_DECAY_ITERS or total
    done = min(1.0, (step - s.WARMUP_ITERS) / max(1, end - s.WARMUP_ITERS))
    low = s.MIN_LR_RATIO
    return s.LEARNING_RATE * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def target_mask(fields: np.ndarray, batch_index: int, s: Settings) -> np.ndarray:
    """Which targets (B, T) of a run's batch number `batch_index` count in its loss."""
    if s.LOSS_ON == "all":
        return np.ones((s.BATCH_SIZE, s.BLOCK_SIZE), bool)
    batch = (batch_index * s.BATCH_SIZE, s.BATCH_SIZE, s.BLOCK_SIZE, s.SEED)
    return np.array(get_batch(fields, *batch)[1]) == FIELDS.index(s.LOSS_ON)


def n_targets_in_update(fields: np.ndarray, step: int, s: Settings) -> int:
    """How many targets count in the loss of update number `step`, over all its batches."""
    batches = blocks_per_update(s) // s.BATCH_SIZE
    if s.LOSS_ON == "all":
        return blocks_per_update(s) * s.BLOCK_SIZE
    return sum(int(target_mask(fields, step * batches + i, s).sum()) for i in range(batches))


def loss_weights(fields: np.ndarray, batch_index: int, count: int, s: Settings) -> np.ndarray:
    """Weight of each target (B, T) of a batch in the loss of its update.

    That loss is the mean over the `count` targets that count in all batches of the update, on all
    processes: their weights are 1 / count, those of the others 0.
    """
    return target_mask(fields, batch_index, s).astype(np.float32) / np.float32(max(1, count))


# ---------------------------------------------------------------------------------------- training


class Stream(NamedTuple):
    """One side of the split: uint8 arrays of one length, memory mapped."""

    bytes: np.ndarray
    fields: np.ndarray  # of each byte its place in FIELDS


def load_prepared(s: Settings, mode: str) -> tuple[dict, Stream, Stream]:
    """The report of the data, and (bytes, fields) of training and of validation, for a mode.

    Raises UserError where a side is empty.
    """
    cache, refresh = Path(s.CHECKPOINT_DIR) / ".data", vars(s).get("refresh_data", False)
    folder = prepare(data_settings(s, mode), cache, refresh)
    report = json.loads((folder / "data.json").read_text())
    if empty := [side for side in ("train", "val") if not report[side]["bytes"]]:
        raise UserError(f"the {empty[0]} split of mode {mode} is empty; take more data")
    train, val = (
        Stream(*(np.memmap(folder / f"{side}.{kind}", np.uint8, "r") for kind in ("bin", "fields")))
        for side in ("train", "val")
    )
    read = bytes_to_evaluate(folder, s.EVAL_BYTES)
    return report, train, Stream(*(array[:read] for array in val))


def open_split(s: Settings) -> tuple[dict, Stream, Stream]:
    """The data's report, then bytes and fields to train on, and those that evaluations read."""
    report, train, val = load_prepared(s, s.TRAINING_MODE)
    for side, least, cure in (
        ("train", s.BLOCK_SIZE + 1, "lower BLOCK_SIZE"),
        ("val", 2, "raise VAL_FRACTION"),
    ):
        if report[side]["bytes"] < least:
            raise UserError(
                f"the {side} split has {report[side]['bytes']:,} bytes and needs {least:,} "
                f"(BLOCK_SIZE is {s.BLOCK_SIZE:,}): {cure} or take more data"
            )
    for side, (_, fields), cure in (
        ("training bytes", train, "take other data"),
        ("validation bytes read", val, "raise EVAL_BYTES"),
    ):
        if s.LOSS_ON != "all" and not has_field(fields, s.LOSS_ON):
            raise UserError(
                f"LOSS_ON is {s.LOSS_ON!r}, and the {len(fields):,} {side} have none of it; "
                f"{cure} or set LOSS_ON to 'all'"
            )
    return report, train, val


def blocks_per_update(s: Settings) -> int:
    """Blocks that an update reads, over all processes."""
    return s.BATCH_SIZE * s.GRAD_ACCUM * vars(s).get("PROCESSES", 1)


def total_steps(s: Settings, n_bytes: int) -> int:
    """Update at which the run ends: MAX_ITERS or the end of EPOCHS, one of which is set."""
    blocks = math.ceil(n_bytes / s.BLOCK_SIZE)
    by_epochs = math.ceil(s.EPOCHS * blocks / blocks_per_update(s)) if s.EPOCHS else math.inf
    return min(s.MAX_ITERS or math.inf, by_epochs)


def schedule_summary(s: Settings, n_bytes: int) -> str:
    """How long the run is, and whether MAX_ITERS or EPOCHS ends it before the other."""
    total, bytes_per_update = total_steps(s, n_bytes), s.BLOCK_SIZE * blocks_per_update(s)
    epochs, cut = total * bytes_per_update / n_bytes, ""
    if epochs < (s.EPOCHS or 0):
        cut = f"; MAX_ITERS ends it before EPOCHS ({s.EPOCHS:g})"
    elif total < (s.MAX_ITERS or 0):
        cut = f"; EPOCHS ({s.EPOCHS:g}) ends it before MAX_ITERS ({s.MAX_ITERS:,})"
    coverage = f"{total * bytes_per_update:,} bytes or {epochs:.2f} epochs"
    return f"{total:,} iterations of {bytes_per_update:,} bytes are {coverage}{cut}"


def settings_dict(s: Settings) -> dict:
    """The settings and those of the model as JSON; a value that JSON cannot hold, as text."""
    own = {k: v for k, v in vars(s).items() if k.isupper() and k != "BDH_CONFIG"}
    return {name: flags.as_json(value) for name, value in (own | asdict(s.BDH_CONFIG)).items()}


def init_model(s: Settings, compute: memory.Compute) -> tuple[BDH, optim.AdamW, dict]:
    """A model with fresh weights, its optimizer, and the average of its weights ({}: none)."""
    mx.random.seed(s.SEED)
    model = BDH(s.BDH_CONFIG)
    model.compute = compute
    optimizer = optim.AdamW(s.LEARNING_RATE, weight_decay=s.WEIGHT_DECAY, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    return model, optimizer, copy_tree(model.parameters()) if s.EMA_DECAY else {}


def copy_tree(tree: dict) -> dict:
    """The same arrays in containers of their own."""
    return tree_map(lambda array: array, tree)


def resume_or_init(run: Path, s: Settings, report: dict, model, optimizer, ema) -> tuple[int, list]:
    """Load the run's last checkpoint, else the weights of INIT_FROM, else nothing.

    Gives the step that is reached, and the ancestry of the weights. Raises UserError.
    """
    if not (step := checkpoints.newest_valid(run)):
        return 0, init_from(s, model, ema) if s.INIT_FROM else []
    info = checkpoints.read_info(run, step)
    changes = changes_on_resume(run, info, s, report)
    check_origin(run, info.get("ancestry", []), s)
    with ema_applied(model, ema):  # as it was saved
        checkpoints.load(run, step, model, optimizer, ema)
    print("; ".join([f"start: continues {run} after iteration {step}", *changes]))
    print_new_rate(info, s, step, report)
    return step, info.get("ancestry", [])


def origin_of(s: Settings) -> Path:
    """Where the weights of INIT_FROM lie: in CHECKPOINT_DIR, else at the path itself."""
    inside = Path(s.CHECKPOINT_DIR, s.INIT_FROM)
    return inside if inside.exists() else Path(s.INIT_FROM)


def init_from(s: Settings, model: BDH, ema: dict) -> list:
    """Give model and average the weights of INIT_FROM; their ancestry. Raises UserError."""
    if not (origin := origin_of(s)).exists():
        raise UserError(
            f"INIT_FROM {s.INIT_FROM}: there is no such run in {s.CHECKPOINT_DIR}, and no such "
            "path; train that run first, or name another"
        )
    source = load_model(origin)
    unlike = checkpoints.settings_changes(asdict(source.config), asdict(s.BDH_CONFIG))
    if unlike := [text for name, text in unlike.items() if "dropout" not in name]:
        raise UserError(f"INIT_FROM {s.INIT_FROM} is of another shape: {'; '.join(unlike)}")
    model.update(source.parameters())
    if ema:
        ema.update(copy_tree(model.parameters()))
    print(f"start: weights of {s.INIT_FROM}, a new optimizer")
    return phases.ancestry(origin)


def changes_on_resume(run: Path, info: dict, s: Settings, report: dict) -> list[str]:
    """What has changed since a checkpoint, in words. Raises UserError for what may not change."""
    new = settings_dict(s) | checkpoints.versions() | {GLOBAL_BATCH: blocks_per_update(s)}
    try:
        if missing := RULES.keys() & {*FIXED_ON_RESUME} - info["settings"].keys():
            raise UserError(
                f"{run} is of another format: it has no {min(missing)}. Set RUN_NAME to start "
                f"another run, with INIT_FROM {run.name} from these weights"
            )
        old = info["settings"] | info["versions"]
        old[GLOBAL_BATCH] = blocks_per_update(Settings(**info["settings"]))
        changes = checkpoints.settings_changes(old, new) | data_changes(info["data"], report)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run} holds checkpoints of another format; set RUN_NAME") from None
    fixed = [name for name in changes if name in FIXED_ON_RESUME]
    of_data = [name for name in fixed if name.endswith(" data")]
    if "TRAINING_MODE" in fixed or "SEED" in fixed:  # they change the data, too
        fixed = [name for name in fixed if name not in of_data]
    if fixed:
        shown = [*map(changes.get, fixed[:5]), *(["and others"] if len(fixed) > 5 else [])]
        weights = f", with INIT_FROM {run.name} from these weights" if fixed == of_data else ""
        raise UserError(
            f"{run} holds a run with other settings ({'; '.join(shown)}). Set them back to go on "
            f"with it, or set RUN_NAME to start another{weights}"
        )
    return list(changes.values())


def check_origin(run: Path, ancestry: list, s: Settings) -> None:
    """Raise UserError where a run started from other weights than those of INIT_FROM."""
    if s.INIT_FROM and not ancestry:
        raise UserError(
            f"{run} did not start from {s.INIT_FROM}; set RUN_NAME to start another run"
        )
    current = ancestry
    if s.INIT_FROM and (origin := origin_of(s)).exists():
        with suppress(UserError):  # its checkpoints are gone: the run has all that it needs
            current = phases.ancestry(origin)
    if ancestry and current[-1]["sha256"] != ancestry[-1]["sha256"]:
        raise UserError(
            f"{run} started from {ancestry[-1]['weights']}, and the best weights of INIT_FROM "
            f"{s.INIT_FROM} are others now; set RUN_NAME to start another run from them"
        )


def print_new_rate(info: dict, s: Settings, step: int, report: dict) -> None:
    """Say when a resumed run goes on with another learning rate than it would have had."""
    old = Settings(**vars(s) | info["settings"])  # settings of the user's own may be new
    old_end = total_steps(old, info["data"]["train"]["bytes"])
    new_rate = learning_rate(step, total_steps(s, report["train"]["bytes"]), s)
    planned = learning_rate(step, old_end, old)
    if abs(new_rate - planned) > 0.01 * planned:
        last = learning_rate(step - 1, old_end, old)
        print(f"learning rate: {last:.2e} at iteration {step}, {new_rate:.2e} from here on")


def corrupt_bytes(idx: mx.array, share: float, key: mx.array) -> mx.array:
    """idx with `share` of its bytes replaced by bytes from anywhere in it."""
    where, which = mx.random.split(mx.random.split(key, 2)[1])
    others = idx.reshape(-1)[mx.random.randint(0, idx.size, idx.shape, key=which)]
    return mx.where(mx.random.uniform(shape=idx.shape, key=where) < share, others, idx)


@contextmanager
def ema_applied(model: BDH, ema: dict) -> Iterator[None]:
    """Put the average of the weights, if there is one, into the model, to evaluate or save it."""

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


def compile_steps(
    model: BDH, optimizer, ema: dict, clip: float | None, noise: float = 0, decay: float = 0
) -> tuple[Callable, Callable, list]:
    """The two halves of an update, compiled, and the state that they change.

    micro_step(idx, targets, weights, key) -> loss, gradients, both weighted sums over the bytes;
    apply_update(loss, gradients), each summed over the batches -> norm.
    """
    state = [model.state, optimizer.state, ema]
    compiled = partial(mx.compile, inputs=state, outputs=state)

    @compiled
    def micro_step(idx, targets, weights, key):
        idx = corrupt_bytes(idx, noise, key) if noise else idx

        def loss():
            return mx.sum(byte_losses(model, idx, targets, key) * weights)

        return nn.value_and_grad(model, loss)()

    @compiled
    def apply_update(loss, gradients):
        """One step of AdamW; nothing changes where the loss or the gradient is not finite."""
        gradients, norm = optim.clip_grad_norm(gradients, clip or math.inf)
        before = copy_tree(state)
        optimizer.update(model, gradients)
        if ema:  # the decay rises to its value, as in TensorFlow: random weights are forgotten soon
            rate = 1 - mx.minimum(decay, optimizer.step / (optimizer.step + 9))
            ema.update(tree_map(lambda m, w: m + rate * (w - m), ema, model.parameters()))
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        after = tree_map(lambda new, old: mx.where(finite, new, old), state, before)
        model.update(after[0])
        optimizer.state.update(after[1])
        ema.update(after[2])
        return norm

    return micro_step, apply_update, state


class Diverged(Exception):
    """Too many updates in a row, or a validation loss, were not finite. The exit code is 1."""


def main(argv: list[str] | None = None) -> int:
    """Train as the settings say, one run or a chain of PHASES; the exit code. Raises UserError."""
    base, results = settings(argv), {}
    cli.check_temporary_folder()
    for slip in flags.slips(sys.modules[__name__], RULES):
        print(f"warning: {slip}", file=sys.stderr)
    if base.selfcheck:
        return selfcheck.run_checks(sys.modules[__name__])
    if base.plan:
        return plan.print_plan(sys.modules[__name__], base)
    cli.ignore_closed_output()
    world = World()
    base.json_to = sys.stdout if base.json else None  # where print goes no more from here on
    with main_process_prints(base.json_to, world), StopSignal(world) as stop:
        for s in phases.chain(base):
            s.PROCESSES = world.size
            run = checkpoints.run_folder(s)
            with checkpoints.lock_run(run) if world.is_main else nullcontext():
                if code := train_or_explain(s, run, stop, world):
                    return code
                if s.PHASES and world.is_main:
                    results[run.name] = phases.evaluate_modes(
                        s, run, stop, partial(evaluate_mode, s, stop)
                    )
                    if stop.requested:
                        print(f"stopped after {run} was saved; the same command continues it")
                        return 128 + stop.requested
                    print(phases.forgetting_table(results))
    return 0


def train_or_explain(s: Settings, run: Path, stop: StopSignal, world: World) -> int:
    """Run train(), and turn failures that are expected into a line and an exit code."""
    try:
        return train(s, run, stop, world)
    except RuntimeError as error:
        if stop.received:  # Ctrl-C also reaches the compiler that MLX runs, and MLX gives up
            return 128 + stop.received
        if is_lost(error):
            print(f"error: process {world.rank} lost another one: {error}. Checkpoints are as "
                  "they were; the same command goes on", file=sys.stderr)  # fmt: skip
            return 1
        if "shared library" in str(error):
            raise UserError(f"MLX cannot compile: {error}; look at TMPDIR") from None
        if not memory.is_exhausted(error):
            raise
        raise UserError(f"memory is out: {memory.oom_advice(s, memory.available())}") from None
    except Diverged as reason:
        last = max(checkpoints.steps(run), default="none")
        print(f"error: {reason}. Checkpoints are as they were, the last of iteration {last}; "
              "lower LEARNING_RATE or GRAD_CLIP", file=sys.stderr)  # fmt: skip
        return 1


def evaluate_mode(s: Settings, stop: StopSignal, model: BDH, mode: str) -> tuple[float, dict]:
    """What `evaluate` gives on the validation bytes of any mode. Raises UserError without data."""
    losses = mx.compile(partial(byte_losses, model))
    return evaluate(losses, *load_prepared(s, mode)[2], s.BATCH_SIZE, s.BLOCK_SIZE, stop)


def load_split(s: Settings, world: World) -> tuple[dict, Stream, Stream]:
    """As open_split, printed. Raises UserError where processes have different data or settings."""
    report, train, val = open_split(s)
    settings = {k: v for k, v in settings_dict(s).items() if k in RULES or k in vars(s.BDH_CONFIG)}
    sums = {side: report[side]["sha256"] for side in ("train", "val")}
    every = world.all_gather_object(settings | sums)
    if unlike := [k for k in every[0] if any(one[k] != every[0][k] for one in every)]:
        raise UserError(f"the processes differ in {', '.join(unlike)}; give all the same")
    print(escape_controls(describe(report)))
    print(f"plan: {schedule_summary(s, len(train.bytes))}; "
          f"an evaluation reads {len(val.bytes):,} bytes")  # fmt: skip
    return report, train, val


def fields_in(fields: np.ndarray) -> set[str]:
    return {FIELDS[i] for i in np.unique(fields)}


def print_start(s: Settings, run: Path, val: tuple, mode: str, dtype, peak: float) -> None:
    """Print what is trained, in which memory mode, and what to expect of its samples."""
    n_parameters = s.BDH_CONFIG.n_parameters
    print(f"model: {n_parameters:,} parameters, on {mx.default_device()}; run: {run}")
    name = str(dtype).removeprefix("mlx.core.")
    print(f"memory: {mode}, {name}, estimated peak {peak / 1e9:.2f} GB")
    fields = fields_in(val.fields) & {*REQUIRED_FIELDS[s.TRAINING_MODE]}
    print(f"note: {SAMPLE_NOTES[s.TRAINING_MODE if fields else 'text']}")


def begin_run(run: Path, s: Settings, report: dict, ancestry: list, trees: list, world) -> dict:
    """Check that the checkpoints will fit on the disk, and write config.json.

    Gives its content, which each checkpoint repeats. Raises UserError.
    """
    info = {"settings": settings_dict(s), "data": report, "versions": checkpoints.versions()}
    info |= {"ancestry": ancestry, "parameters": s.BDH_CONFIG.n_parameters}
    info["own"] = [name for name in info["settings"] if name.isupper() and name not in RULES]
    if world.is_main:
        # the latest ones, the best, and the one that is being written
        missing = s.KEEP_CHECKPOINTS + 2 - len(checkpoints.steps(run))
        checkpoints.check_space(run, trees, max(1, missing))
        files.atomic_write_text(run / "config.json", json.dumps(info, indent=1))
    return info


def micro_batches(s: Settings, step: int, world: World) -> range:
    """Numbers, in the run, of this process's batches of an update."""
    batches = blocks_per_update(s) // s.BATCH_SIZE
    return range(step * batches + world.rank, (step + 1) * batches, world.size)


def evaluation_results(s, step, model, eval_losses, val, stop, world) -> dict:
    """Losses on the validation bytes, and the share of neurons at work, for the log.

    `monitored_loss` (nats) is the loss on the bytes that LOSS_ON counts. best.json, PATIENCE,
    advice and reports go by it. Raises Diverged.
    """
    if step == 0 or not stop.has_unsaved_work:
        note = memory.slow_note(s)
        print(f"evaluating {len(val.bytes):,} bytes before iteration {step + 1}{note}")
    val_loss, nats = evaluate(eval_losses, *val, s.BATCH_SIZE, s.BLOCK_SIZE, stop, world)
    if stop.requested:
        return {}
    if not math.isfinite(val_loss):
        raise Diverged(f"validation loss is {val_loss} at iteration {step}")
    results = {"step": step, "val_loss": val_loss, "val_bpb": val_loss / math.log(2)}
    results["monitored_loss"] = nats.get(s.LOSS_ON, val_loss)
    results["val_loss_fields"] = nats
    results["val_bpb_fields"] = {field: loss / math.log(2) for field, loss in nats.items()}
    return results | neuron_activity(model, val.bytes, s.BLOCK_SIZE)


def compile_evaluation(model: BDH, n_bytes: int, s: Settings) -> Callable:
    """byte_losses of the model, compiled for the shapes that an evaluation of n_bytes reads."""
    eval_losses = mx.compile(partial(byte_losses, model), inputs=[model.state])
    print("compiling the evaluation, once")
    with default_signals():
        compile_shapes(eval_losses, n_bytes, s.BATCH_SIZE, s.BLOCK_SIZE)
    return eval_losses


def broadcast_state(world: World, model: BDH, optimizer, ema: dict) -> None:
    """Give all processes the state of the first one. Call it before compiling the step."""
    model.update(world.broadcast(model.parameters()))
    for tree in (optimizer.state, ema):
        tree.update(world.broadcast(tree))


def sum_gradients(s, step, micro_step, train_split, stop, world) -> tuple:
    """Loss and gradients of an update, summed over its batches on all processes.

    Gives also whether any target counts. A signal ends it early where there is one process.
    """
    if not stop.has_unsaved_work:
        print("compiling the training step, once (a minute or more on a new machine)")
    (stream, fields), loss, gradients = train_split, 0.0, None
    n_targets = n_targets_in_update(fields, step, s)
    for i in micro_batches(s, step, world):
        batch = get_batch(stream, i * s.BATCH_SIZE, s.BATCH_SIZE, s.BLOCK_SIZE, s.SEED)
        weights = mx.array(loss_weights(fields, i, n_targets, s))
        with nullcontext() if stop.has_unsaved_work else default_signals():
            key = mx.random.key(s.SEED * 2**32 + i)
            micro_loss, micro_gradients = micro_step(*batch, weights, key)
        loss = loss + micro_loss
        gradients = tree_map(mx.add, gradients, micro_gradients) if gradients else micro_gradients
        mx.eval(loss, gradients)  # bounds the memory, and lets a signal in
        if stop.requested:
            break
    return world.all_reduce_sum((loss, gradients)), n_targets > 0


def write_samples(s: Settings, step: int, model: BDH, val: tuple, stop: StopSignal) -> list[str]:
    """What the model writes after the prompts of its mode."""
    prompts = sample_prompts(s.TRAINING_MODE, fields_in(val.fields))
    if s.SAMPLE_BYTES > 1000:
        print(f"writing {len(prompts)} samples of {s.SAMPLE_BYTES:,} bytes")
    return list(complete_prompts(model, prompts, s.SAMPLE_BYTES, s.SEED + step, stop))


def batch_location(s: Settings, step: int, n_bytes: int) -> str:
    """Which bytes an update read."""
    count, shown = blocks_per_update(s), min(blocks_per_update(s), 64)
    starts = block_starts(n_bytes, step * count, shown, s.BLOCK_SIZE, s.SEED).tolist()
    more = f" and {count - shown:,} others" if count > shown else ""
    return f"{s.BLOCK_SIZE} bytes each from {starts}{more} of the training bytes"


def train(s: Settings, run: Path, stop: StopSignal, world: World) -> int:
    """Train one run: 0 at its end, 128 + signal if stopped. Raises Diverged, UserError."""

    # ---- data: bytes to train on and to evaluate on, and the field of each
    stop.has_unsaved_work = False
    report, train_split, val = load_split(s, world)
    n_steps = total_steps(s, len(train_split.bytes))

    # ---- model, optimizer, average: from the last checkpoint, from INIT_FROM's weights, or fresh
    memory_mode, compute, peak = memory.select_mode(s)  # before the model takes any
    model, optimizer, ema = init_model(s, compute)
    resumed = resume_or_init(run, s, report, model, optimizer, ema) if world.is_main else None
    first_step, ancestry = world.broadcast_object(resumed)
    broadcast_state(world, model, optimizer, ema)

    # ---- log: metrics.jsonl, best.json and the terminal; config.json of the run
    log = RunLog(run, first_step, world, s.json_to)
    if is_finished(s, first_step, n_steps, log):
        print(f"finished: {finished_reason(s, run, first_step, n_steps, log.best)}")
        return 0
    print_start(s, run, val, memory_mode, compute.dtype, peak)
    info = begin_run(run, s, report, ancestry, [model.parameters(), optimizer.state, ema], world)

    # ---- compiled functions
    micro_step, apply_update, state = compile_steps(
        model, optimizer, ema, s.GRAD_CLIP, s.BYTE_NOISE, s.EMA_DECAY
    )
    eval_losses = compile_evaluation(model, len(val.bytes), s)
    memory.set_limit(peak)
    baselines = byte_baselines(s.LOSS_ON, train_split, val)
    meter = Meter(first_step, n_steps, s.BLOCK_SIZE * blocks_per_update(s))

    def save(step):
        if step > log.last_saved:
            with ema_applied(model, ema):
                log.save(step, partial(checkpoints.save, run, step, model, optimizer, info, ema))

    for step in range(first_step, n_steps + 1):  # one more than updates: the end is evaluated too
        last_step = step == n_steps
        stop.sync()

        # every SAVE_FREQ updates: save first, so that a crash in the evaluation loses nothing
        if last_step or stop.requested or step % s.SAVE_FREQ == 0:
            save(step)
        if stop.requested:
            break

        # every EVAL_FREQ updates: evaluate on the same bytes, keep the best, advise, write samples
        if (last_step or step % s.EVAL_FREQ == 0) and log.last_eval < step:
            with ema_applied(model, ema):
                results = evaluation_results(s, step, model, eval_losses, val, stop, world)
            if stop.requested:
                save(step)
                break
            if step and results["monitored_loss"] < log.best.get("monitored_loss", math.inf):
                save(step)
                log.write_best(step, results["monitored_loss"])
            log.write(**results, advice=advise([*log.history, results], s, n_steps, baselines))
            if world.is_main and (step or ancestry):  # random weights write noise
                with ema_applied(model, ema):
                    log.write(step=step, samples=write_samples(s, step, model, val, stop))
            if log.patience_exceeded(s.PATIENCE):
                last_step = True
                save(step)
            if world.is_main:
                redraw(run)
        if world.is_main:
            checkpoints.prune(run, s.KEEP_CHECKPOINTS, log.best.get("step"))
        if last_step:
            break

        # one update: micro-batches on each process, then one step of AdamW
        meter.start()
        optimizer.learning_rate = lr = learning_rate(step, n_steps, s)
        (loss, gradients), counts = sum_gradients(s, step, micro_step, train_split, stop, world)
        if stop.requested:  # the update is not whole: the run is saved as it was after the last one
            save(step)
            break
        norm = apply_update(loss, gradients)
        mx.eval(state, norm)
        stop.has_unsaved_work = True  # from here on there is work to save
        meter.stop(step + 1, loss.item(), norm.item(), counts)
        if meter.consecutive_skips == s.MAX_CONSECUTIVE_SKIPS:
            raise Diverged(f"no sound update in {s.MAX_CONSECUTIVE_SKIPS} iterations; last batch: "
                           f"{batch_location(s, step, len(train_split.bytes))}")  # fmt: skip
        if (step + 1) % s.LOG_FREQ == 0 and meter.losses:
            log.write(step=step + 1, lr=lr, grad_norm=norm.item(), **meter.read(step + 1))

    meter.bar.close()
    if stop.requested:
        print(f"stopped after iteration {step}, saved in {run}; the same command continues it")
        return 128 + stop.requested
    print_summary(s, run, n_steps, results, log.best, len(train_split.bytes), meter.minutes())
    print(f"sample_it: {sample_command(s, run, fields_in(val.fields))}")
    return 0


def is_finished(s: Settings, step: int, n_steps: int, log: RunLog) -> bool:
    """Whether a run at `step` has nothing left to train or to evaluate."""
    if step > n_steps:  # MAX_ITERS or EPOCHS were lowered
        return True
    return log.last_eval == step and (step == n_steps or log.patience_exceeded(s.PATIENCE))


def finished_reason(s: Settings, run: Path, step: int, total: int, best: dict) -> str:
    """Why nothing is left to do, and which setting to change to continue."""
    if step >= total:
        return f"{run} has {step:,} iterations of {total:,}; to go on, raise MAX_ITERS or EPOCHS"
    return (
        f"{run} stopped early after {step:,} iterations, its best is of {best['step']:,}; "
        f"to go on, raise PATIENCE ({s.PATIENCE}) or lift it with --patience none"
    )


def print_summary(s, run: Path, n_steps: int, last: dict, best: dict, n_bytes, minutes) -> None:
    """Print the results of a finished run, for people and grep; `last` is its last evaluation."""
    ended = "by MAX_ITERS" if last["step"] == s.MAX_ITERS else "by EPOCHS"
    if last["step"] < n_steps:
        ended = f"early, {s.PATIENCE} validations without a better one"
    epochs = last["step"] * s.BLOCK_SIZE * blocks_per_update(s) / n_bytes
    values = {
        "epochs": f"{epochs:.2f}",
        "minutes": f"{minutes:.1f}",
        "peak_gb": f"{mx.get_peak_memory() / 1e9:.2f}",
        "run": run,
        "iterations": last["step"],
        "parameters": s.BDH_CONFIG.n_parameters,
        "val_loss": f"{last['val_loss']:.4f}",
        "val_bpb": f"{last['val_bpb']:.4f}",
        "monitored_on": f"{s.LOSS_ON} bytes",
        "best_monitored": f"{best['monitored_loss']:.4f}",
        "best_step": best["step"],
        "ended": ended,
        "active_x": " ".join(f"{share:.1%}" for share in last["active_x"]),  # layer by layer
        "active_y": " ".join(f"{share:.1%}" for share in last["active_y"]),
        "look_at_it": run / "report.html",
    }
    print("\n".join(f"{name}: {value}" for name, value in values.items()))


def sample_command(s: Settings, run: Path, fields: set[str]) -> str:
    """A command that lets the finished run write, within the blocks that it was trained on."""
    prompt = sample_prompts(s.TRAINING_MODE, fields)[0]
    python = Path(sys.executable)  # of make's .venv, which the user's shell may not know
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    words = [python, "generate.py", run, "--prompt", prompt.replace("\n", "\\n")]
    if len(prompt) + MAX_NEW_TOKENS > s.BLOCK_SIZE:
        words += ["--window", max(s.BLOCK_SIZE, WINDOW_PARTS)]
    return shlex.join(map(str, words))


# ------------------------------------------------------------------------------------------- flags

# Changing one of these in a run would change what its steps mean: that takes a new RUN_NAME.
GLOBAL_BATCH = "BATCH_SIZE x GRAD_ACCUM x processes"
FIXED_ON_RESUME = ["TRAINING_MODE", "BLOCK_SIZE", GLOBAL_BATCH, "SEED"]
FIXED_ON_RESUME += ["LOSS_ON", "EVAL_BYTES", "EMA_DECAY", "train data", "val data"]
FIXED_ON_RESUME += ["n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size"]
RULES = {  # what each setting may be; one that is not here, a user's own, may be anything
    "TRAINING_MODE": choice(*REQUIRED_FIELDS),
    "LOSS_ON": choice("all", "response"),
    "DATASET": text(),
    "COLUMNS": text(none=True),
    "BLOCK_SIZE": whole(1),
    "BATCH_SIZE": whole(1),
    "GRAD_ACCUM": whole(1),
    "MAX_ITERS": whole(1, none=True),
    "EPOCHS": number("above 0 and at most 1,000,000", lambda x: 0 < x <= 1e6, none=True),
    "PATIENCE": whole(1, none=True),
    "LEARNING_RATE": number("from 1e-12 to 1,000", lambda x: 1e-12 <= x <= 1000),
    "MIN_LR_RATIO": number("above 0 and at most 1", lambda x: 0 < x <= 1),
    "WARMUP_ITERS": whole(0),
    "LR_DECAY_ITERS": whole(1, none=True),
    "WEIGHT_DECAY": number("from 0 to 1,000", lambda x: 0 <= x <= 1000),
    "GRAD_CLIP": number("from 1e-12 to 1e12", lambda x: 1e-12 <= x <= 1e12, none=True),
    "EMA_DECAY": number("from 0 to 0.999999", lambda x: 0 <= x <= 0.999999),
    "BYTE_NOISE": number("at least 0 and below 1", lambda x: 0 <= x < 1),
    "MAX_CONSECUTIVE_SKIPS": whole(1),
    "BDH_CONFIG": Rule(BDHConfig, needs="a BDHConfig(...)"),
    "DTYPE": choice("auto", "bfloat16", "float32"),
    "MEMORY_MODE": choice("auto", *memory.MODES),
    "IGNORE_MEMORY_CHECK": switch(),
    "SEED": whole(0, 2**32 - 1),  # it makes a key of 64 bits with the number of a batch
    "VAL_FRACTION": number("above 0 and below 1", lambda x: 0 < x < 1),
    "EVAL_BYTES": whole(2, 2**62, none=True),
    "LOG_FREQ": whole(1),
    "EVAL_FREQ": whole(1),
    "SAVE_FREQ": whole(1),
    "KEEP_CHECKPOINTS": whole(1),
    "SAMPLE_BYTES": whole(0, 10**6),
    "CHECKPOINT_DIR": text(),
    "RUN_NAME": text(none=True),
    "INIT_FROM": text(none=True),
    "PHASES": text(none=True),
}


def settings(argv: list[str] | None = None) -> Settings:
    """The constants at the top, changed by a preset, changed by flags. Raises UserError."""
    s, typed = flags.parse(sys.modules[__name__], RULES, PRESETS, ACTIONS, argv)
    refuse_flags_without_effect(s, typed)
    for name in ("CHECKPOINT_DIR", "INIT_FROM"):  # no shell reads a constant
        if getattr(s, name):
            setattr(s, name, str(files.expand_user(getattr(s, name), name)))
    s.BDH_CONFIG = BDHConfig(**{name: vars(s).pop(name) for name in asdict(s.BDH_CONFIG)})
    for run in phases.chain(s):
        check_settings(run)
    return s


def refuse_flags_without_effect(s: Settings, typed: set[str]) -> None:
    """Raise UserError for typed flags that have no effect beside others."""
    idle = {}
    if s.selfcheck:
        idle["--selfcheck"] = typed - {"selfcheck"}
    if s.plan:
        idle["--plan"] = typed & {"json"}
    if s.PHASES is not None:
        idle["--phases, which names its own"] = typed & {"TRAINING_MODE", "EPOCHS"}
    for beside, names in idle.items():
        if names:
            idle_flags = ", ".join(sorted(map(flags.flag_of, names)))
            raise UserError(f"{idle_flags}: no effect beside {beside}; leave it out")


def check_settings(s: Settings) -> None:
    """Raise UserError for the settings of a run that do not go together."""
    for name, rule in RULES.items():  # PHASES may have put other values in
        check(name, getattr(s, name), rule)
    checkpoints.run_folder(s)  # RUN_NAME
    parse_columns(s.COLUMNS)
    if s.LOSS_ON not in ("all", *REQUIRED_FIELDS[s.TRAINING_MODE]):
        raise UserError(
            f"LOSS_ON is {s.LOSS_ON!r}, of which TRAINING_MODE {s.TRAINING_MODE!r} has none; "
            "set TRAINING_MODE to 'full' or LOSS_ON to 'all'"
        )
    if s.MAX_ITERS is None and s.EPOCHS is None:
        raise UserError("MAX_ITERS and EPOCHS are both none, a run without an end; set one of them")
    if s.BDH_CONFIG.vocab_size != 256:
        raise UserError(f"vocab_size is {s.BDH_CONFIG.vocab_size}; bytes are 256")
