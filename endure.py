"""What lets a run outlive signals and closed terminals."""

import io
import os
import signal

from processes import Processes


class Stop:
    """On SIGINT, SIGTERM or SIGHUP: leave at the next safe point, with the work saved; on a second
    one at once, which loses nothing that was saved. `number` is the signal's, 0 before any. One of
    several processes only notes it in `heard`: they leave together, at the next `agree`.
    """

    def __init__(self, processes: Processes):
        self.number, self.heard, self.can_wait, self.processes = 0, 0, False, processes

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [n for n in signals if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
        self.before = {n: signal.signal(n, self.on_signal) for n in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        if self.heard:
            os._exit(128 + number)
        self.heard = number
        if self.processes.size == 1:
            self.number = number
        if not self.can_wait:  # nothing trained yet
            raise SystemExit(128 + number)

    def agree(self):
        """Take over what any process has heard; called by all of them at once."""
        if self.processes.size > 1:
            self.number = max(self.processes.gather(self.heard))


class Enduring(io.TextIOWrapper):
    """Output that outlives its reader: a closed pipe or terminal must not end the training."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)
