"""Stop a run cleanly at SIGINT, SIGTERM or SIGHUP."""

import os
import signal
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import Thread

from bdh_lib.script.interrupts import SIGNALS, default_signals
from bdh_lib.training.distributed import World

SIGNAL_NOTE = "Ctrl-C ends it at once; nothing saved is lost, and the same command starts again"


class StopSignal:
    """Stop at SIGINT, SIGTERM or SIGHUP: at the next safe point, with the work saved.

    A second signal, or one that comes before there is work to save, ends the process at once.
    `requested` is the number of the signal to stop for, 0 before any. One of several processes
    notes a signal in `received` alone: they stop together, at the next `sync`. The loop sets
    `has_work_to_save` after its first step.
    """

    def __init__(self, world: World):
        self.requested = 0
        self.received = 0
        self.has_work_to_save = False
        self.world = world

    def __enter__(self):
        caught = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
        self.handlers = {n: signal.signal(n, self.on_signal) for n in caught}
        read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        signal.set_wakeup_fd(self.write)
        Thread(target=self.watch, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.write)

    def on_signal(self, number, frame):
        """Note a signal; one of several processes stops only with the others, in `sync`."""
        self.received = number
        if self.world.size == 1:
            self.requested = number

    def watch(self, read: int) -> None:
        """Answer each signal in a thread, since Python calls no handler while MLX computes."""
        n_signals = 0
        while number := os.read(read, 1):
            n_signals += 1
            if n_signals > 1 or not self.has_work_to_save:
                why = "before there was new work to save"
                if n_signals > 1:
                    why = "at the second signal"
                with suppress(OSError):  # nobody reads
                    os.write(2, f"stopped {why}\n".encode())
                os._exit(128 + number[0])  # nothing saved can be lost by this
            with suppress(OSError):
                os.write(2, b"stopping, once the last finished iteration is saved\n")
        os.close(read)

    def while_tracing(self) -> AbstractContextManager:
        """Return a context for a call that MLX may trace: default_signals before there is work."""
        return nullcontext() if self.has_work_to_save else default_signals()

    def sync(self):
        """Share the signal that any process received; all of them call it at once."""
        if self.world.size > 1:
            self.requested = max(self.world.all_gather_object(self.received))
