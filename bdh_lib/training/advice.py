"""Warning signs in a run's metrics: what they are, and which setting to change.

An evaluation gets at most one line of advice: that of the first sign which explains what is seen.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bdh_lib.data.formats import FIELDS
from bdh_lib.data.split import Split
from bdh_lib.settings import Settings
from bdh_lib.training.schedule import blocks_per_step, end_setting, total_steps
from bdh_lib.units import bits_per_byte
from bdh_mlx import BDHConfig

MIN_RISE = 0.01  # relative rise of a validation loss, always of the same bytes, that is not chance
LOSS_JUMP = 0.25  # relative rise from one logged loss, the mean of LOG_FREQ steps, to the next
NORM_LIMIT = 10  # gradient norm, in GRAD_CLIPs, beyond which the clipping alone sets the step
NOISE_SHARE = 0.9  # share of the unigram entropy above which text is noise
LATE_FRACTION = 0.25  # share of a run by which it should know more than which byte follows which
MAX_BYTES = 10**6  # bytes that are counted, for the time it takes
MAX_DROPOUT = 0.5  # that is advised
RECIPE_BYTES = 4_200_000
MEASURED_EPOCHS = {  # by the bytes of records that were trained on (docs/log.md, 2026-11-27, -28)
    100_000: "the default settings were best after 12 epochs",
    500_000: "the default settings were best after 9 to 10 epochs",
    RECIPE_BYTES: "the default settings were best at the end of 13 epochs",
    46_000_000: "the default settings until 2026-11-28 still gained after 0.4 epochs; "
    "--dropout 0.1 took 0.06 bits per byte off",
}
SMALL_DATA = 100_000  # bytes; over a megabyte 49 epochs were not too many (docs/log.md)
MANY_EPOCHS = 12
FEW_EPOCHS = "on 23 to 100 KB every measured run was best after 6 to 16 (--epochs 10)"
REFERENCE_RATE = 1e-3  # of the official training, and of the best of docs/log.md's runs


def unigram_entropy(data: np.ndarray) -> float:
    """Return the entropy of the byte frequencies in `data`, in nats per byte.

    Without data it is that of uniform frequencies, ln 256.
    """
    if not len(data):
        return math.log(256)
    share = np.bincount(data, minlength=256) / len(data)
    return float(-np.sum(share[share > 0] * np.log(share[share > 0])))


def byte_baselines(loss_on: str, train: Split, val: Split) -> tuple[float, float]:
    """Return the unigram entropy of val, and its bigram cross-entropy, both in nats per byte.

    The bigrams are those of train. Of each side only the first MAX_BYTES bytes that LOSS_ON counts
    are read.
    """
    train_bytes, val_bytes = (
        first_counted(loss_on, side.bytes, side.fields) for side in (train, val)
    )
    return unigram_entropy(val_bytes), ngram_cross_entropy(train_bytes, val_bytes, order=1)


def first_counted(loss_on: str, stream: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Return the first MAX_BYTES bytes of `stream` that LOSS_ON counts, wherever they stand."""
    if loss_on == "all":
        return np.array(stream[:MAX_BYTES])
    parts = [np.empty(0, np.uint8)]
    count = 0
    for begin in range(0, len(stream), MAX_BYTES):  # the stream may be larger than the memory
        counted = fields[begin : begin + MAX_BYTES] == FIELDS.index(loss_on)
        parts.append(stream[begin : begin + MAX_BYTES][counted])
        count += len(parts[-1])
        if count >= MAX_BYTES:
            break
    return np.concatenate(parts)[:MAX_BYTES]


class EvalHistory(NamedTuple):
    """The evaluations of a run so far, by their steps; losses and entropies in nats per byte."""

    val_loss: dict[int, float]  # the monitored loss, by step
    train_loss: dict[int, float]  # the mean since the evaluation before, by step
    lines: list[list[dict]]  # of the log: those before each evaluation, but for the first
    first_step: int
    best_step: int  # of those after the first
    previous_step: int
    step: int  # of the last
    total_steps: int  # of the whole run
    unigram_entropy: float
    bigram_cross_entropy: float

    @property
    def loss(self) -> float:
        """The monitored loss of the last evaluation."""
        return self.val_loss[self.step]


def advise(
    entries: list[dict], s: Settings, total: int, baselines: tuple[float, float]
) -> dict[str, str]:
    """Return advice by the name of its sign, for the evaluation that ends `entries`; {}: none.

    entries: lines of metrics.jsonl; total: steps of the whole run; baselines: those of
    `byte_baselines`.
    """
    val = {entry["step"]: entry["monitored_loss"] for entry in entries if "monitored_loss" in entry}
    lines = {(a, b): [entry for entry in entries if "loss" in entry and a < entry["step"] <= b]
             for a, b in pairwise([0, *(step for step in val if step)])}  # fmt: skip
    if len(val) < 2 or not all(lines.values()):  # LOG_FREQ above EVAL_FREQ shows too little
        return {}
    evals = EvalHistory(
        val_loss=val,
        train_loss={b: float(np.mean([entry["loss"] for entry in lines[a, b]])) for a, b in lines},
        lines=list(lines.values()),
        first_step=next(iter(val)),
        best_step=min(list(val)[1:], key=val.get),
        previous_step=list(val)[-2],
        step=list(val)[-1],
        total_steps=total,
        unigram_entropy=baselines[0],
        bigram_cross_entropy=baselines[1],
    )
    for name, sign in SIGNS.items():
        if advice := sign(evals, s):
            return {name: advice}
    return {}


def rate_change(s: Settings, factor: float) -> str:
    """Return "LEARNING_RATE from 0.001 to 0.003", for a sentence that says to raise or lower it."""
    return f"LEARNING_RATE from {s.LEARNING_RATE:g} to {s.LEARNING_RATE * factor:.2g}"


def describe_change(evals: EvalHistory, then: int) -> str:
    """Say how both losses went from the evaluation at `then` to the last one."""
    text = f"from iteration {then:,} to {evals.step:,} validation went from "
    text += f"{evals.val_loss[then]:.4f} to {evals.loss:.4f}"
    if then:
        before, now = evals.train_loss[then], evals.train_loss[evals.step]
        text += f" and the training loss from {before:.4f} to {now:.4f}"
    return text


def has_risen(evals: EvalHistory, then: int) -> bool:
    """Tell whether validation is above that at `then` by more than MIN_RISE of it."""
    return evals.loss > (1 + MIN_RISE) * evals.val_loss[then]


def overfitting(evals: EvalHistory, s: Settings) -> str | None:
    """Advise if validation rose above its best while the training loss fell."""
    training_fell = evals.train_loss[evals.step] < evals.train_loss[evals.best_step]
    if has_risen(evals, evals.best_step) and training_fell:
        dropout = s.BDH_CONFIG.dropout
        higher = min(MAX_DROPOUT, dropout + 0.2)
        more = f"raise dropout from {dropout:g} to {higher:g}, " if dropout < higher else ""
        return (
            f"overfitting: {describe_change(evals, evals.best_step)}. The best checkpoint is kept; "
            f"for a better one {more}take more data, or lower {rate_change(s, 1 / 3)}"
        )


def lr_too_high(evals: EvalHistory, s: Settings) -> str | None:
    """Advise if updates were skipped, losses jumped or rose, or gradients are large."""
    lines = evals.lines[-1]
    seen = []
    norms = [math.inf if entry["grad_norm"] is None else entry["grad_norm"] for entry in lines]
    norm = float(np.median(norms))
    skipped = lines[-1]["skipped"] - (evals.lines[-2][-1]["skipped"] if len(evals.lines) > 1 else 0)
    jumps = [f"{a['loss']:.4f} to {b['loss']:.4f}" for a, b in pairwise(lines)
             if b["loss"] > (1 + LOSS_JUMP) * a["loss"]]  # fmt: skip
    if skipped > 0:
        seen.append(f"{skipped:,} updates were skipped")
    if jumps:
        seen.append(f"the training loss jumped from {', '.join(jumps)}")
    if s.GRAD_CLIP and norm > NORM_LIMIT * s.GRAD_CLIP:
        seen.append(f"the gradient's norm is {norm:.3g}, and GRAD_CLIP {s.GRAD_CLIP:g}")
    if exceeded := [step for step in (evals.best_step, evals.first_step) if has_risen(evals, step)]:
        seen.append(describe_change(evals, exceeded[0]))
    if seen:
        return f"learning rate too high: {'; '.join(seen)}. Lower {rate_change(s, 1 / 3)}"


def plateau(evals: EvalHistory, s: Settings) -> str | None:
    """Advise if, at this pace, the run would end at noise, or would gain less than MIN_RISE."""
    is_warming_up = evals.previous_step < max(1, s.WARMUP_ITERS)
    if is_warming_up or evals.lines[-1][-1]["lr"] < s.LEARNING_RATE / 2:
        return None  # slow for another reason
    intervals = min(20, (evals.total_steps - evals.step) / (evals.step - evals.previous_step))
    gain = (evals.val_loss[evals.previous_step] - evals.loss) * intervals
    gain_to_leave_noise = evals.loss - NOISE_SHARE * evals.unigram_entropy
    before, now = evals.train_loss[evals.previous_step], evals.train_loss[evals.step]
    training_is_flat = now > (1 - MIN_RISE) * before
    is_small = gain < MIN_RISE * evals.loss and training_is_flat
    if intervals > 0 and (gain < gain_to_leave_noise or is_small):
        return (
            f"stuck: {describe_change(evals, evals.previous_step)}; at this pace the run ends "
            f"near {min(evals.loss, evals.loss - gain):.2f}. Raise {rate_change(s, 3)}; if that "
            f"does not help, look at the data, or raise n_embd from {s.BDH_CONFIG.n_embd} to "
            f"{2 * s.BDH_CONFIG.n_embd}"
        )


def not_coherent(evals: EvalHistory, s: Settings) -> str | None:
    """Advise if the model knows little more than how often each byte occurs."""
    if evals.loss > NOISE_SHARE * evals.unigram_entropy:
        bits, unigram = (bits_per_byte(nats) for nats in (evals.loss, evals.unigram_entropy))
        end = end_setting(s, evals.total_steps)
        return (
            f"not yet coherent: {bits:.2f} bits per byte, and to know only how often each byte "
            f"occurs gives {unigram:.2f}: samples are noise. "
            + ("Go on" if evals.step < evals.total_steps else f"Double {end} ({vars(s)[end]:,g})")
        )


def lr_too_low(evals: EvalHistory, s: Settings) -> str | None:
    """Advise if late in a run with a low rate the model knows no more than pairs of bytes."""
    late = evals.step >= max(LATE_FRACTION * evals.total_steps, 2 * s.WARMUP_ITERS)
    if late and s.LEARNING_RATE < REFERENCE_RATE and evals.loss > evals.bigram_cross_entropy:
        bits, bigram = (bits_per_byte(nats) for nats in (evals.loss, evals.bigram_cross_entropy))
        return (
            f"slow: {bits:.2f} bits per byte after {evals.step:,} of {evals.total_steps:,} "
            f"iterations; to know only which byte follows which gives {bigram:.2f}. Raise "
            f"LEARNING_RATE from {s.LEARNING_RATE:g} to {REFERENCE_RATE:g}"
        )


SIGNS = {  # by their names in metrics.jsonl, in the order in which they are looked for
    "overfitting": overfitting,
    "too_high": lr_too_high,
    "stuck": plateau,
    "not_coherent": not_coherent,
    "slow": lr_too_low,
}


def epochs_note(s: Settings, n_bytes: int) -> str | None:
    """Say how many epochs were best where the data are far smaller or larger than the recipe's.

    For another size of the model, say only that there are very many. None where nothing is to say.
    """
    epochs = total_steps(s, n_bytes) * s.BLOCK_SIZE * blocks_per_step(s) / n_bytes
    if s.BDH_CONFIG.n_parameters != BDHConfig().n_parameters:
        overfits = n_bytes < SMALL_DATA and epochs > MANY_EPOCHS
        many = f"{epochs:,.0f} epochs over {n_bytes:,} bytes may overfit"
        return f"{many}; {FEW_EPOCHS}" if overfits else None
    if 0.5 <= n_bytes / RECIPE_BYTES <= 2:
        return None
    near = min(MEASURED_EPOCHS, key=lambda size: abs(math.log(size / n_bytes)))
    more = "; more bytes were not measured" if n_bytes > max(MEASURED_EPOCHS) else ""
    return (
        f"{epochs:,.1f} epochs over {n_bytes:,} bytes; "
        f"on {near / 1e6:g} MB {MEASURED_EPOCHS[near]}{more}"
    )


# ------------------------------------------------------------------- what counting bytes would know


def ngram_cross_entropy(train: np.ndarray, val: np.ndarray, order: int = 3) -> float:
    """Return the loss on val, in nats per byte, of a model that counts the bytes of train.

    It counts which byte follows each context of up to `order` bytes, and mixes the lengths as
    Witten and Bell do: p_k(b | c) = (count(c b) + followers(c) p_{k-1}(b | c')) / (count(c) +
    followers(c)), with c' one byte shorter, followers the number of distinct bytes seen after c,
    and p_{-1} = 1/256. The first `order` bytes of val are context only; a val without more bytes
    has a loss of ln 256, that of a model that knows nothing.
    """
    n = len(val) - order
    if n < 1:
        return math.log(256)
    p = np.full(n, 1 / 256)
    for k in range(order + 1):
        grams_seen, queries = (_windows(stream, k + 1) for stream in (train, val))
        queries = queries[order - k :]
        grams, counts = np.unique(grams_seen, return_counts=True)
        contexts, first, followers = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        count = _look_up(grams, counts, queries)
        total, distinct = (_look_up(contexts, t, queries >> 8) for t in (totals, followers))
        p = np.where(total > 0, (count + distinct * p) / np.maximum(total + distinct, 1), p)
    return float(-np.log2(p).mean()) * math.log(2)


def _windows(stream: np.ndarray, width: int) -> np.ndarray:
    """Return every `width` bytes in a row as one number."""
    n = max(0, len(stream) - width + 1)
    number = np.zeros(n, np.uint64)
    for i in range(width):
        number = (number << np.uint64(8)) | stream[i : n + i]
    return number.astype(np.int64)


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the value of each key asked for, 0 for one that is not there."""
    if not len(keys):
        return np.zeros(len(queries), int)
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0)
