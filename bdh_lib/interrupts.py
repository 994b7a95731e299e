"""The signals that end a script, and a context in which the system obeys them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

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
