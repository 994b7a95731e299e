"""Starting the trainer in a fork, injecting into it, judging what is left."""

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import bdh_mlx  # noqa: F401  before mlx.core: it loads the fast BLAS

# isort: split
import mlx.core as mx

import train_mlx
from bdh_lib.script import cli
from bdh_lib.training import batches

train_mlx.redraw_report = lambda *_: None  # pictures would take most of the time
RAM_DISK = Path("/dev/shm")  # where there is one; a disk's flushes would take most of the time
ROOM = Path(tempfile.mkdtemp(prefix="faults-", dir=RAM_DISK if RAM_DISK.is_dir() else None))
DATA = ROOM / "records.jsonl"
RECORD = {"system": "Be kind.", "instruction": "Greet.", "response": "Hello, wörld"}
EVERY, LAST = 2, 12  # iterations between saves, of a run
ARGS = (
    "--n-layer 1 --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --dropout 0.2 --epochs none "
    "--training-mode full --block-size 16 --batch-size 1 --learning-rate 1e-2 --warmup-iters 2 "
    f"--lr-decay-iters {LAST} --max-iters {LAST} --log-freq 1 --eval-freq 3 --save-freq {EVERY} "
    f"--eval-bytes 40 --sample-bytes 0 --dataset {DATA}"
).split()
SAMPLES = ("--sample-bytes", 1)  # which would take half of the time of every try
LARGER = ("--n-embd", 32, "--mlp-internal-dim-multiplier", 32, "--max-iters", 16)  # slower to save
FILES = ("model.safetensors", "optimizer.safetensors", "config.json", "manifest.json")

EAGER = "eager"  # in place of a flag: without mx.compile

# ---------------------------------------------------------------------------- starting the trainer


def begin(box, *args, before=None, module=train_mlx):
    """Start the script in a fork that first calls `before`; its pid. Its output is in box/out."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        out = os.open(box / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(out, standard)
        sys.argv = [module.__file__, *(str(a) for a in args if a != EAGER)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a job in the background
            signal.signal(number, signal.SIG_DFL)  # is started with some of them ignored
        if EAGER in args:
            mx.disable_compile()
        if before:
            before()
        sys.stdout, sys.stderr = (open(fd, "w", 1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        cli.run_main(module.main, module.__file__)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def end(pid, seconds=120):
    """Exit code of a fork, minus the signal that killed it; one that hangs is killed."""
    for limit in (seconds, 10):
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)


def train(box, *args, before=None, base=ARGS):
    """Run the trainer in a box; its exit code and what it printed."""
    code = end(begin(box, *base, "--checkpoint-dir", box, *args, before=before))
    return code, (box / "out").read_text(errors="replace")


@functools.cache
def stopped(step, *args):
    """A box, not to be changed, whose run was stopped after iteration `step`; 0: data alone."""
    box = Path(tempfile.mkdtemp(dir=ROOM))
    how = signalled("get_batch", step + 1) if step < LAST else None
    code, out = train(box, *args, before=how) if step else train(box, *args, "--max-iters", 1)
    assert code in (0, 143), out
    if not step:
        shutil.rmtree(box / "full")
        (box / "out").unlink()
    return box


def fresh(step=0, *args):
    """A new box: `stopped`, copied."""
    box = Path(tempfile.mkdtemp(dir=ROOM)) / "box"
    return Path(shutil.copytree(stopped(step, *args), box, symlinks=True))


def signalled(name, nth, number=signal.SIGTERM, owner=batches):
    """For `before`: the trainer sends itself a signal at the nth call of a function."""
    return lambda: at_call(owner, name, nth, lambda: os.kill(os.getpid(), number))


def at_call(owner, name, nth, act):
    """Call `act` before the nth call of a function."""
    original = getattr(owner, name)
    calls = []

    @functools.wraps(original)
    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


# --------------------------------------------------------------------------------- judging a run


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sound(box):
    """Steps whose files are those of their manifest, by this file's own reading of it."""
    found = []
    for at in (box / "full").glob("step-*"):
        with suppress(Exception):  # whatever is in it
            manifest = json.loads((at / "manifest.json").read_text())
            if all(digest(at / name) == was["sha256"] for name, was in manifest.items()):
                found.append(int(at.name[5:]))
    return sorted(found)


def output(box):
    """The last iteration that the trainer printed, 0 before any."""
    out = (box / "out").read_text(errors="replace") if (box / "out").exists() else ""
    return int((["0", *re.findall(r"^iter +(\d+) \| loss", out, re.M)])[-1])


def state(box, step):
    """sha256 of parameters and optimizer of a checkpoint."""
    return [digest(box / f"full/step-{step:06d}" / name) for name in FILES[:2]]


@functools.cache
def reference(*args):
    """The same of the last checkpoint of a run that met no fault."""
    return state(*whole(*args))


@functools.cache
def whole(*args):
    box = fresh(0)
    code, out = train(box, *args)
    assert code == 0, out
    return box, max(sound(box))


def litter(box):
    """Names that a run does not leave."""
    own = {
        ".lock",
        ".saved",
        "best.json",
        "config.json",
        "metrics.jsonl",
        *(f"step-{n:06d}" for n in sound(box)),
    }
    names = {p.name for p in (box / "full").iterdir() if not p.name.startswith("damaged-")}
    return sorted(names - own) + [p.name for p in (box / ".data").glob("*.tmp")]


def after(box, *args, least=None, most=EVERY):
    """Start again: what is not as if nothing had happened, "" if all is, and the steps lost."""
    lost = max(0, output(box) - max(sound(box), default=0))
    code, out = train(box, *args)
    if code:
        return f"the next start exits with {code}: {out[-300:]}", lost
    bad = [] if state(box, max(sound(box), default=0)) == reference(*args) else ["other bits"]
    bad += [f"litter {found}"] if (found := litter(box)) else []
    bad += [f"{lost} steps lost"] if lost > most else []
    bad += [f"says nothing of {least}"] if least and least not in out else []
    return "; ".join(bad), lost


def refusal(code, out, *words, want=2):
    """What is wrong with a refusal, which is one line that names what and the cure."""
    output = re.findall(r"(?<! )error: .*", out)
    missing = [w for w in words if w not in "".join(output)]
    if code == want and len(output) == 1 and "Traceback" not in out and not missing:
        return ""
    return f"exit {code}, missing {missing}: {out[-400:]}"


# -------------------------------------------------------------------------------- list of faults

FAULTS = []


def fault(name, quick, full, **controls):
    """Register a generator of (what went wrong or "", steps lost or None) for n tries of a kind.

    controls: what is taken out, as [(owner, attribute, replacement)].
    """
    return lambda tries: FAULTS.append((name, quick, full, controls, tries)) or tries


WORST = {}  # seconds and bytes, printed below the table


def checkpoints_of(box):
    return {f: digest(f) for f in (box / "full").glob("step-*/*")}
