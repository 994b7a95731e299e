"""Train a BDH on an instruction data set, byte by byte, with MLX.

    python train_mlx.py                                 # the settings below
    python train_mlx.py --preset tiny --dataset sample  # minutes on two CPU cores, no network
    python train_mlx.py --plan                          # what the run would be, and its data

The same command once more continues where the run stopped. A run is a folder,
checkpoints_mlx/<run>: step-000500 and others (weights, optimizer, settings), best.json,
metrics.jsonl, and report.html to look at.
"""

if __name__ == "__main__":  # cli.run imports it as a module: errors in settings are one line
    from bdh_lib import start

    start.run(__file__)

import bdh_mlx
from bdh_mlx import BDHConfig  # noqa: F401  so that a pasted BDHConfig(...) works, too

# Settings, in plain Python: change a line, paste one over it, add one of your own. Each is also a
# flag (BLOCK_SIZE: --block-size, n_layer: --n-layer); flags beat presets, presets beat these lines.
# RULES in bdh_lib/training/settings.py says what each may be, and which may change on a resume.
# Where None is allowed, the flag takes `none`.
# Data
TRAINING_MODE: str = "both"  # what to train on: "system", "instruction", "both" or "full"
LOSS_ON: str = "all"  # bytes that count in the training loss: "all", or "response" (mode full only)
DATASET: str = "Severian/Internal-Knowledge-Map"  # hub name, file, folder, or "sample"
COLUMNS: str | None = None  # "instruction=query,response=reply"; none: by the names of columns
# Training
BLOCK_SIZE: int = 2048  # context length in training, in bytes
BATCH_SIZE: int = 2  # sequences computed at once, by each process
GRAD_ACCUM: int = 1  # micro-batches per iteration (gradient accumulation)
MAX_ITERS: int | None = 10_000  # iterations, unless EPOCHS end the run sooner
EPOCHS: float | None = 10  # passes over the training bytes; none: as many as MAX_ITERS takes
PATIENCE: int | None = 5  # evaluations without a new best that end the run; none: never stop early
LEARNING_RATE: float = 1e-3  # at the end of the warm-up
MIN_LR_RATIO: float = 0.1  # at the end of the cosine, as a share of LEARNING_RATE
WARMUP_ITERS: int = 100  # linear warm-up, in iterations
LR_DECAY_ITERS: int | None = None  # iteration at which the cosine ends; none: the end of the run
WEIGHT_DECAY: float = 0.5  # AdamW's; the paper has 0.1
BETA2: float = 0.95  # AdamW's decay of the mean of squared gradients
GRAD_CLIP: float | None = 1.0  # largest global norm of a gradient; none: no clipping
EMA_DECAY: float = 0.99  # decay of the exponential moving average of the weights; 0: off
SHUFFLE_RECORDS: bool = True  # a new order of the records in each epoch; plain text keeps its own
BYTE_NOISE: float = 0.0  # share of the input bytes replaced by others of the batch, in training
MAX_CONSECUTIVE_SKIPS: int = 10  # skipped updates in a row, not finite, that end the run
# Model, and how it is computed
BDH_CONFIG = bdh_mlx.BDHConfig(n_layer=4, dropout=0.3)  # n_embd=256, n_head=4: 25.3M parameters
DTYPE: str = "auto"  # of matrix products: "bfloat16", "float32"; auto: bfloat16 on a GPU
MEMORY_MODE: str = "auto"  # activation checkpointing: "fast", "balanced", "small"; auto: what fits
IGNORE_MEMORY_CHECK: bool = False  # start even if the estimate exceeds the available memory
# Evaluation, log and checkpoints
SEED: int = 1337  # of weights, split, data order, dropout and samples
VAL_FRACTION: float = 0.1  # of the records, held out
EVAL_BYTES: int | None = 200_000  # most validation bytes read, in whole records; none: all
LOG_FREQ: int = 50  # iterations between lines
EVAL_FREQ: int = 500  # iterations between validations and samples
SAVE_FREQ: int = 500  # iterations between checkpoints
SAVE_MINUTES: float | None = 10  # minutes between checkpoints at most; none: SAVE_FREQ alone
KEEP_CHECKPOINTS: int = 3  # latest checkpoints kept, besides the best
SAMPLE_BYTES: int = 200  # length of each sample, and of each answer at most; 0: none
# Runs
CHECKPOINT_DIR: str = "checkpoints_mlx"  # holds one folder per run, and the prepared data
RUN_NAME: str | None = None  # folder of this run; none: the training mode
INIT_FROM: str | None = None  # run, checkpoint or hf:USER/NAME whose weights start this run
PHASES: str | None = None  # a chain, mode:EPOCHS@LEARNING_RATE each: "system:3,full:2@3e-5"
KEEP_AWAKE: bool = True  # a Mac does not sleep while it trains; its display may

ACTIONS = {
    "plan": "print the planned run and problems of its data, then exit",
    "json": "log lines are JSON objects, alone on stdout; all else goes to stderr",
    "refresh_data": "ignore the cache and prepare the data again",
    "tune": "find the fastest way to compute on this machine, in at most 2 minutes, and keep it",
    "selfcheck": "check that model and trainer work here, in a minute or two: exit code 0 or 1",
}

# The settings above are the recipe that docs/log.md measures on 4 MB of records. Each preset is
# flags: four for a Mac with 64 GB (phase 2 starts from the weights of phase 1), one for 16 GB,
# `tiny` for a first look. What a preset does not name is as in the lines above.
OFFICIAL = (
    "--n-layer 6 --dropout 0.1 --weight-decay 0.1 --beta2 0.999 --ema-decay 0 "
    "--no-shuffle-records --eval-freq 250 "
)
LARGE = OFFICIAL + "--block-size 4096 --batch-size 2 --training-mode "
PRESETS = {
    "both-64gb": LARGE + "both --max-iters 5000 --learning-rate 5e-5 --epochs 3",
    "full-64gb": LARGE + "full --max-iters 8000 --learning-rate 3e-5 --epochs 3",
    "phase1-64gb": LARGE + "system --max-iters 3000 --learning-rate 1e-4",
    "phase2-64gb": LARGE + "instruction --max-iters 3000 --learning-rate 5e-5 --init-from system",
    "both-16gb": OFFICIAL
    + "--training-mode both --block-size 2048 --batch-size 1 --max-iters 5000 "
    "--learning-rate 5e-5 --eval-bytes 50000",
    "tiny": OFFICIAL + "--n-layer 2 --n-embd 64 --mlp-internal-dim-multiplier 32 --dropout 0 "
    "--beta2 0.95 --ema-decay 0.99 --shuffle-records --training-mode full --block-size 128 "
    "--batch-size 2 --max-iters 4500 --epochs none --learning-rate 2e-3 --warmup-iters 40 "
    "--log-freq 50 --eval-freq 2250 --save-freq 2250 --eval-bytes 45000",
    # The recipe that docs/log.md measures on a megabyte of text, 6.4M parameters
    "small-data": OFFICIAL + "--mlp-internal-dim-multiplier 32 --dropout 0.5 --dropout-v 0.1 "
    "--byte-noise 0.05 --weight-decay 1 --beta2 0.95 --ema-decay 0.998 --min-lr-ratio 0.02 "
    "--block-size 2048 --batch-size 2 --max-iters 12000 --epochs none --learning-rate 1e-3 "
    "--eval-freq 1000",
}

# The imports come after the settings, so that the settings are at the top of the file.

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from bdh_lib import cli, files, flags, plots
from bdh_lib.compute import memory
from bdh_lib.compute.device import on_cuda
from bdh_lib.data.formats import format_example  # noqa: F401  for other scripts
from bdh_lib.data.split import Split
from bdh_lib.errors import UserError, warn
from bdh_lib.flags import Settings, settings_dict
from bdh_lib.generation.samples import write_samples
from bdh_lib.progress import heartbeat
from bdh_lib.training import checkpoints, macos, phases, plan, selfcheck, summary, tuning
from bdh_lib.training.advice import advise, byte_baselines
from bdh_lib.training.batches import (
    batch_indices,
    batch_positions,
    get_batch,
    micro_batch_indices,
    n_targets_in_step,
)
from bdh_lib.training.dataset import load_split
from bdh_lib.training.distributed import World, is_lost
from bdh_lib.training.ema import ema_applied
from bdh_lib.training.evaluation import compile_evaluation, evaluate, neuron_activity
from bdh_lib.training.report import redraw
from bdh_lib.training.resume import resume_or_init
from bdh_lib.training.runlog import Meter, RunLog, main_process_prints
from bdh_lib.training.schedule import blocks_per_step, learning_rate, total_steps
from bdh_lib.training.settings import RULES, parse_settings, preset_settings
from bdh_lib.training.signals import StopSignal, default_signals
from bdh_lib.training.step import compile_steps, init_model
from bdh_lib.units import bits_per_byte
from bdh_mlx import BDH

# ---------------------------------------------------------------------------------------- training


class Diverged(Exception):
    """Too many updates in a row, or a validation loss, were not finite. The exit code is 1."""


def main(argv: list[str] | None = None) -> int:
    """Train as the settings say, one run or a chain of PHASES; the exit code. Raises UserError."""
    base = settings(argv)
    memory.keep_float32_exact(base.DTYPE)
    cli.check_temporary_folder()
    for slip in flags.find_typos(sys.modules[__name__], RULES):
        warn(slip)
    if base.selfcheck:
        return selfcheck.run_checks(base.DTYPE)
    if base.plan:
        return plan.print_plan(base, preset_settings(sys.modules[__name__]))
    if base.tune:
        return tuning.tune(base)
    cli.ignore_closed_output()
    plots.find_fonts()  # before MLX computes anything
    world = World()
    base.json_to = sys.stdout if base.json else None  # where print goes no more from here on
    with (
        # without argv this run is all that the process does
        macos.restarted_after_gpu_fault(base, argv is None and world.size == 1),
        macos.kept_awake(base.KEEP_AWAKE),
        main_process_prints(base.json_to, world),
        StopSignal(world) as stop,
    ):
        return train_chain(base, stop, world)


def train_chain(base: Settings, stop: StopSignal, world: World) -> int:
    """Train the runs of PHASES in turn, or the one run; the exit code. Raises UserError.

    After each of PHASES a table shows the loss in every mode, and what was forgotten.
    """
    results = {}
    for s in phases.chain(base):
        s.PROCESSES = world.size
        run = checkpoints.run_folder(s)
        with checkpoints.lock_run(run) if world.is_main else nullcontext():
            if code := train_or_explain(s, run, stop, world):
                return code
            if s.PHASES and world.is_main:
                results[run.name] = phases.evaluate_modes(s, run, stop)
                if stop.requested:
                    print(f"stopped after {run} was saved; the same command continues it")
                    return 128 + stop.requested
                print(phases.forgetting_table(results))
    return 0


def settings(argv: list[str] | None = None) -> Settings:
    """Return the constants at the top, changed by a preset, changed by flags. Raises UserError."""
    return parse_settings(sys.modules[__name__], argv)


def train_or_explain(s: Settings, run: Path, stop: StopSignal, world: World) -> int:
    """Run train(), and turn failures that are expected into a line and an exit code."""
    stop.has_trained = False
    try:
        return train(s, run, stop, world)
    except RuntimeError as error:
        if stop.received and not stop.has_trained:  # Ctrl-C ends the compiler that MLX runs, too
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


def begin_run(
    run: Path,
    s: Settings,
    data_report: dict,
    ancestry: list,
    model: BDH,
    optimizer,
    ema: dict,
    world,
) -> dict:
    """Check that the checkpoints will fit on the disk, and write config.json.

    Gives its content, which each checkpoint repeats. Raises UserError.
    """
    info = {"settings": settings_dict(s), "data": data_report, "versions": checkpoints.versions()}
    info |= {"ancestry": ancestry, "parameters": s.BDH_CONFIG.n_parameters}
    info["compute"] = tuning.choice_of(model.compute) | {"groups": model.compute.groups}
    info["own"] = [name for name in info["settings"] if name.isupper() and name not in RULES]
    if world.is_main:
        # the latest ones, the best, and the one that is being written
        missing = s.KEEP_CHECKPOINTS + 2 - len(checkpoints.steps(run))
        trees = [model.parameters(), optimizer.state, ema]
        checkpoints.check_space(run, trees, max(1, missing))
        files.atomic_write_text(run / "config.json", json.dumps(info, indent=1))
    return info


def evaluation_results(
    s: Settings,
    step: int,
    model: BDH,
    eval_losses: Callable,
    val: Split,
    stop: StopSignal,
    world: World,
) -> dict:
    """Return the losses on the validation bytes, and the share of neurons at work, for the log.

    `monitored_loss` (nats) is the loss on the bytes that LOSS_ON counts. best.json, PATIENCE,
    advice and reports go by it. Raises Diverged.
    """
    if step == 0 or not stop.has_trained:
        note = memory.slow_note(s)
        print(f"evaluating {len(val.bytes):,} bytes before iteration {step + 1}{note}")
    sizes = (s.BATCH_SIZE, s.BLOCK_SIZE)
    val_loss, nats = evaluate(eval_losses, val.bytes, val.fields, *sizes, stop, world)
    if stop.requested:
        return {}
    if not math.isfinite(val_loss):
        raise Diverged(f"validation loss is {val_loss} at iteration {step}")
    results = {"step": step, "val_loss": val_loss, "val_bpb": bits_per_byte(val_loss)}
    results["monitored_loss"] = nats.get(s.LOSS_ON, val_loss)
    results["val_loss_fields"] = nats
    results["val_bpb_fields"] = {field: bits_per_byte(loss) for field, loss in nats.items()}
    with heartbeat("counting active neurons"):
        return results | neuron_activity(model, val.bytes, s.BLOCK_SIZE)


def broadcast_state(world: World, model: BDH, optimizer, ema: dict) -> None:
    """Give all processes the state of the first one. Call it before compiling the step."""
    model.update(world.broadcast(model.parameters()))
    for tree in (optimizer.state, ema):
        tree.update(world.broadcast(tree))


class SummedGradients(NamedTuple):
    """The loss of a step and its gradients, and whether any target counts in them."""

    loss: mx.array
    gradients: dict
    has_targets: bool


def sum_gradients(
    s: Settings,
    step: int,
    micro_step: Callable,
    train_split: Split,
    stop: StopSignal,
    world: World,
) -> SummedGradients:
    """Return the gradients of a step, over its batches on all processes.

    A signal ends it early where there is one process.
    """
    if not stop.has_trained:
        print("compiling the training step, once (a minute or more on a new machine)")
    loss, gradients, n_targets = 0.0, None, n_targets_in_step(train_split, step, s)
    indices = micro_batch_indices(s, step, world)
    for i in indices:
        batch = get_batch(train_split, i, s, n_targets)
        with nullcontext() if stop.has_trained else default_signals():
            micro_loss, micro_gradients = micro_step(*batch)
        loss = loss + micro_loss
        gradients = tree_map(mx.add, gradients, micro_gradients) if gradients else micro_gradients
        if i < indices[-1] or not on_cuda():
            mx.eval(loss, gradients)  # bounds the memory, and lets a signal in
        if stop.requested:
            break
    return SummedGradients(*world.all_reduce_sum((loss, gradients)), n_targets > 0)


def no_sound_update(s: Settings, step: int, train_split: Split) -> str:
    """Return why a run ends, and where in the data the blocks of its last step begin."""
    count = blocks_per_step(s)
    shown = batch_indices(s, step)[: math.ceil(64 / s.BATCH_SIZE)]
    starts = [int(n) for i in shown for n in batch_positions(train_split, i, s)[:, 0]][:64]
    more = f" and {count - len(starts):,} others" if count > len(starts) else ""
    return (
        f"no sound update in {s.MAX_CONSECUTIVE_SKIPS} iterations; last batch: "
        f"{s.BLOCK_SIZE} bytes each from {starts}{more} of the training bytes"
    )


def train(s: Settings, run: Path, stop: StopSignal, world: World) -> int:
    """Train one run: 0 at its end, 128 + signal if stopped. Raises Diverged, UserError."""

    # ---- data: bytes to train on and to evaluate on, and the field of each
    data_report, train_split, val = load_split(s, {*RULES, *asdict(s.BDH_CONFIG)}, world)
    n_steps = total_steps(s, len(train_split.bytes))

    # ---- model, optimizer, average: from the last checkpoint, from INIT_FROM's weights, or fresh
    first_step = world.broadcast_object(world.is_main and checkpoints.newest_valid(run))
    memory_mode, compute, peak = tuning.select(s, *tuning.preferred(s, run, first_step, world))
    model, optimizer, ema = init_model(s, compute)
    ancestry = world.broadcast_object(
        world.is_main and resume_or_init(run, first_step, s, data_report, model, optimizer, ema)
    )
    broadcast_state(world, model, optimizer, ema)

    # ---- log: metrics.jsonl, best.json and the terminal; config.json of the run
    log = RunLog(run, first_step, world, s.json_to)
    if is_finished(s, first_step, n_steps, log):
        print(f"finished: {summary.finished_reason(s, run, first_step, n_steps, log.best)}")
        return 0
    summary.print_start(s, run, val, n_steps, memory_mode, compute.dtype, peak)
    info = begin_run(run, s, data_report, ancestry, model, optimizer, ema, world)

    # ---- compiled functions
    micro_step, apply_update, state = compile_steps(model, optimizer, ema, s)
    eval_losses = compile_evaluation(model, len(val.bytes), s)
    memory.set_limit(peak, compute)
    baselines = byte_baselines(s.LOSS_ON, train_split, val)
    meter = Meter(first_step, n_steps, s.BLOCK_SIZE * blocks_per_step(s))

    def save(step):
        if step > log.last_saved:
            with ema_applied(model, ema):
                log.save(step, partial(checkpoints.save, run, step, model, optimizer, info, ema))

    for step in range(first_step, n_steps + 1):  # one more: the end is evaluated too
        last_step = step == n_steps
        stop.sync()

        # by SAVE_FREQ or SAVE_MINUTES: save first, so that a crash in the evaluation loses nothing
        if last_step or stop.requested or log.is_save_due(step, s.SAVE_FREQ, s.SAVE_MINUTES):
            save(step)
        if stop.requested:
            break

        # every EVAL_FREQ steps: evaluate on the same bytes, keep the best, advise, write samples
        if (last_step or step % s.EVAL_FREQ == 0) and log.last_eval < step:
            with ema_applied(model, ema):
                results = evaluation_results(s, step, model, eval_losses, val, stop, world)
            if stop.requested:
                save(step)
                break
            if step and log.is_best(results["monitored_loss"]):
                save(step)
                log.write_best(step, results["monitored_loss"])
            log.write(**results, advice=advise([*log.history, results], s, n_steps, baselines))
            if world.is_main and s.SAMPLE_BYTES and (step or ancestry):  # random weights: noise
                with ema_applied(model, ema):
                    log.write(step=step, **write_samples(s, step, model, val, stop))
            if log.patience_exceeded(s.PATIENCE):
                last_step = True
                save(step)
            if world.is_main:
                redraw(run)
        if world.is_main and log.last_saved == step:
            checkpoints.prune(run, s.KEEP_CHECKPOINTS, log.best.get("step"))
        if last_step:
            break

        # one step: micro-batches on each process, then an update by AdamW
        meter.start()
        optimizer.learning_rate = lr = learning_rate(step, n_steps, s)
        with meter.show_life():
            summed = sum_gradients(s, step, micro_step, train_split, stop, world)
            if stop.requested:  # before the update: this step is not in what is saved
                save(step)
                break
            norm = apply_update(summed.loss, summed.gradients)
            (mx.async_eval if stop.has_trained and on_cuda() else mx.eval)(state, norm)
        stop.has_trained = True  # from here on there is work to save
        is_due = step + 1 == n_steps or 0 in ((step + 1) % s.LOG_FREQ, (step + 1) % s.EVAL_FREQ)
        meter.stop(step + 1, summed.loss, norm, summed.has_targets, wait=is_due)
        if meter.consecutive_skips >= s.MAX_CONSECUTIVE_SKIPS:
            raise Diverged(no_sound_update(s, step - len(meter.unread), train_split))
        if (step + 1) % s.LOG_FREQ == 0 and (averages := meter.pop_averages(step + 1)):
            log.write(step=step + 1, lr=lr, grad_norm=norm.item(), **averages)

    meter.close()
    if stop.requested:
        print(f"stopped after iteration {step}, saved in {run}; the same command continues it")
        return 128 + stop.requested
    summary.print_summary(s, run, n_steps, results, log.best, train_split, val, meter.minutes())
    return 0


def is_finished(s: Settings, step: int, n_steps: int, log: RunLog) -> bool:
    """Tell whether a run at `step` has nothing left to train or to evaluate."""
    if step > n_steps:  # MAX_ITERS or EPOCHS were lowered
        return True
    return log.last_eval == step and (step == n_steps or log.patience_exceeded(s.PATIENCE))
