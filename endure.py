"""What lets a run outlive signals and closed terminals."""

import io
import os
import signal


class Stop:
    """On SIGINT, SIGTERM or SIGHUP: leave at the next safe point, with the work saved; on a second
    one at once, which loses nothing that was saved. `number` is the signal's, 0 before any.
    """

    def __init__(self):
        self.number, self.can_wait = 0, False

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [n for n in signals if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
        self.before = {n: signal.signal(n, self.on_signal) for n in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
        if not self.can_wait:  # nothing trained yet
            raise SystemExit(128 + number)


class Enduring(io.TextIOWrapper):
    """Output that outlives its reader: a closed pipe or terminal must not end the training."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)
