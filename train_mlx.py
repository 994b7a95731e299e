"""Train a BDH on an instruction data set, byte by byte, with MLX.

    python train_mlx.py                                 # the settings below
    python train_mlx.py --preset tiny --dataset sample  # minutes on two CPU cores, no network
    python train_mlx.py --plan                          # what the run would be, and its data

The same command once more continues where the run stopped. A run is a folder,
checkpoints_mlx/<run>: step-000500 and others (weights, optimizer, settings), best.json,
metrics.jsonl, and report.html to look at.
"""

if __name__ == "__main__":
    # start.run imports this file as a module and calls its main(). So a mistake in the settings
    # below is one line, not a traceback.
    from bdh_lib.script import start

    start.run(__file__)

import bdh_mlx
from bdh_mlx import BDHConfig  # noqa: F401  so that a pasted BDHConfig(...) works, too

# Settings, in plain Python: change a line, paste one over it, or add one of your own above ACTIONS.
# Each is also a flag (BLOCK_SIZE: --block-size, n_layer: --n-layer); flags beat presets, presets
# beat these lines. bdh_lib/training/train_settings.py says what each may be, and which may change
# on a resume. Where None is allowed, the flag takes `none`.
# Data
TRAINING_MODE: str = "both"  # what to train on: "system", "instruction", "both" or "full"
LOSS_ON: str = "all"  # bytes that count in the training loss: "all", or "response" (mode full only)
DATASET: str = "Severian/Internal-Knowledge-Map"  # hub name, file, folder, or "sample"
COLUMNS: str | None = None  # "instruction=query,response=reply"; none: by the names of columns
# Training
BLOCK_SIZE: int = 2048  # context length in training, in bytes
BATCH_SIZE: int = 2  # sequences computed at once, by each process
GRAD_ACCUM: int = 1  # micro-batches per iteration (gradient accumulation)
MAX_ITERS: int | None = 13_300  # iterations, unless EPOCHS end the run sooner
EPOCHS: float | None = 13  # passes over the training bytes; none: as many as MAX_ITERS takes
PATIENCE: int | None = 5  # evaluations without a new best that end the run; none: never stop early
LEARNING_RATE: float = 1e-3  # at the end of the warm-up
MIN_LR_RATIO: float = 0.2  # at the end of the cosine, as a share of LEARNING_RATE
WARMUP_ITERS: int = 100  # linear warm-up, in iterations
LR_DECAY_ITERS: int | None = None  # iteration at which the cosine ends; none: the end of the run
WEIGHT_DECAY: float = 0.5  # AdamW's; the paper has 0.1
BETA2: float = 0.95  # AdamW's decay of the mean of squared gradients
GRAD_CLIP: float | None = 1.0  # largest global norm of a gradient; none: no clipping
EMA_DECAY: float = 0.9999  # largest decay of the averaged weights; at step t, t / (t + 9); 0: off
SHUFFLE_RECORDS: bool = True  # a new order of the records in each epoch; plain text keeps its own
BYTE_NOISE: float = 0.0  # share of the input bytes replaced by others of the batch, in training
MAX_CONSECUTIVE_SKIPS: int = 10  # skipped updates in a row (not finite) that end the run
# Model, and how it is computed
BDH_CONFIG = bdh_mlx.BDHConfig(n_layer=3, dropout=0.3)  # n_embd=256, n_head=4: 25.3M parameters
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
    "selfcheck": "check that model and trainer work here, in at most 2 minutes: exit code 0 or 1",
}

# The settings above are the recipe that docs/log.md measures on 4 MB of records, there in mode full
# and without PATIENCE. A preset stands for a line of flags; what it does not name is as above. The
# presets for 64 and 16 GB keep earlier settings on purpose. Phase 2 starts from the weights of
# phase 1. `tiny` is for a first look, `small-data` for a megabyte of text.
PRESET_BASE = (  # what all presets begin with: model and AdamW as in the official code, and more
    "--n-layer 6 --dropout 0.1 --weight-decay 0.1 --beta2 0.999 --ema-decay 0 "
    "--min-lr-ratio 0.1 --epochs 10 --no-shuffle-records --eval-freq 250 "
)
LARGE = PRESET_BASE + "--block-size 4096 --batch-size 2 --training-mode "
PRESETS = {
    "both-64gb": LARGE + "both --max-iters 5000 --learning-rate 5e-5 --epochs 3",
    "full-64gb": LARGE + "full --max-iters 8000 --learning-rate 3e-5 --epochs 3",
    "phase1-64gb": LARGE + "system --max-iters 3000 --learning-rate 1e-4",
    "phase2-64gb": LARGE + "instruction --max-iters 3000 --learning-rate 5e-5 --init-from system",
    "both-16gb": PRESET_BASE
    + "--training-mode both --block-size 2048 --batch-size 1 --max-iters 5000 "
    "--learning-rate 5e-5 --eval-bytes 50000",
    "tiny": PRESET_BASE + "--n-layer 2 --n-embd 64 --mlp-internal-dim-multiplier 32 --dropout 0 "
    "--beta2 0.95 --ema-decay 0.99 --shuffle-records --training-mode full --block-size 128 "
    "--batch-size 2 --max-iters 4500 --epochs none --learning-rate 2e-3 --warmup-iters 40 "
    "--eval-freq 2250 --save-freq 2250 --eval-bytes 45000",
    "small-data": PRESET_BASE + "--mlp-internal-dim-multiplier 32 --dropout 0.5 --dropout-v 0.1 "
    "--byte-noise 0.05 --weight-decay 1 --beta2 0.95 --ema-decay 0.998 --min-lr-ratio 0.02 "
    "--block-size 1024 --batch-size 4 --max-iters 12000 --epochs none --learning-rate 1e-3 "
    "--eval-freq 1000",
}

# The imports come after the settings on purpose: what a user edits is at the top of the file.

import sys
from contextlib import nullcontext
from typing import TextIO

from bdh_lib import plots, runs
from bdh_lib.compute import memory
from bdh_lib.data.formats import format_example  # noqa: F401  as train_mlx.format_example, too
from bdh_lib.errors import Diverged, UserError, warn
from bdh_lib.generation.samples import write_samples
from bdh_lib.script import cli, compiler, flags
from bdh_lib.settings import Settings
from bdh_lib.training import checkpoints, macos, phases, plan, selfcheck, summary, tuning
from bdh_lib.training.batches import divergence_message, step_batches
from bdh_lib.training.dataset import check_processes_agree, open_run_data
from bdh_lib.training.distributed import ProcessLost, World, is_lost, refuse_launcher
from bdh_lib.training.evaluator import Evaluator
from bdh_lib.training.memory_plan import slow_note, what_fits
from bdh_lib.training.meter import Meter
from bdh_lib.training.report import redraw_report
from bdh_lib.training.resume import check_chain, resume_or_init, run_info
from bdh_lib.training.runlog import RunLog, main_process_prints
from bdh_lib.training.schedule import blocks_per_step, learning_rate, must_read_loss, total_steps
from bdh_lib.training.signals import StopSignal
from bdh_lib.training.step import compile_steps, start_computing, sum_gradients
from bdh_lib.training.train_settings import RULES, parse_settings, phase_settings, preset_settings
from bdh_lib.training.train_state import TrainState, ema_applied

# ---------------------------------------------------------------------------------------- training


def read_settings(argv: list[str] | None = None) -> Settings:
    """Return the constants at the top, changed by a preset, changed by flags. Raises UserError."""
    return parse_settings(sys.modules[__name__], argv)


def main(argv: list[str] | None = None) -> int:
    """Train one run or a chain of PHASES. Returns the exit code. Raises UserError."""
    base = read_settings(argv)
    memory.keep_float32_exact(base.DTYPE)
    compiler.check()
    for slip in flags.find_typos(sys.modules[__name__], RULES):
        warn(slip)
    if own := flags.own_settings(sys.modules[__name__], RULES):
        note = "kept in config.json; code of your own reads them from `s`"
        print(f"own settings: {', '.join(own)} ({note})", file=sys.stderr)
    if base.selfcheck or base.plan or base.tune:
        refuse_launcher()
    if base.selfcheck:
        return selfcheck.run_checks(base.DTYPE)
    if base.plan:
        return plan.print_plan(base, preset_settings(sys.modules[__name__]))
    if base.tune:
        return tuning.tune(base)
    cli.ignore_closed_output()
    plots.find_fonts()  # before MLX computes anything
    world = World()
    base.PROCESSES = world.size
    json_to = sys.stdout if base.json else None
    with (
        # only a run that was started from the command line is started again
        macos.restarted_after_gpu_fault(base, argv is None and world.size == 1),
        macos.kept_awake(base.KEEP_AWAKE),
        main_process_prints(json_to, world),  # with --json to stderr
        StopSignal(world) as stop,
    ):
        return train_chain(base, stop, world, json_to)


def train_chain(base: Settings, stop: StopSignal, world: World, json_to: TextIO | None) -> int:
    """Train the runs of PHASES in turn, or the one run.

    After each of PHASES a table shows the loss in every mode, and what was forgotten. Returns the
    exit code. Raises UserError.
    """
    results = {}
    chain = phase_settings(base)
    check_chain(chain)
    for s in chain:
        run = checkpoints.run_folder(s)
        with checkpoints.lock_run(run) if world.is_main else nullcontext():
            if code := train_or_explain(s, stop, world, json_to):
                return code
            if s.PHASES and world.is_main:
                results[run.name] = phases.evaluate_modes(s, run, stop)
                if stop.requested:
                    print(f"stopped after {run} was saved; the same command continues it")
                    return 128 + stop.requested
                print(phases.forgetting_table(results))
    return 0


def train_or_explain(s: Settings, stop: StopSignal, world: World, json_to: TextIO | None) -> int:
    """Run train(), and say of a failure what the user can do. Returns the exit code.

    Raises UserError, also if the loss diverges, memory is out, or another process is lost, and a
    RuntimeError that is none of those.
    """
    stop.has_work_to_save = False
    try:
        return train(s, stop, world, json_to)
    except RuntimeError as error:
        if stop.received and not stop.has_work_to_save:  # Ctrl-C ends MLX's compiler, too
            return 128 + stop.received
        if is_lost(error):
            raise ProcessLost(
                f"process {world.rank} lost another one: {error}. Checkpoints are unchanged; the "
                "same command continues"
            ) from None
        if not memory.is_exhausted(error):
            raise
        raise UserError(f"memory is out. {what_fits(s)}") from None
    except Diverged as reason:
        steps = runs.steps(checkpoints.run_folder(s))
        last = f"the last checkpoint is of iteration {max(steps)}" if steps else "no checkpoint yet"
        raise Diverged(f"{reason}; {last}; lower LEARNING_RATE or GRAD_CLIP") from None


def train(s: Settings, stop: StopSignal, world: World, json_to: TextIO | None = None) -> int:
    """Train one run. Returns 0 at its end, 128 + signal if stopped. Raises UserError."""
    run = checkpoints.run_folder(s)

    # ---- data: bytes to train on and to evaluate on, and the field of each
    data = open_run_data(s)
    check_processes_agree(s, data.report, world)
    summary.print_data(s, data)
    n_steps = total_steps(s, len(data.train.bytes))

    # ---- model, optimizer, average: from the last checkpoint, from INIT_FROM's weights, or fresh
    start = resume_or_init(s, run, data.report, world)
    first_step, state = start.step, start.state

    # ---- log: metrics.jsonl, best.json and the terminal; config.json of the run
    log = RunLog(run, first_step, world, json_to)
    if reason := summary.finished_reason(s, log, n_steps):
        print(f"finished: {reason}")
        return 0
    summary.print_start(s, run, data, n_steps, start.selection)
    log.begin(run_info(s, data.report, start), state, checkpoints.max_checkpoints(s, n_steps))

    # ---- compiled functions
    micro_step, apply_update = compile_steps(state, s)
    evaluator = Evaluator(s, n_steps, state.model, data, world, stop)
    memory.set_mlx_memory_limit(start.selection.peak, start.selection.compute)
    meter = Meter(first_step, n_steps, s.BLOCK_SIZE * blocks_per_step(s), log.skipped)

    # The loop ends after the last step, by PATIENCE, or at a signal, which is looked for before a
    # step, after an evaluation and before an update. Each of these ends leaves a checkpoint.
    is_complete = False
    for step in range(first_step, n_steps + 1):  # one more: the end is evaluated too
        is_last = step == n_steps
        out_of_patience = False
        stop.sync()

        # by SAVE_FREQ or SAVE_MINUTES: save first, so that a crash in the evaluation loses nothing
        if is_last or log.is_save_due(step, s.SAVE_FREQ, s.SAVE_MINUTES):
            log.save(step, state)
        if stop.requested:
            break

        # every EVAL_FREQ steps: evaluate, keep the best, advise, write samples, draw the report; a
        # resumed run may have evaluated this step before
        if (is_last or step % s.EVAL_FREQ == 0) and log.last_eval_step < step:
            if not evaluate_and_log(s, step, state, evaluator, log):  # a signal came meanwhile
                break
            out_of_patience = log.patience_exceeded(s.PATIENCE)
        if out_of_patience:
            log.save(step, state)
        if world.is_main and log.last_saved == step:
            checkpoints.prune(run, s.KEEP_CHECKPOINTS, log.best.get("step"))
        if is_last or out_of_patience:
            is_complete = True
            break

        # one step: micro-batches on each process, then an update by AdamW
        meter.start_step()
        state.optimizer.learning_rate = lr = learning_rate(step, n_steps, s)
        with meter.heartbeat_until_logged():
            n_targets, batches = step_batches(data.train, step, s, world)
            loss, gradients = sum_gradients(s, micro_step, batches, stop, world)
            if stop.requested:  # this step is not in what is saved
                break
            norm = apply_update(loss, gradients)
            start_computing(state, norm, finish=step == first_step)  # the first one compiles
        stop.has_work_to_save = True
        completed = step + 1
        read_now = must_read_loss(completed, n_steps, s)
        meter.end_step(completed, loss, norm, has_targets=n_targets > 0, read_now=read_now)
        if meter.consecutive_skips >= s.MAX_CONSECUTIVE_SKIPS:
            raise Diverged(divergence_message(data.train, meter.last_read_step, s))
        if completed % s.LOG_FREQ == 0 and (averages := meter.pop_averages(completed)):
            # the rate and the norm are those of the last step, the averages of all since a line
            log.write(step=completed, lr=lr, grad_norm=norm.item(), **averages)

    log.save(step, state)  # where a signal ended the loop; any other end is saved before
    meter.close()
    if not is_complete:
        print(f"stopped after iteration {step:,}, saved in {run}; the same command continues it")
        return 128 + stop.requested
    summary.print_summary(s, log, data, meter)
    return 0


def evaluate_and_log(
    s: Settings, step: int, state: TrainState, evaluator: Evaluator, log: RunLog
) -> bool:
    """Evaluate on the validation bytes, save the best weights, write samples, draw the report.

    Every evaluation of a run reads the same bytes. Returns False where a signal came during the
    evaluation: then nothing is logged. Raises Diverged and, where a file cannot be written,
    UserError.
    """
    if step == log.first_step:
        note = slow_note(s)
        print(f"evaluating {len(evaluator.val.bytes):,} bytes before iteration {step + 1:,}{note}")
    with ema_applied(state):
        results = evaluator.evaluate(step, log.history)
    if not results:
        return False
    if step and log.is_best(results["monitored_loss"]):
        log.save(step, state)
        log.write_best(step, results["monitored_loss"])
    log.write(**results)
    if log.world.is_main and s.SAMPLE_BYTES and (step or s.INIT_FROM):  # random weights: noise
        with ema_applied(state):
            samples = write_samples(s, step, state.model, evaluator.val, evaluator.stop)
        if not evaluator.stop.requested:  # else they are cut
            log.write(step=step, **samples)
    if log.world.is_main:
        redraw_report(log)
    return True
