"""The signals that end a script: how Ctrl-C is answered, and where the system answers it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 1.0  # seconds that Ctrl-C waits for the interpreter, which MLX may hold
INTERRUPTED = 128 + signal.SIGINT  # exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def default_signals() -> Iterator[None]:
    """Let the system end the process at a signal.

    MLX traces the graph of a long block or a deep model in one call of many seconds, and Python
    handles no signal before the call returns. The process then ends without a message, so callers
    say before what Ctrl-C does.
    """
    caught = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    handlers = {n: signal.signal(n, signal.SIG_DFL) for n in caught}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def install_handler() -> None:
    """Raise KeyboardInterrupt at Ctrl-C; end the process if that takes over TIMEOUT.

    Python calls no handler before a call of MLX returns. Several signals in one call are one.
    After `signal.set_wakeup_fd(-1)` the process is not ended.
    """
    from select import select
    from threading import Event, Thread

    answered = Event()

    def on_signal(number, frame):
        answered.set()
        raise KeyboardInterrupt

    def watch():
        while os.read(read, 4096):
            if not answered.wait(TIMEOUT):
                os.write(2, b"stopped\n")
                os._exit(INTERRUPTED)
            while select([read], [], [], 0)[0]:
                os.read(read, 4096)
            answered.clear()

    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGINT, on_signal)
    Thread(target=watch, daemon=True).start()
