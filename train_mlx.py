"""Train a BDH on an instruction data set, byte by byte, with MLX.

    python train_mlx.py                                 # the settings below
    python train_mlx.py --preset tiny --dataset sample  # minutes on two CPU cores, no network
    python train_mlx.py --plan                          # what the run would be, and its data

The same command once more continues where the run stopped. A run is a folder,
checkpoints_mlx/<run>: step-000500 and others (weights, optimizer, settings), best.json,
metrics.jsonl, and report.html to look at.
"""

if __name__ == "__main__":  # it imports this file anew, ready for Ctrl-C and for a slip in it
    import cli

    cli.run(__file__)

import bdh_mlx
from bdh_mlx import BDHConfig

# Settings, in plain Python: change a line, paste one over it, add one of your own. Each is also a
# flag (BLOCK_SIZE: --block-size, n_layer: --n-layer); flags beat presets, presets beat these lines.
# Where None is allowed, the flag takes `none`.
# Data
TRAINING_MODE: str = "both"  # of each record: "system", "instruction", "both" or "full"
LOSS_ON: str = "all"  # bytes that count in the training loss: "all", or "response" (mode full only)
DATASET: str = "Severian/Internal-Knowledge-Map"  # hub name, file, folder, or "sample"
# Training
BLOCK_SIZE: int = 4096  # bytes a training sequence holds: what the model can learn to look back on
BATCH_SIZE: int = 2  # sequences computed at once, by each process
GRAD_ACCUM: int = 1  # batches added up to one update; more of them cost time, not memory
MAX_ITERS: int | None = 5000  # updates; the run ends here or after EPOCHS, whichever comes first
EPOCHS: float | None = 3  # passes over the training bytes; none: as many as MAX_ITERS takes
PATIENCE: int | None = 5  # validations in a row without a new best that end the run; none: no end
LEARNING_RATE: float = 5e-5  # at the end of the warm-up
MIN_LEARNING_RATE: float = 0.1  # at the end of the cosine, as a share of LEARNING_RATE
WARMUP_ITERS: int = 100  # updates of linear rise, while Adam's averages fill
LR_DECAY_ITERS: int | None = None  # update at which the cosine ends; none: the end of the run
WEIGHT_DECAY: float = 0.1  # AdamW's, as in the paper
GRAD_CLIP: float | None = 1.0  # largest global norm of a gradient; none: as it comes
EMA: float = 0.0  # share that an update keeps of the weights' average, the one judged; 0: none
NOISE: float = 0.0  # share of the input bytes replaced by others of the batch, in training
MAX_SKIPS: int = 10  # updates in a row skipped for numbers that are not finite before the run stops
# Model, and how it is computed
BDH_CONFIG = bdh_mlx.BDHConfig()  # n_layer=6, n_embd=256, n_head=4, dropout=0.1: 25.3M parameters
DTYPE: str = "auto"  # of the products: "bfloat16", "float32"; auto: bfloat16 on a GPU alone
MEMORY: str = "auto"  # "fast", "balanced" or "small" (each slower than the last); auto: what fits
FORCE: bool = False  # start although the estimated memory cannot be had
# Evaluation, log and checkpoints
SEED: int = 1337  # of weights, split, data order, dropout and samples
VAL_SHARE: float = 0.1  # of the records, held out
EVAL_BYTES: int | None = 1_000_000  # validation bytes read at most, always the same; none: all
LOG_FREQ: int = 50  # updates between lines
EVAL_FREQ: int = 250  # updates between validations and samples
SAVE_FREQ: int = 500  # updates between checkpoints
KEEP: int = 3  # latest checkpoints kept, besides the best
SAMPLE_BYTES: int = 200  # length of each sample
# Runs
CHECKPOINT_DIR: str = "checkpoints_mlx"  # holds one folder per run, and the prepared data
RUN_NAME: str | None = None  # folder of this run; none: the training mode
INIT_FROM: str | None = None  # run or checkpoint whose weights start this run (phase 2)
PHASES: str | None = None  # a chain, mode:EPOCHS@LEARNING_RATE each: "system:3,full:2@3e-5"

ACTIONS = {
    "plan": "tell what the run would be and what is odd in its data, without training",
    "json": "log lines are JSON objects, alone on stdout; all else goes to stderr",
    "refresh_data": "prepare the data anew, although they are prepared",
    "selfcheck": "check in seconds that model and trainer work on this machine: exit code 0 or 1",
}

# Each preset is flags: the guide's configurations to the digit (phase 2 also starts from phase 1's
# weights), and `tiny` for a first look.
GUIDE = "--block-size 4096 --batch-size 2 --training-mode "
PRESETS = {
    "both-64gb": GUIDE + "both --max-iters 5000 --learning-rate 5e-5 --epochs 3",
    "full-64gb": GUIDE + "full --max-iters 8000 --learning-rate 3e-5 --epochs 3",
    "phase1-64gb": GUIDE + "system --max-iters 3000 --learning-rate 1e-4",
    "phase2-64gb": GUIDE + "instruction --max-iters 3000 --learning-rate 5e-5 --init-from system",
    "both-16gb": "--training-mode both --block-size 2048 --batch-size 1 --max-iters 5000 "
    "--learning-rate 5e-5",
    "tiny": "--n-layer 3 --n-embd 64 --mlp-internal-dim-multiplier 32 --dropout 0.05 "
    "--training-mode full --block-size 256 --batch-size 8 --max-iters 350 --epochs none "
    "--learning-rate 4e-3 --warmup-iters 20 --log-freq 25 --eval-freq 175 --save-freq 175",
    # The recipe that LOG.md measures on a megabyte of text, 6.4M parameters: against overfitting.
    "small-data": "--mlp-internal-dim-multiplier 32 --dropout 0.5 --dropout-v 0.1 --noise 0.05 "
    "--weight-decay 1 --ema 0.99 --block-size 512 --batch-size 32 --max-iters 2000 --epochs none "
    "--learning-rate 1e-3 --eval-freq 100",
}

# The imports stand below what users come to this file to edit.

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

import checkpoints
import cli
import data
import files
import flags
import memory
import phases
import plan
import selfcheck
from advice import advise, counting
from bdh_mlx import BDH, load_model
from endure import Stop, at_once
from errors import UserError, visible
from evaluation import byte_losses, evaluate, trace
from flags import Rule, Settings, choice, number, switch, text, whole
from formats import BUDGET, EXPECT, FIELDS, NEEDED, prompts
from formats import format_example as format_example  # what a record becomes, for other scripts
from metrics import activity, evaluations, open_log, printing
from processes import Processes, is_lost
from report import redraw
from state import PARTS
from writing import samples

# -------------------------------------------------------------------------------------------- data


@lru_cache(maxsize=2)
def epoch_starts(n_bytes: int, T: int, seed: int, epoch: int) -> np.ndarray:
    """First byte of each block of an epoch, in its order. The blocks tile the stream, taken as a
    ring, from an offset of the epoch's own: each byte is a target once, fewer than T of them twice.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = rng.integers(n_bytes) + T * np.arange(math.ceil(n_bytes / T))
    return rng.permutation(starts) % n_bytes


def block_starts(n_bytes: int, first: int, count: int, T: int, seed: int) -> np.ndarray:
    """First byte of the blocks number first .. first+count-1 of a run, over as many epochs."""
    where = [divmod(block, math.ceil(n_bytes / T)) for block in range(first, first + count)]
    return np.array([epoch_starts(n_bytes, T, seed, epoch)[i] for epoch, i in where])


def get_batch(
    stream: np.ndarray, first: int, B: int, T: int, seed: int
) -> tuple[mx.array, mx.array]:
    """Blocks number first .. first+B-1 as idx and targets (B, T): a function of its arguments
    alone, so that a resumed run reads on where it stopped.
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
    low = s.MIN_LEARNING_RATE
    return s.LEARNING_RATE * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def counted(fields: np.ndarray, micro: int, s: Settings) -> np.ndarray:
    """Which targets (B, T) of a run's batch number `micro` count in its loss."""
    if s.LOSS_ON == "all":
        return np.ones((s.BATCH_SIZE, s.BLOCK_SIZE), bool)
    read = (micro * s.BATCH_SIZE, s.BATCH_SIZE, s.BLOCK_SIZE, s.SEED)
    return np.array(get_batch(fields, *read)[1]) == FIELDS.index(s.LOSS_ON)


def count_targets(fields: np.ndarray, step: int, s: Settings) -> int:
    """How many targets count in the loss of update number `step`, over all its batches."""
    batches = sequences(s) // s.BATCH_SIZE
    if s.LOSS_ON == "all":
        return sequences(s) * s.BLOCK_SIZE
    return sum(int(counted(fields, step * batches + i, s).sum()) for i in range(batches))


def loss_weights(fields: np.ndarray, micro: int, count: int, s: Settings) -> np.ndarray:
    """Weight in the loss of each target (B, T) of a batch: the loss of an update is the mean over
    the `count` targets that count in all its batches. All 0 where no byte counts.
    """
    return counted(fields, micro, s).astype(np.float32) / np.float32(max(1, count))


# ---------------------------------------------------------------------------------------- training


def prepared(s: Settings, mode: str) -> tuple[dict, tuple, tuple]:
    """What open_data gives, of any mode and unchecked. Raises UserError if the mode has no data."""
    cache, refresh = Path(s.CHECKPOINT_DIR) / ".data", vars(s).get("refresh_data", False)
    folder = data.prepare(s.DATASET, mode, s.VAL_SHARE, s.SEED, cache, refresh)
    report = json.loads((folder / "data.json").read_text())
    if empty := [side for side in ("train", "val") if not report[side]["bytes"]]:
        raise UserError(f"the {empty[0]} split of mode {mode} is empty; take more data")
    train, val = (
        [np.memmap(folder / f"{side}.{kind}", np.uint8, "r") for kind in ("bin", "fields")]
        for side in ("train", "val")
    )
    read = data.bytes_to_evaluate(folder, s.EVAL_BYTES)
    return report, train, [array[:read] for array in val]


def open_data(s: Settings) -> tuple[dict, tuple, tuple]:
    """The data's report, then bytes and fields to train on, and those that evaluations read."""
    report, train, val = prepared(s, s.TRAINING_MODE)
    for side, least, cure in (
        ("train", s.BLOCK_SIZE + 1, "lower BLOCK_SIZE"),
        ("val", 2, "raise VAL_SHARE"),
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
        if s.LOSS_ON != "all" and not data.has_field(fields, s.LOSS_ON):
            raise UserError(
                f"LOSS_ON is {s.LOSS_ON!r}, and the {len(fields):,} {side} have none of it; "
                f"{cure} or set LOSS_ON to 'all'"
            )
    return report, train, val


def sequences(s: Settings) -> int:
    """Blocks that an update reads, over all processes (one unless settings say how many)."""
    return s.BATCH_SIZE * s.GRAD_ACCUM * vars(s).get("PROCESSES", 1)


def last_iteration(s: Settings, n_bytes: int) -> int:
    """Update at which the run ends: MAX_ITERS or the end of EPOCHS, one of which is set."""
    blocks = math.ceil(n_bytes / s.BLOCK_SIZE)
    by_epochs = math.ceil(s.EPOCHS * blocks / sequences(s)) if s.EPOCHS else math.inf
    return min(s.MAX_ITERS or math.inf, by_epochs)


def outlook(s: Settings, n_bytes: int) -> str:
    """How long the run is, and which of MAX_ITERS and EPOCHS cuts the other short."""
    total, each = last_iteration(s, n_bytes), s.BLOCK_SIZE * sequences(s)
    epochs, cut = total * each / n_bytes, ""
    if epochs < (s.EPOCHS or 0):
        cut = f"; MAX_ITERS ends it before EPOCHS ({s.EPOCHS:g})"
    elif total < (s.MAX_ITERS or 0):
        cut = f"; EPOCHS ({s.EPOCHS:g}) ends it before MAX_ITERS ({s.MAX_ITERS:,})"
    read = f"{total * each:,} bytes or {epochs:.2f} epochs"
    return f"{total:,} iterations of {each:,} bytes are {read}{cut}"


def described(s: Settings) -> dict:
    """The settings as JSON holds them, the model's beside the others; what it cannot, as text."""
    own = {k: v for k, v in vars(s).items() if k.isupper() and k != "BDH_CONFIG"}
    return {name: flags.described(value) for name, value in (own | asdict(s.BDH_CONFIG)).items()}


def fresh(s: Settings) -> tuple[BDH, optim.AdamW]:
    """A model and its optimizer, whose state also holds EMA's average: it is saved with it."""
    mx.random.seed(s.SEED)
    model = BDH(s.BDH_CONFIG)
    optimizer = optim.AdamW(s.LEARNING_RATE, weight_decay=s.WEIGHT_DECAY, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    if s.EMA:  # of weights and their average the one that the model does not hold: see averaged
        optimizer.state["other"] = tree_map(lambda a: a, model.parameters())
    return model, optimizer


def start(run: Path, s: Settings, report: dict, model, optimizer) -> tuple[int, list]:
    """Load the run's last checkpoint, else INIT_FROM's weights, if any; gives the step reached, and
    the weights that the run came from.
    """
    origin = Path(s.CHECKPOINT_DIR, s.INIT_FROM or "")
    if s.INIT_FROM and not origin.exists():
        origin = Path(s.INIT_FROM)
    if not (done := checkpoints.newest_valid(run)):
        if s.INIT_FROM and not origin.exists():
            raise UserError(
                f"INIT_FROM: there is no {Path(s.CHECKPOINT_DIR, s.INIT_FROM)} and no "
                f"{s.INIT_FROM}; train that run first, or name another"
            )
        if s.INIT_FROM:
            source = load_model(origin)
            unlike = checkpoints.differing(asdict(source.config), asdict(s.BDH_CONFIG))
            if unlike := [text for name, text in unlike.items() if "dropout" not in name]:
                raise UserError(f"INIT_FROM {s.INIT_FROM} is of another shape: {'; '.join(unlike)}")
            model.update(source.parameters())
            if s.EMA:  # the average starts where the weights do
                optimizer.state["other"] = tree_map(lambda a: a, model.parameters())
            print(f"start: weights of {s.INIT_FROM}, a new optimizer")
        return 0, phases.ancestry(origin) if s.INIT_FROM else []
    before = checkpoints.read_info(run, done)
    new = described(s) | checkpoints.versions() | {UPDATE: sequences(s)}
    try:
        old = before["settings"] | before["versions"]
        old[UPDATE] = sequences(Settings(**before["settings"]))
        changed = checkpoints.differing(old, new) | data.differing(before["data"], report)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run} holds checkpoints of another format; set RUN_NAME") from None
    if fixed := [k for k in changed if k in FIXED]:
        of_data = [k for k in fixed if k.endswith(" data")]
        if "TRAINING_MODE" in fixed or "SEED" in fixed:  # which make the bytes others
            fixed = [k for k in fixed if k not in of_data]
        told = [*map(changed.get, fixed[:5]), *(["and others"] if len(fixed) > 5 else [])]
        of_run = f", with INIT_FROM {run.name} from these weights" if fixed == of_data else ""
        raise UserError(
            f"{run} holds a run with other settings ({'; '.join(told)}). Set them back to go on "
            f"with it, or set RUN_NAME to start another{of_run}"
        )
    ancestry = before.get("ancestry", [])
    if s.INIT_FROM and not ancestry:
        raise UserError(
            f"{run} did not start from {s.INIT_FROM}; set RUN_NAME to start another run"
        )
    now = ancestry
    if s.INIT_FROM and origin.exists():
        with suppress(UserError):  # its checkpoints are gone: the run has all that it needs
            now = phases.ancestry(origin)
    if ancestry and now[-1]["sha256"] != ancestry[-1]["sha256"]:
        raise UserError(
            f"{run} started from {ancestry[-1]['weights']}, and the best weights of INIT_FROM "
            f"{s.INIT_FROM} are others now; set RUN_NAME to start another run from them"
        )
    with averaged(model, optimizer):  # as it was saved
        checkpoints.load(run, done, model, optimizer)
    print("; ".join([f"start: continues {run} after iteration {done}", *changed.values()]))
    tell_new_rate(before, s, done, report)
    return done, ancestry


def tell_new_rate(before: dict, s: Settings, done: int, report: dict) -> None:
    """Say when a resumed run goes on with another learning rate than it would have had."""
    old = Settings(**before["settings"])
    ends = [last_iteration(of, data["train"]["bytes"])
            for of, data in ((old, before["data"]), (s, report))]  # fmt: skip
    planned, new = learning_rate(done, ends[0], old), learning_rate(done, ends[1], s)
    if abs(new - planned) > 0.01 * planned:
        last = learning_rate(done - 1, ends[0], old)
        print(f"learning rate: {last:.2e} at iteration {done}, {new:.2e} from here on")


def noisy(idx: mx.array, share: float, key: mx.array) -> mx.array:
    """idx with `share` of its bytes replaced by bytes from anywhere in it."""
    where, which = mx.random.split(mx.random.split(key, 2)[1])
    others = idx.reshape(-1)[mx.random.randint(0, idx.size, idx.shape, key=which)]
    return mx.where(mx.random.uniform(shape=idx.shape, key=where) < share, others, idx)


@contextmanager
def averaged(model, optimizer) -> Iterator[None]:
    """Put the average that EMA keeps in the place of the weights: it is evaluated and saved."""

    def swap():
        if "other" in optimizer.state:
            weights = tree_map(lambda a: a, model.parameters())
            model.update(optimizer.state["other"])
            optimizer.state["other"] = weights

    swap()
    try:
        yield
    finally:
        swap()


def compiled_step(
    model, optimizer, clip: float | None, noise: float = 0, ema: float = 0
) -> tuple[Callable, Callable, list]:
    """The halves of an iteration, and the state they change, to be evaluated after each update.

    gradient(idx, targets, weights, key) -> loss, gradients, both weighted sums over the bytes;
    update(loss, gradients), each summed over the batches -> norm.
    """
    state = [model.state, optimizer.state]
    compiled = partial(mx.compile, inputs=state, outputs=state)

    @compiled
    def gradient(idx, targets, weights, key):
        idx = noisy(idx, noise, key) if noise else idx

        def loss():
            logits, _ = model(idx, key=key)
            return mx.sum(nn.losses.cross_entropy(logits, targets) * weights)

        return nn.value_and_grad(model, loss)()

    @compiled
    def update(loss, gradients):
        """One step of AdamW; nothing changes where the loss or the gradient is not finite."""
        gradients, norm = optim.clip_grad_norm(gradients, clip or math.inf)
        before = tree_map(lambda a: a, state)
        optimizer.update(model, gradients)
        if ema:  # a mean of all weights at first, since the start of the average is random
            new = 1 - mx.minimum(ema, optimizer.step / (optimizer.step + 9))
            move = lambda mean, weights: mean + new * (weights - mean)  # noqa: E731
            optimizer.state["other"] = tree_map(move, optimizer.state["other"], model.parameters())
        good = mx.isfinite(loss) & mx.isfinite(norm)
        kept = tree_map(lambda new, old: mx.where(good, new, old), state, before)
        model.update(kept[0])
        optimizer.state.update(kept[1])
        return norm

    return gradient, update, state


class Diverged(Exception):
    """The numbers have gone bad for good; the trainer exits with code 1."""


def main(argv: list[str] | None = None) -> int:
    """Train as the settings say, one run or a chain of PHASES; the exit code. Raises UserError."""
    given, told = settings(argv), {}
    cli.check_temporary_folder()
    for slip in flags.slips(sys.modules[__name__], RULES):
        print(f"warning: {slip}", file=sys.stderr)
    if given.selfcheck:
        return selfcheck.tell(sys.modules[__name__])
    if given.plan:
        return plan.tell(sys.modules[__name__], given)
    cli.endure()
    together = Processes()
    given.json_to = sys.stdout if given.json else None  # where print goes no more from here on
    with printing(given.json_to, together), Stop(together) as stop:
        for s in phases.chain(given):
            s.PROCESSES = together.size
            run = checkpoints.run_folder(s)
            with checkpoints.opened(run) if together.first else nullcontext():
                if code := attempt(s, run, stop, together):
                    return code
                if s.PHASES and together.first:
                    told[run.name] = phases.held_out(s, run, stop, partial(loss_in, s, stop))
                    if stop.number:
                        return 128 + stop.number
                    print(phases.table(told))
    return 0


def attempt(s: Settings, run: Path, stop: Stop, together: Processes) -> int:
    """Train, and put into a line what can end it."""
    try:
        return train(s, run, stop, together)
    except RuntimeError as error:
        if stop.heard:  # Ctrl-C also reaches the compiler that MLX runs, and MLX gives up
            return 128 + stop.heard
        if is_lost(error):
            print(f"error: process {together.rank} lost another one: {error}. Checkpoints are as "
                  "they were; the same command goes on", file=sys.stderr)  # fmt: skip
            return 1
        if not memory.is_exhausted(error):
            raise
        raise UserError(f"memory is out: {memory.too_large(s, memory.available())}") from None
    except Diverged as reason:
        last = max(checkpoints.steps(run), default="none")
        print(f"error: {reason}. Checkpoints are as they were, the last of iteration {last}; "
              "lower LEARNING_RATE or GRAD_CLIP", file=sys.stderr)  # fmt: skip
        return 1


def loss_in(s: Settings, stop: Stop, model: BDH, mode: str) -> tuple[float, dict]:
    """What `evaluate` gives on the validation bytes of any mode. Raises UserError without data."""
    losses = mx.compile(partial(byte_losses, model))
    return evaluate(losses, *prepared(s, mode)[2], s.BATCH_SIZE, s.BLOCK_SIZE, stop)


def train(s: Settings, run: Path, stop: Stop, together: Processes) -> int:
    """From the data to the summary: 0 when finished, 128 + signal when stopped, 1 when diverged."""
    stop.can_wait = False  # also after an earlier phase
    report, (train_bytes, train_fields), val = open_data(s)
    known = {k: v for k, v in described(s).items() if k in RULES or k in vars(s.BDH_CONFIG)}
    seen = together.gather(known | {k: report[k]["sha256"] for k in ("train", "val")})
    if unlike := [k for k in seen[0] if any(one[k] != seen[0][k] for one in seen)]:
        raise UserError(f"the processes differ in {', '.join(unlike)}; give all the same")
    print(visible(data.describe(report)))
    total = last_iteration(s, len(train_bytes))
    per_iter = s.BLOCK_SIZE * sequences(s)
    print(f"plan: {outlook(s, len(train_bytes))}; an evaluation reads {len(val[0]):,} bytes")

    name, compute, peak = memory.choose(s)  # before the model takes any
    model, optimizer = fresh(s)
    found = start(run, s, report, model, optimizer) if together.first else None
    step, ancestry = together.share(found)
    model.update(together.from_first(model.parameters()))  # before compiling
    optimizer.state = together.from_first(optimizer.state)
    first = saved = step
    log, history = open_log(run, step, together, s.json_to)
    best = together.share(checkpoints.read_best(run) if together.first else None)
    evaluated = max(evaluations(history), default=-1)
    if step and not best:
        evaluated = -1  # judged at once, if a validation is due

    def out_of_patience():  # a function of metrics.jsonl and best.json: a resumed run counts on
        since = [e for e in evaluations(history) if e > best.get("step", math.inf)]
        return s.PATIENCE is not None and len(since) >= s.PATIENCE

    if evaluated == step and (step >= total or out_of_patience()):
        print(f"finished: {why_finished(s, run, step, total, best)}")
        return 0
    model.compute = compute
    memory.hold(peak)
    print(f"model: {s.BDH_CONFIG.n_parameters:,} parameters, on {mx.default_device()}; run: {run}")
    dtype = str(model.compute.dtype).removeprefix("mlx.core.")
    print(f"memory: {name}, {dtype}, estimated peak {peak / 1e9:.2f} GB")
    has = {FIELDS[i] for i in np.unique(val[1])}
    print(f"note: {EXPECT[s.TRAINING_MODE if has & {*NEEDED[s.TRAINING_MODE]} else 'text']}")
    asked = prompts(s.TRAINING_MODE, has)
    gradient, update, state = compiled_step(model, optimizer, s.GRAD_CLIP, s.NOISE, s.EMA)
    losses_of = mx.compile(partial(byte_losses, model), inputs=[model.state])
    info = {"settings": described(s), "data": report, "versions": checkpoints.versions()}
    info |= {"ancestry": ancestry, "parameters": s.BDH_CONFIG.n_parameters}
    info["own"] = [name for name in info["settings"] if name.isupper() and name not in RULES]
    if together.first:
        there = len(checkpoints.steps(run))
        checkpoints.check_space(run, model, optimizer, max(1, s.KEEP + 2 - there))
        files.write_whole(run / "config.json", json.dumps(info, indent=1))
    bar = tqdm(total=total, initial=step, disable=None, unit="it")
    losses, seconds, timed, began = [], 0.0, 0, time.perf_counter()
    skipped = in_a_row = 0
    known = counting(s.LOSS_ON, (train_bytes, train_fields), val)

    def where(step):
        count, shown = sequences(s), min(sequences(s), 64)
        starts = block_starts(len(train_bytes), step * count, shown, s.BLOCK_SIZE, s.SEED).tolist()
        more = f" and {count - shown:,} others" if count > shown else ""
        return f"{s.BLOCK_SIZE} bytes each from {starts}{more} of the training bytes"

    def save():
        nonlocal saved
        if saved < step:
            if together.first:
                with averaged(model, optimizer):
                    checkpoints.save(run, step, model, optimizer, info)
            together.wait()  # none goes on, or leaves, before it is on the disk
            saved = step

    with at_once():
        trace(losses_of, len(val[0]), s.BATCH_SIZE, s.BLOCK_SIZE)
    if step % s.EVAL_FREQ == 0 and evaluated < step:
        print(f"evaluating {len(val[0]):,} bytes before iteration {step + 1}")
    while True:
        stop.agree()
        finished = step >= total
        if finished or stop.number or step % s.SAVE_FREQ == 0:
            save()  # before the evaluation: one that dies must not cost the work
        if stop.number:
            bar.close()
            print(f"stopped after iteration {step}, saved in {run}; the same command continues it")
            return 128 + stop.number
        if (finished or step % s.EVAL_FREQ == 0) and evaluated < step:
            with averaged(model, optimizer):
                val_loss, nats = evaluate(
                    losses_of, *val, s.BATCH_SIZE, s.BLOCK_SIZE, stop, together
                )
            if stop.number:
                continue
            if not math.isfinite(val_loss):
                raise Diverged(f"validation loss is {val_loss} at iteration {step}")
            evaluated = step
            judged = nats.get(s.LOSS_ON, val_loss)  # of the bytes that train
            if step and judged < best.get("judged", math.inf):
                save()
                best = {"step": step, "judged": judged}
                if together.first:
                    checkpoints.write_best(run, step, judged)
            last = {"step": step, "val_loss": val_loss, "val_bpb": val_loss / math.log(2)}
            last["judged"] = judged  # in nats; by it go best.json, PATIENCE, advice and reports
            last["val_loss_fields"] = nats
            last["val_bpb_fields"] = {field: loss / math.log(2) for field, loss in nats.items()}
            with averaged(model, optimizer):
                last |= activity(model, val[0], s.BLOCK_SIZE)
            last["advice"] = advise([*history, last], s, total, known)
            log(**last)  # logged: all done
            if together.first and (step or ancestry):  # random weights write noise
                with averaged(model, optimizer):
                    said = samples(model, asked, s.SAMPLE_BYTES, s.SEED + step, stop)
                    log(step=step, samples=list(said))
            if out_of_patience():
                save()
                finished = True
            if together.first:
                redraw(run)
        if together.first:
            checkpoints.prune(run, s.KEEP, best.get("step"))
        if finished:
            break

        tick = time.perf_counter()
        optimizer.learning_rate = rate = learning_rate(step, total, s)
        loss, gradients = 0.0, None
        batches, count = sequences(s) // s.BATCH_SIZE, count_targets(train_fields, step, s)
        if step == first:
            print("compiling the training step, once")
        for i in range(together.rank, batches, together.size):
            micro = step * batches + i
            where_read = (micro * s.BATCH_SIZE, s.BATCH_SIZE, s.BLOCK_SIZE, s.SEED)
            batch = get_batch(train_bytes, *where_read)
            key = mx.random.key(s.SEED * 2**32 + micro)
            weights = mx.array(loss_weights(train_fields, micro, count, s))
            with nullcontext() if stop.can_wait else at_once():
                part, more = gradient(*batch, weights, key)
            loss += part
            gradients = tree_map(mx.add, gradients, more) if gradients else more
            mx.eval(loss, gradients)
            if stop.number:
                break
        if stop.number:  # saved as it was after the last update
            continue
        loss, gradients = together.total((loss, gradients))
        norm = update(loss, gradients)
        mx.eval(state, norm)
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            if count:  # without a counted byte the loss says nothing
                losses.append(loss.item())
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            tqdm.write(
                f"iter {step + 1:>6} | update skipped: loss {loss.item()}, norm {norm.item()}"
            )
            if in_a_row == s.MAX_SKIPS:
                raise Diverged(
                    f"no sound update in {in_a_row} iterations; last batch: {where(step)}"
                )
        step += 1
        stop.can_wait = True  # from here on there is work to save
        bar.update()
        if step > first + 1:  # the first iteration compiles
            seconds, timed = seconds + time.perf_counter() - tick, timed + per_iter
        if step % s.LOG_FREQ == 0 and losses:
            log(
                step=step,
                loss=sum(losses) / len(losses),
                lr=rate,
                grad_norm=norm.item(),
                skipped=skipped,
                bytes_per_s=timed / max(seconds, 1e-9),
                peak_gb=mx.get_peak_memory() / 1e9,
                seconds_left=(time.perf_counter() - began) / (step - first) * (total - step),
            )
            losses, seconds, timed = [], 0.0, 0
    bar.close()
    epochs, minutes = step * per_iter / len(train_bytes), (time.perf_counter() - began) / 60
    told = {"epochs": f"{epochs:.2f}", "minutes": f"{minutes:.1f}"}
    told |= {"peak_gb": f"{mx.get_peak_memory() / 1e9:.2f}"} | summary(s, run, total, last, best)
    told["sample_it"] = command(s, run, asked[0])
    print("\n".join(f"{key}: {value}" for key, value in told.items()))
    return 0


def why_finished(s: Settings, run: Path, step: int, total: int, best: dict) -> str:
    """Why there is nothing to do, and which setting to change to go on."""
    if step >= total:
        return f"{run} has its {step:,} iterations; to go on, raise MAX_ITERS or EPOCHS"
    return (
        f"{run} stopped early after {step:,} iterations, its best is of {best['step']:,}; "
        f"to go on, raise PATIENCE ({s.PATIENCE}) or lift it with --patience none"
    )


def summary(s: Settings, run: Path, total: int, last: dict, best: dict) -> dict:
    """What is printed of a finished run, for people and grep; `last` is its last evaluation."""
    ended = "by MAX_ITERS" if last["step"] == s.MAX_ITERS else "by EPOCHS"
    if last["step"] < total:
        ended = f"early, {s.PATIENCE} validations without a better one"
    return {
        "run": run,
        "iterations": last["step"],
        "parameters": s.BDH_CONFIG.n_parameters,
        "val_loss": f"{last['val_loss']:.4f}",
        "val_bpb": f"{last['val_bpb']:.4f}",
        "judged_on": f"{s.LOSS_ON} bytes",
        "best_judged": f"{best['judged']:.4f}",
        "best_step": best["step"],
        "ended": ended,
        "active_x": " ".join(f"{share:.1%}" for share in last["active_x"]),  # layer by layer
        "active_y": " ".join(f"{share:.1%}" for share in last["active_y"]),
        "look_at_it": run / "report.html",
    }


def command(s: Settings, run: Path, prompt: str) -> str:
    """What to type to have the finished run write, within the blocks that it was trained on."""
    python = Path(sys.executable)  # of make's .venv, which the user's shell may not know
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    words = [python, "generate.py", run, "--prompt", prompt.replace("\n", "\\n")]
    if len(prompt) + BUDGET > s.BLOCK_SIZE:
        words += ["--window", max(s.BLOCK_SIZE, PARTS)]
    return shlex.join(map(str, words))


# ------------------------------------------------------------------------------------------- flags

# Changing one of these in a run would change what its steps mean: that takes a new RUN_NAME.
UPDATE = "BATCH_SIZE x GRAD_ACCUM x processes"
FIXED = ["TRAINING_MODE", "BLOCK_SIZE", UPDATE, "SEED"]
FIXED += ["LOSS_ON", "EVAL_BYTES", "EMA", "train data", "val data"]
FIXED += ["n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size"]
RULES = {  # what each setting may be; one that is not here, a user's own, may be anything
    "TRAINING_MODE": choice(*NEEDED),
    "LOSS_ON": choice("all", "response"),
    "DATASET": text(),
    "BLOCK_SIZE": whole(1),
    "BATCH_SIZE": whole(1),
    "GRAD_ACCUM": whole(1),
    "MAX_ITERS": whole(1, none=True),
    "EPOCHS": number("above 0 and at most 1,000,000", lambda x: 0 < x <= 1e6, none=True),
    "PATIENCE": whole(1, none=True),
    "LEARNING_RATE": number("from 1e-12 to 1,000", lambda x: 1e-12 <= x <= 1000),
    "MIN_LEARNING_RATE": number("above 0 and at most 1", lambda x: 0 < x <= 1),
    "WARMUP_ITERS": whole(0),
    "LR_DECAY_ITERS": whole(1, none=True),
    "WEIGHT_DECAY": number("from 0 to 1,000", lambda x: 0 <= x <= 1000),
    "GRAD_CLIP": number("from 1e-12 to 1e12", lambda x: 1e-12 <= x <= 1e12, none=True),
    "EMA": number("from 0 to 0.999999", lambda x: 0 <= x <= 0.999999),
    "NOISE": number("at least 0 and below 1", lambda x: 0 <= x < 1),
    "MAX_SKIPS": whole(1),
    "BDH_CONFIG": Rule(BDHConfig, needs="a BDHConfig(...)"),
    "DTYPE": choice("auto", "bfloat16", "float32"),
    "MEMORY": choice("auto", *memory.SETTINGS),
    "FORCE": switch(),
    "SEED": whole(0, 2**32 - 1),  # it makes a key of 64 bits with the number of a batch
    "VAL_SHARE": number("above 0 and below 1", lambda x: 0 < x < 1),
    "EVAL_BYTES": whole(2, 2**62, none=True),
    "LOG_FREQ": whole(1),
    "EVAL_FREQ": whole(1),
    "SAVE_FREQ": whole(1),
    "KEEP": whole(1),
    "SAMPLE_BYTES": whole(0, 10**6),
    "CHECKPOINT_DIR": text(),
    "RUN_NAME": text(none=True),
    "INIT_FROM": text(none=True),
    "PHASES": text(none=True),
}


def settings(argv: list[str] | None = None) -> Settings:
    """The constants at the top, changed by a preset, changed by flags. Raises UserError."""
    s, typed = flags.parse(sys.modules[__name__], RULES, PRESETS, ACTIONS, argv)
    refuse_idle(s, typed)
    for name in ("CHECKPOINT_DIR", "INIT_FROM"):  # no shell reads a constant
        if getattr(s, name):
            setattr(s, name, str(files.expanded(getattr(s, name), name)))
    s.BDH_CONFIG = BDHConfig(**{name: vars(s).pop(name) for name in asdict(s.BDH_CONFIG)})
    for run in phases.chain(s):
        check(run)
    return s


def refuse_idle(s: Settings, typed: set[str]) -> None:
    """Raise UserError for flags that have no effect beside others that were typed."""
    idle = {}
    if s.selfcheck:
        idle["--selfcheck"] = typed - {"selfcheck"}
    if s.plan:
        idle["--plan"] = typed & {"json"}
    if s.PHASES is not None:
        idle["--phases, which names its own"] = typed & {"TRAINING_MODE", "EPOCHS"}
    for beside, names in idle.items():
        if names:
            told = ", ".join(sorted(map(flags.flag_of, names)))
            raise UserError(f"{told}: no effect beside {beside}; leave it out")


def check(s: Settings) -> None:
    """Raise UserError for the settings of a run that do not go together."""
    for name, rule in RULES.items():  # PHASES may have put other values in
        flags.check(name, getattr(s, name), rule)
    checkpoints.run_folder(s)  # RUN_NAME
    if s.LOSS_ON not in ("all", *NEEDED[s.TRAINING_MODE]):
        raise UserError(
            f"LOSS_ON is {s.LOSS_ON!r}, of which TRAINING_MODE {s.TRAINING_MODE!r} has none; "
            "set TRAINING_MODE to 'full' or LOSS_ON to 'all'"
        )
    if s.MAX_ITERS is None and s.EPOCHS is None:
        raise UserError("MAX_ITERS and EPOCHS are both none, a run without an end; set one of them")
    if s.BDH_CONFIG.vocab_size != 256:
        raise UserError(f"vocab_size is {s.BDH_CONFIG.vocab_size}; bytes are 256")
