"""Faults of a run: stops, signals, numbers gone bad; what is kept and what is not touched."""

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import time

from harness import (
    ARGS,
    DATA,
    EAGER,
    LAST,
    ROOM,
    SAMPLES,
    WORST,
    after,
    at_call,
    begin,
    end,
    fault,
    fresh,
    litter,
    reference,
    refusal,
    signalled,
    sound,
    state,
    train,
)

# isort: split
import mlx.core as mx
import numpy as np

import bdh_mlx
import train_mlx
from bdh_lib import files, runs
from bdh_lib.data import columns
from bdh_lib.generation import decoding
from bdh_lib.training import batches, checkpoints, evaluator, signals

# ------------------------------------------------------------------------- exact resume and signals


def without_optimizer(run, step, trained):
    fresh_state = trained.optimizer.state
    LOAD(run, step, trained)
    trained.optimizer.state = fresh_state


def counted_keys():
    """mx.random.key as a generator of the process's own, which a resumed one starts anew."""
    numbers = iter(range(10**9))
    return lambda seed: KEY(next(numbers))


def from_the_first(split, batch_index, *rest):
    calls = from_the_first.calls = getattr(from_the_first, "calls", -1) + 1
    return GET_BATCH(split, calls, *rest)


LOAD, KEY, GET_BATCH = checkpoints.load, mx.random.key, batches.get_batch
FORGOTTEN = {
    "optimizer_not_restored": [(checkpoints, "load", without_optimizer)],
    "dropout_key_not_of_the_step": [(mx.random, "key", counted_keys())],
    "data_from_the_first_batch": [(batches, "get_batch", from_the_first)],
}


def stops(n, *args, number=signal.SIGTERM):
    """Stop at n of the batches, evenly, and resume."""
    micros = LAST * (int(args[1]) if "--grad-accum" in args else 1)
    for k in sorted({round(x) for x in np.linspace(2, micros, min(n, micros))}):
        box = fresh()
        code, out = train(box, *args, before=signalled("get_batch", k, number))
        yield after(box, *args) if code == 128 + number else (f"exit {code}: {out[-300:]}", 0)


@fault("stopped at each iteration", 2, LAST, **FORGOTTEN)
def _(n):
    yield from stops(n)


@fault("stopped at each iteration, not compiled", 1, LAST)
def _(n):
    yield from stops(n, EAGER)


@fault("stopped at each of three batches to an update", 2, 3 * LAST, **FORGOTTEN)
def _(n):
    yield from stops(n, "--grad-accum", 3)


@fault("a chain of 20 stops", 1, 3)
def _(n):
    args = ("--max-iters", 40, "--grad-accum", 2, "--eval-freq", 7)
    for _ in range(n):
        box = fresh()
        for link in range(20):
            how = signalled("get_batch", random.randrange(3, 6))
            code, out = train(box, *args, before=how)
            if code != 143:
                yield f"link {link}: exit {code}: {out[-300:]}", 0
                break
        yield after(box, *args)


class Deaf(signals.StopSignal):
    """A StopSignal without a handler."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


PHASES = {  # the call that starts it, and which
    "step": (batches, "get_batch", 6),  # the first, because the control fails there
    "start": (checkpoints, "newest_valid", 1),
    "data preparation": (columns, "parse_record", 5),
    "compilation": (bdh_mlx.BDH, "__call__", 1),
    "evaluation": (evaluator, "evaluate", 3),
    "sampling": (decoding, "stream", 5),
    "save": (files, "fsync", 10),
    "retention": (checkpoints, "prune", 8),
    "last evaluation": (evaluator, "evaluate", 5),
}


@fault("SIGINT, SIGTERM, SIGHUP in each phase", 1, 3, no_handler=[(train_mlx, "StopSignal", Deaf)])
def _(n):
    for i, (phase, (owner, name, nth)) in enumerate(PHASES.items()):
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in numbers if n > 1 else numbers[i % 2 : i % 2 + 1]:
            box = fresh()
            if phase == "data preparation":
                shutil.rmtree(box / ".data")
            code, out = train(box, *SAMPLES, before=signalled(name, nth, number, owner))
            code = as_a_shell_shows(code)
            wrong = "" if code == 128 + number else f"{phase}: exit {code}: {out[-300:]}"
            yield (wrong, 0) if wrong else after(box, *SAMPLES, most=0)


def as_a_shell_shows(code):
    """128 + the signal, where the signal itself ended the process: MLX was tracing a step."""
    return 128 - code if code < 0 else code


def latency(box, *args, before, numbers, base):
    """Seconds from the last of the signals, sent in a phase that `before` reports, to the end."""
    read, write = os.pipe()
    pid = begin(box, *base, "--checkpoint-dir", box, *args, before=lambda: before(write))
    os.close(write)
    os.read(read, 1)
    os.close(read)
    for i, number in enumerate(numbers):
        # a second signal that comes before the first was noticed would be the same one
        time.sleep(0.3 if i else random.uniform(0.02, 0.05))
        os.kill(pid, number)
    began = time.monotonic()
    code = end(pid, 30)
    return time.monotonic() - began, as_a_shell_shows(code)


TINY = f"--preset tiny --dataset {DATA} --save-freq 2 --eval-freq 2 --log-freq 1".split()
WAITS = iter([0, 9])  # seconds
TINY_PHASES = {
    "evaluation": (evaluator, "evaluate", 2),
    "step": (batches, "get_batch", 3),
    "sampling": (decoding, "stream", 4),
    "save": (files, "fsync", 3),
    "compilation": (bdh_mlx.BDH, "__call__", 1),
    "data preparation": (columns, "parse_record", 5),
}


@fault(
    "SIGTERM in each phase of preset tiny: out within 1 s, or 3 steps of a busy machine",
    0,
    2,
    deaf_evaluation=[
        (evaluator, "evaluate", lambda *a, **k: (time.sleep(next(WAITS, 0)), (2.0, {}))[1])
    ],
)
def _(n):
    for owner, name, nth in list(TINY_PHASES.values()) * n:
        box = fresh()
        if name == "parse_record":
            shutil.rmtree(box / ".data")
        report = lambda w: at_call(owner, name, nth, lambda: os.write(w, b"."))
        seconds, code = latency(box, before=report, numbers=[signal.SIGTERM], base=TINY)
        rates = re.findall(r"norm .*?([\d,]+) bytes/s", (box / "out").read_text())
        step = 2048 / max(1, int(rates[-1].replace(",", ""))) if rates else 0
        WORST["latency on tiny, s"] = max(WORST.get("latency on tiny, s", 0), round(seconds, 2))
        late = code != 143 or seconds > max(1, 3 * step)
        yield (
            f"{name}: exit {code} after {seconds:.2f} s, a step takes {step:.2f}" if late else "",
            None,
        )


@fault(
    "a second signal, in a save and while MLX computes for long",
    1,
    5,
    first_only=[(signals.StopSignal, "watch", lambda self, read: None)],
)
def _(n):
    def slow_save(w):
        at_call(files, "fsync", 12, lambda: (os.write(w, b"."), time.sleep(2)))

    def long_step(w):
        def compute():
            a = mx.random.normal((1500, 1500))
            mx.eval(a)
            os.write(w, b".")
            for _ in range(60):
                a = (a @ a) * 1e-3
            mx.eval(a)

        at_call(batches, "get_batch", 6, compute)

    for before in (slow_save, long_step) * n:
        box = fresh()
        seconds, code = latency(box, before=before, numbers=[signal.SIGINT] * 2, base=ARGS)
        in_time = code == 130 and seconds < 1  # without the second signal it takes 2 s or more
        late = "" if in_time else f"exit {code} after {seconds:.2f} s"
        yield (late, 0) if late else after(box)


# ----------------------------------------------------------------------------- numbers that go bad


def bad_numbers(kind, first, last=None):
    """For `before`: the loss of the batches first..last, or its gradient alone, is not finite."""
    call = bdh_mlx.BDH.__call__
    seed = train_mlx.SEED * 2**32
    keys = mx.stack([KEY(seed + k) for k in range(first, (last or first) + 1)])

    def wrong(self, *args, key=None, **more):
        logits, *rest = call(self, *args, key=key, **more)
        if key is None:
            return logits, *rest
        hit = mx.any(mx.all(keys == key, axis=1))
        if kind == "gradient":
            still = logits - mx.stop_gradient(logits)  # 0, with a gradient
            return logits + mx.where(hit, still * 1e38, 0) * 1e38, *rest
        return mx.where(hit, kind, logits), *rest

    bdh_mlx.BDH.__call__ = wrong


UNGUARDED = [(mx, "isfinite", lambda a: mx.ones(a.shape, mx.bool_))]


@fault(
    "loss or gradient not finite once: skipped, counted, resumed exactly", 1, 3, no_guard=UNGUARDED
)
def _(n):
    for kind in (math.nan, math.inf, -math.inf, "gradient"):
        for k in random.sample(range(1, LAST - 2), n):
            hurt = functools.partial(bad_numbers, kind, k)
            box = fresh()
            args = ("--save-freq", 1, "--keep-checkpoints", 99)
            code, _out = train(box, *args, before=hurt)
            lines = map(json.loads, (box / "full/metrics.jsonl").open())
            skips = [m["skipped"] for m in lines if "skipped" in m][-1:]
            why = [] if code == 0 and skips == [1] else [f"exit {code}, skipped {skips}"]
            if not why:
                if state(box, k)[0] != state(box, k + 1)[0]:
                    why.append("the update was not skipped")
                if state(box, k + 1)[0] == state(box, k + 2)[0]:
                    why.append("skipped others")
                again = fresh()
                stop = signalled("get_batch", k + 2)
                train(again, *args, before=lambda: (hurt(), stop()))
                train(again, *args, before=hurt)
                if state(again, LAST) != state(box, LAST):
                    why.append("other bits after a stop")
            yield "; ".join(why), None


@fault(
    "numbers not finite for ever: stops, names the bytes, keeps what was",
    1,
    3,
    no_guard=[*UNGUARDED, (math, "isfinite", lambda x: True)],
)
def _(n):
    for k in (4, 6, 8)[:n]:
        box = fresh()
        hurt = functools.partial(bad_numbers, math.nan, k, 100)
        code, out = train(box, "--max-iters", 40, "--max-consecutive-skips", 2, before=hurt)
        last = f"the last checkpoint is of iteration {k};"
        why = refusal(code, out, "begin at [", last, want=1)
        yield (why, 0) if why or max(sound(box)) != k else after(box)
    wild = (
        "--learning-rate",
        1000,
        "--weight-decay",
        1000,
        "--max-consecutive-skips",
        3,
        "--max-iters",
        60,
    )
    yield refusal(*train(fresh(8), *wild), "the last checkpoint is of iteration", want=1), None


@fault(
    "validation loss not finite: stops, never the best",
    1,
    2,
    no_guard=[(math, "isfinite", lambda x: True)],
)
def _(n):
    for value in (math.nan, math.inf)[:n]:
        for at in (1, 2, 4):
            box = fresh()
            real = evaluator.evaluate
            count = iter(range(100))
            fake = lambda *a, **k: (value, {}) if next(count) == at else real(*a, **k)
            code, out = train(box, before=lambda: setattr(evaluator, "evaluate", fake))
            best = box / "full/best.json"
            named = json.loads(best.read_text())["step"] if best.exists() else 0
            why = refusal(code, out, f"validation loss is {value}", want=1)
            yield (why, 0) if why or named == 3 * at else after(box)


# ------------------------------------------------------------------------------------- retention


@fault(
    "retention: KEEP_CHECKPOINTS 1, 2, 3, all, the best first, in the middle, last",
    1,
    1,
    best_not_spared=[(checkpoints, "prune", lambda run, keep, best: PRUNE(run, keep, None))],
)
def _(n):
    for keep in (1, 2, 3, 99):
        for best in range(2, LAST + 1, 4 if keep == 2 else 10):
            box = fresh()
            losses = iter([9.0, *(1.0 if step == best else 5.0 for step in range(2, LAST + 1, 2))])
            fake = lambda *a, **k: (next(losses), {})
            _code, _out = train(
                box,
                "--keep-checkpoints",
                keep,
                "--eval-freq",
                2,
                before=lambda: setattr(evaluator, "evaluate", fake),
            )
            expected = sorted({best, *range(2, LAST + 1, 2)[-keep:]})
            yield (
                ""
                if sound(box) == expected and not litter(box)
                else f"{sound(box)}, not {expected}",
                None,
            )


PRUNE = checkpoints.prune


def by_name_alone(run):
    return sorted(int(f.name[5:]) for f in run.glob("step-*") if f.name[5:].isdigit())


@fault(
    "foreign files, folders and links in the run",
    1,
    1,
    any_name=[(runs, "steps", by_name_alone)],
)
def _(n):
    for name, kind in (
        ("step-000003", "link"),
        ("step-000005", "file"),
        ("step-abc", "folder"),
        ("step-7", "folder"),
        ("notes.txt", "file"),
        (".step-000009.tmp", "link"),
        ("step-000001.bak", "folder"),
        (".mine.tmp", "file"),
    ):
        box = fresh(8)
        outside = ROOM / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "precious").write_text("x")
        at = box / "full" / name
        if kind == "link":
            at.symlink_to(outside)
        elif kind == "folder":
            shutil.copytree(outside, at)
        else:
            at.write_text("x")
        inode = at.lstat().st_ino
        code, out = train(box, "--keep-checkpoints", 1)
        same = (os.path.lexists(at) and at.lstat().st_ino == inode) or name == ".step-000009.tmp"
        same = same and (outside / "precious").exists()
        yield (
            ""
            if code == 0 and same and state(box, LAST) == reference()
            else f"{name}: {out[-300:]}",
            None,
        )
