"""What a Mac needs of a long run: it stays awake."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_awake(wanted: bool) -> Iterator[None]:
    """Keep a Mac from sleeping meanwhile, by its program caffeinate, if `wanted`.

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
