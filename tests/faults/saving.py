"""Faults of saving and of the disk: kills, power cuts, damage, full and read-only disks, locks."""

import fcntl
import functools
import io
import json
import math
import mmap  # noqa: F401  NumPy imports it late, when a plain user may not
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from harness import (
    ARGS,
    FILES,
    LARGER,
    ROOM,
    after,
    at_call,
    begin,
    checkpoints_of,
    digest,
    end,
    fault,
    fresh,
    output,
    refusal,
    stopped,
    train,
)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import bdh_mlx
from bdh_lib import files, runs
from bdh_lib.data import prepare as preparing
from bdh_lib.script import compiler
from bdh_lib.training import checkpoints, evaluator, resume


def save_in_place(run, step, trained, info):
    """Into the final folder, each file in turn, as most trainers do."""
    at = runs.checkpoint_folder(run, step)
    at.mkdir(exist_ok=True)
    bdh_mlx.save_model(trained.model, at / FILES[0])
    mx.save_safetensors(str(at / FILES[1]), dict(sorted(tree_flatten(trained.optimizer.state))))
    (at / FILES[2]).write_text(json.dumps({"step": step} | info))
    manifest = {name: {"sha256": digest(at / name), "bytes": 0} for name in FILES[:3]}
    (at / FILES[3]).write_text(json.dumps(manifest))


UNCHECKED = [(checkpoints, "find_corruption", lambda checkpoint: None)]
IN_PLACE = [(checkpoints, "save", save_in_place), *UNCHECKED]


def report_saves(pipe):
    """For `before`: each save writes "(" to the pipe as it begins and ")" when it is done."""
    save = checkpoints.save

    def output(*args):
        os.write(pipe, b"(")
        save(*args)
        os.write(pipe, b")")

    checkpoints.save = output


def killed(n, in_save):
    span = 0.02 if in_save else 0.4  # seconds to wait at most; learned
    done = 0
    while done < n:
        box, (read, write) = fresh(), os.pipe()
        report = functools.partial(report_saves, write)
        pid = begin(box, *ARGS, *LARGER, "--checkpoint-dir", box, before=report)
        os.close(write)
        received = b""
        wait_for = random.randrange(1, 8) * in_save
        while received.count(b"(") < wait_for:
            received += os.read(read, 1)
        time.sleep(random.uniform(0, span))
        os.kill(pid, signal.SIGKILL)
        code = end(pid)
        received = received + os.read(read, 1000)
        os.close(read)
        hit = received.endswith(b"(") if in_save else code != 0
        span *= 1.1 if hit else 0.8
        if hit:
            done += 1
            yield after(box, *LARGER)
        shutil.rmtree(box.parent)


@fault("kill -9 at a random moment", 3, 110)
def _(n):
    yield from killed(n, False)


@fault("kill -9 within a save", 4, 110, in_place=IN_PLACE)
def _(n):
    yield from killed(n, True)


CALLS = [(os, n) for n in ("fsync", "rename", "replace", "open", "mkdir", "unlink", "rmdir")]
CALLS += [(io, "open"), (fcntl, "fcntl"), (mx, "save_safetensors")]


def each_call(act):
    """For `before`: from the first save on, act(name, arguments) before each call of CALLS."""

    def wrapped(original, name):
        return lambda *a, **k: (act(name, a), original(*a, **k))[1]

    def wrap():
        for owner, name in CALLS:
            setattr(owner, name, wrapped(getattr(owner, name), name))

    return lambda: at_call(checkpoints, "save", 1, wrap)


def at_calls(n, act):
    """Runs of four saves and a deletion that meet act(i, run) at each call, n of them evenly."""
    short = ("--max-iters", 8, "--keep-checkpoints", 2)
    code, out = train(fresh(), *short, before=each_call(lambda *call: os.write(2, b"\0")))
    for i in sorted({round(x) for x in np.linspace(1, out.count("\0"), min(n, out.count("\0")))}):
        box = fresh()
        code, out = train(box, *short, before=each_call(act(i, box / "full")))
        yield after(box) if code == 9 else (f"call {i}: exit {code}: {out[-300:]}", 0)


@fault("death at the i-th system call of saving and pruning", 8, 10**6, in_place=IN_PLACE)
def _(n):
    def dying(i, run):
        left = iter(range(i - 1))
        return lambda *call: os._exit(9) if next(left, None) is None else None

    yield from at_calls(n, dying)


class Drive:
    """A drive that loses, when the power goes at call i, what was not flushed: the worst it may do.

    Files not flushed since they were written are empty then, and renames in a folder not flushed
    since are undone; deletions hold.
    """

    def __init__(self, i, run):
        self.left = i
        self.run = run
        self.flushed = {}
        self.renamed = []

    def __call__(self, name, args):
        self.left -= 1
        if self.left == 0:
            self.cut()
        if name in ("fsync", "fcntl"):
            at = os.fstat(args[0])
            self.flushed[at.st_ino] = at.st_mtime_ns
            self.renamed = [r for r in self.renamed if r[1].parent.stat().st_ino != at.st_ino]
        if name in ("rename", "replace"):
            self.renamed.append(tuple(map(Path, args)))

    def cut(self):
        for old, new in reversed(list(self.renamed)):
            with suppress(OSError):
                new.rename(old)
        for file in (f for f in self.run.rglob("*.*") if f.is_file()):
            if self.flushed.get(file.stat().st_ino) != file.stat().st_mtime_ns:
                os.truncate(file, 0)
        os._exit(9)


NO_FLUSH = [(files, "fsync", lambda path: None)]


@fault("power cut at the i-th system call (simulated)", 8, 10**6, not_flushed=NO_FLUSH)
def _(n):
    yield from at_calls(n, Drive)


# ------------------------------------------------------------------------------ damaged on the disk


def flip(file):
    """Turn one bit over."""
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def cut(size):
    return lambda file: os.truncate(file, size(file.stat().st_size))


@fault("one flipped bit in a file of the newest checkpoint", 1, 50, unchecked=UNCHECKED)
def _(n):
    for name in FILES * n:
        box = fresh(8)
        flip(box / "full/step-000008" / name)
        yield after(box, least="checkpoint 8 is damaged")


@fault(
    "one flipped bit in best.json, metrics.jsonl or the prepared data",
    1,
    50,
    unchecked=[(preparing, "is_intact", lambda folder: True)],
)
def _(n):
    long = ("--block-size", 2000)  # so that most of the training bytes are read
    for name in (
        "train.bin",
        "best.json",
        "metrics.jsonl",
        "data.json",
        "val.bin",
        "train.fields",
    ) * n:
        box = fresh(8, *long)
        flip(next(box.glob(f"*/{name}"), None) or next(box.glob(f".data/*/{name}")))
        yield after(box, *long)


TRUNCATIONS = [cut(lambda size: 0), cut(lambda size: size // 2), cut(lambda size: size - 1)]


@fault("truncated or deleted file of the newest checkpoint", 1, 1, unchecked=UNCHECKED)
def _(n):
    for name in FILES:
        for harm in (*TRUNCATIONS, Path.unlink):
            box = fresh(8)
            harm(box / "full/step-000008" / name)
            yield after(box, least="checkpoint 8 is damaged")


@fault(
    "manifest empty, cut, of another kind, lacking a file, of another step",
    1,
    1,
    unchecked=UNCHECKED,
)
def _(n):
    lacking = {f: {"sha256": digest(stopped(8) / "full/step-000008" / f)} for f in FILES[1:3]}
    for content in ("", "{", "[]", "null", "7", "{}", json.dumps(lacking), "[" * 10**5):
        box = fresh(8)
        (box / "full/step-000008/manifest.json").write_text(content)
        yield after(box, least="checkpoint 8 is damaged")
    box = fresh(8)
    shutil.rmtree(box / "full/step-000008")
    shutil.copytree(box / "full/step-000006", box / "full/step-000008")
    yield after(box, least="checkpoint 8 is damaged")


@fault(
    "the two newest damaged, and all of them",
    1,
    5,
    unchecked=UNCHECKED,
    starts_again=[(checkpoints, "newest_valid", lambda run: 0)],
)
def _(n):
    for _ in range(n):
        box = fresh(8)
        for step in (6, 8):
            random.choice(TRUNCATIONS)(box / f"full/step-{step:06d}" / random.choice(FILES))
        yield after(box, least="checkpoint 6 is damaged", most=4)
        box = fresh(8)
        for at in (box / "full").glob("step-*"):
            random.choice(TRUNCATIONS)(at / random.choice(FILES))
        for _ in range(2):  # the second start finds them set aside, and must not begin anew either
            yield refusal(*train(box), "no valid checkpoint", "RUN_NAME", want=3), None


def reseal(at, edit, file=FILES[0]):
    """Change the arrays of a checkpoint so that its manifest still holds."""
    arrays = mx.load(str(at / file))
    mx.eval(arrays)
    edit(arrays)
    mx.save_safetensors(str(at / file), arrays)
    write_manifest(at)


def write_manifest(at):
    sealed = {f: {"bytes": (at / f).stat().st_size, "sha256": digest(at / f)} for f in FILES[:3]}
    (at / FILES[3]).write_text(json.dumps(sealed))


EDITS = {  # what the refusal names: the edit
    "`lm_head`": lambda a: a.pop(next(k for k in a if "lm_head" in k)),
    "`other`": lambda a: a.update(other=mx.zeros(3)),
    "(2, 8, 16)": lambda a: a.update({k: a[k].T for k in a if k.startswith("encoder")}),
    "float16": lambda a: a.update({k: a[k].astype(mx.float16) for k in a if "encoder" in k}),
    "not finite": lambda a: a.update({k: a[k] * math.nan for k in a if "encoder" in k}),
}


def loose(tree, file):
    return checkpoints.tree_unflatten(list(mx.load(str(file)).items()))


@fault(
    "checkpoint with an array missing, added, of another shape, type, not finite",
    1,
    1,
    taken_as_they_are=[(checkpoints, "_arrays_like", loose)],
)
def _(n):
    for named, edit in EDITS.items():
        for file in FILES[:2]:
            box = fresh(8)
            at = box / "full/step-000008"
            tried = train(box, before=functools.partial(reseal, at, edit, file))
            yield refusal(*tried, named if file == FILES[0] else "optimizer"), None


@fault(
    "checkpoint of other settings, of another format, of another version",
    1,
    1,
    not_compared=[(resume, "FIXED_ON_RESUME", [])],
)
def _(n):
    for flag, value in (("n-layer", 2), ("n-embd", 16), ("block-size", 8), ("seed", 5)):
        yield refusal(*train(fresh(8), f"--{flag}", value), f"here {value}", "RUN_NAME"), None
    for edit in (dict.clear, lambda c: c.pop("data"), lambda c: c.update(settings=[])):
        box = fresh(8)
        at = box / "full/step-000008"
        config = json.loads((at / FILES[2]).read_text())
        edit(config)
        (at / FILES[2]).write_text(json.dumps(config | {"step": 8}))
        write_manifest(at)
        yield refusal(*train(box), "format"), None
    box = fresh(8)
    at = box / "full/step-000008"
    config = json.loads((at / FILES[2]).read_text())
    config["versions"]["mlx"] = "0.1"
    (at / FILES[2]).write_text(json.dumps(config))
    write_manifest(at)
    yield after(box, least="mlx: there 0.1, here ")


# --------------------------------------------------------------- disk, permissions, other processes


def after_refusal(box, tried, *words):
    """The faults of a disk: refused in one line, nothing changed, all well once it is mended."""
    before = checkpoints_of(stopped(8, *LARGER))
    kept = {f.relative_to(box): d for f, d in checkpoints_of(box).items()}
    lost = [f.name for f, d in before.items() if kept.get(f.relative_to(stopped(8, *LARGER))) != d]
    why = refusal(*tried, *words) or (lost and f"changed: {lost}")
    return (why, 0) if why else after(box, *LARGER)


@fault("disk full in a save", 1, 3, in_place=IN_PLACE)
def _(n):
    sizes = [(stopped(8, *LARGER) / "full/step-000008" / f).stat().st_size for f in FILES[:2]]
    for limit in (20_000, sizes[0] // 2, sizes[0] - 1, sum(sizes) // 2, sizes[1] - 1) * n:
        box = fresh(8, *LARGER)

        def full(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            compiler.TEMPORARY_SPACE = 0  # the limit is for the save, not the start

        yield after_refusal(box, train(box, *LARGER, before=full), "not saved", "intact")


@fault("disk full (a small file system): before the run, in a save", 1, 1, in_place=IN_PLACE)
def _(n):
    if os.geteuid() or sys.platform != "linux":
        return
    late = (mx, "save_safetensors")
    for words, when in (
        (("needed for checkpoints", "KEEP_CHECKPOINTS"), (checkpoints, "newest_valid")),
        (("intact",), late),
    ):
        box = fresh(8, *LARGER)
        kept = shutil.move(box, box.with_name("kept"))
        box.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", box]
        if subprocess.run(mount, capture_output=True).returncode:
            return
        try:
            shutil.copytree(kept, box, dirs_exist_ok=True, symlinks=True)

            def fill(box=box):
                with suppress(OSError), (box / "filler").open("wb") as file:
                    while shutil.disk_usage(box).free > 100_000:
                        file.write(bytes(50_000))

            tried = train(box, *LARGER, before=lambda: at_call(*when, 1, fill))
            (box / "filler").unlink(missing_ok=True)
            yield after_refusal(box, tried, *words)
        finally:
            subprocess.run(["umount", box], check=True)


@fault(
    "read-only folder, folder that is a file",
    1,
    1,
    not_told=[
        (checkpoints, "lock_run", nullcontext),
        (files, "atomic_write_text", lambda path, text: path.write_text(text)),
    ],
)
def _(n):
    for harm in ("file", "run", "new run", "data"):
        box = fresh(8, *LARGER)
        at = {"new run": box, "data": box / ".data"}.get(harm, box / "full")
        if harm != "run":
            shutil.rmtree(box / "full")
        if harm == "file":
            at.touch()
        if harm == "data":
            shutil.rmtree(at)
            at.mkdir()
        for path in (ROOM, box.parent):
            path.chmod(0o755)
        for path in [box, *box.rglob("*")]:
            os.chown(path, 65534 if os.geteuid() == 0 else -1, -1)
        at.chmod(0o500)
        plain_user = lambda: os.geteuid() or os.setuid(65534)  # root may write everywhere
        code, out = train(
            box, *LARGER, before=lambda: at_call(checkpoints, "lock_run", 1, plain_user)
        )
        at.chmod(0o700)
        yield refusal(code, out, "cannot be written") or ("iter" if "iter " in out else ""), None


@fault("a second trainer in the same run", 1, 5, no_lock=[(fcntl, "flock", lambda *args: None)])
def _(n):
    for _ in range(n):
        box = fresh()
        second = ROOM / "second"
        second.mkdir(exist_ok=True)
        read, go_on = os.pipe()
        wait = lambda: at_call(evaluator, "evaluate", 3, lambda: os.read(read, 1))
        pid = begin(box, *ARGS, "--checkpoint-dir", box, before=wait)
        while not output(box):
            time.sleep(0.005)
        code = end(begin(second, *ARGS, "--checkpoint-dir", box))
        os.write(go_on, b".")
        why = refusal(code, (second / "out").read_text(), "another process", "RUN_NAME")
        yield why or ("the first failed" if end(pid) else ""), None
        yield after(box)


@fault(
    "checkpoints whose times are in another order",
    1,
    5,
    newest_by_time=[
        (
            runs,
            "steps",
            lambda run: [
                int(f.name[5:]) for f in sorted(run.glob("step-*"), key=lambda f: f.stat().st_mtime)
            ],
        )
    ],
)
def _(n):
    for _ in range(n):
        box = fresh(8)
        for at in (box / "full").glob("step-*"):
            os.utime(at, times=(0, 10**9 - int(at.name[5:])))
        yield after(box)
