"""Keep a Mac awake for a run, and start the run again after macOS ended the GPU's work."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bdh_lib import runs
from bdh_lib.compute import memory
from bdh_lib.errors import UserError, warn
from bdh_lib.settings import Settings
from bdh_lib.training import checkpoints
from bdh_lib.training.train_settings import phase_settings

RESTARTS = "BDH_RESTARTS"  # environment: restarts since the newest checkpoint; its step, by run
MAX_RESTARTS = 3  # in a row, without a newer checkpoint
ADVICE = (
    "Let the display sleep while it trains. The environment variable "
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 helped on some Macs; another one crashed all the same while "
    "its display was on"
)


class GpuFault(UserError):
    """macOS ended the GPU's work, and the process does not restart itself."""

    exit_code = 1


@contextmanager
def kept_awake(wanted: bool) -> Iterator[None]:
    """Keep a Mac awake meanwhile, by its program caffeinate, if `wanted`.

    The display may sleep (no -d): macOS ends long GPU work while it is on.
    """
    program = shutil.which("caffeinate") if wanted and sys.platform == "darwin" else None
    if not program:
        yield
        return
    command = [program, "-i", "-s", "-w", str(os.getpid())]  # -w: it does not outlive a kill
    # Without close_fds Python need not fork, which can hang once Metal is at work
    with subprocess.Popen(command, close_fds=False) as caffeinate:
        try:
            yield
        finally:
            caffeinate.terminate()


@contextmanager
def restarted_after_gpu_fault(s: Settings, allowed: bool) -> Iterator[None]:
    """Start the command of this process anew when macOS ends the GPU's work, if `allowed`.

    MLX's arrays may be poisoned then, so the next process continues from the newest checkpoint.
    Raises GpuFault if a restart is not allowed, or has not helped MAX_RESTARTS times.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not memory.is_gpu_fault(error):
            raise
        reason = f"macOS ended the GPU's work: {' '.join(str(error).split())}. {ADVICE}"
    if not allowed or (count := count_restart(s)) > MAX_RESTARTS:
        raise GpuFault(f"{reason}. Checkpoints are as they were; the same command continues")
    again = f"restart {count} of at most {MAX_RESTARTS} without a newer one"
    warn(f"{reason}. Continuing from the newest checkpoint: {again}")
    sys.stdout.flush()
    # a second --refresh-data could find other data than the run began with
    arguments = [word for word in sys.orig_argv[1:] if word != "--refresh-data"]
    os.execv(sys.executable, [sys.executable, *arguments])


def count_restart(s: Settings) -> int:
    """Count the restarts since the newest checkpoint, this one too, for the next process."""
    folders = map(checkpoints.run_folder, phase_settings(s))
    newest = str([max(runs.steps(folder), default=0) for folder in folders])
    count, _, since = os.environ.get(RESTARTS, "").partition(" ")
    count = int(count) + 1 if since == newest else 1
    os.environ[RESTARTS] = f"{count} {newest}"
    return count
