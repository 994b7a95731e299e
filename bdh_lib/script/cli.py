"""How a script starts and ends: its standard streams, errors as one line, the exit code.

This module imports nothing slow, so that a script is ready for Ctrl-C before it imports MLX.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location

from bdh_lib.script import compiler, failures, interrupts, limits

READER_GONE = 141  # exit code: 128 + SIGPIPE, as other programs end


class Output(io.TextIOWrapper):
    """Standard output or error that keeps the `error` of a failed write: argparse swallows it.

    Once it `ignores_errors`, it discards what nobody reads any more.
    """

    ignores_errors = False
    error = None

    def write(self, text: str) -> int:
        self._try(super().write, text)
        return len(text)

    def flush(self) -> None:
        self._try(super().flush)

    def _try(self, function, *args) -> None:
        try:
            function(*args)
        except OSError as error:
            if not self.ignores_errors:
                self.error = error
                raise
            redirect_to_devnull(self.fileno())
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):  # no reader that left
                lost = f"the output is lost ({error.strerror}); the run's metrics.jsonl has the log"
                print(f"warning: {lost}", file=sys.stderr)


def ignore_closed_output() -> None:
    """Go on without output when its reader is gone: a training run must not end with a terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output):  # not one of a test or a notebook
            stream.ignores_errors = True


def run(file: str):
    """Import the script `file`, call its main() and exit with the code that it returns.

    Codes besides: 2 for a mistake that the user can mend, 130 for Ctrl-C, 141 for a reader of the
    output that is gone.
    """
    if sys.platform == "win32":
        sys.exit("error: BDH-MLX runs on macOS and Linux; on Windows it runs in WSL")
    run_main(lambda: import_script(file).main(), file)


def run_main(main: Callable[[], int | None], file: str):
    """Call the main() of the script `file` and exit, as `run` does."""
    open_streams()
    compiler.ignore_empty_variables()
    try:
        try:
            limits.check_memory_limits()
            code = main()
        except SystemExit as error:  # argparse's, after --help or a mistake
            code = error.code
        sys.stdout.flush()
        if sys.stdout.error:
            raise sys.stdout.error
    except (KeyboardInterrupt, Exception) as error:
        code = report_error(lost_output(error) or error, file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the interpreter's own end
    sys.exit(code)


def open_streams() -> None:
    """Open closed standard streams on /dev/null, and escape what a terminal cannot show.

    A file that is opened later would get the number of a closed stream, which MLX takes for an
    error. A closed output is opened for reading, so that lost output is an error.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  open to the end
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = stream.detach() if stream else open(number, "wb", closefd=False)  # noqa: SIM115
        encoding = stream.encoding if stream else "utf-8"
        options = {"encoding": encoding, "errors": "backslashreplace", "line_buffering": True}
        setattr(sys, name, Output(raw, **options))
    sys.stderr.ignores_errors = True


def import_script(file: str):
    """Import the script as a module, in which Ctrl-C ends the process at once.

    There is no work to lose yet, and a library that is being imported may swallow the exception.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as by nohup
        return load_module(file)
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupts.INTERRUPTED))
    module = load_module(file)
    interrupts.install_handler()
    return module


def load_module(file: str):
    """Load the module in a file of any name, as users copy the trainer."""
    spec = spec_from_file_location("script", file)
    module = sys.modules["script"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lost_output(error: BaseException | None) -> OSError | None:
    """Return the failed write of stdout that led to `error`; None if there was none.

    Code that reads files catches every OSError, and may raise an error of its own for a failed
    write of stdout. So this function follows the chain of __context__.
    """
    while error and error is not sys.stdout.error:
        error = error.__context__
    return error


def report_error(error: BaseException, file: str) -> int:
    """Print to stderr in one line what ended the script, and return the exit code.

    An error that no user can mend keeps its traceback: it is a fault of this project.
    """
    if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has what it wanted
        redirect_to_devnull(1)
        return READER_GONE
    if error is sys.stdout.error:
        redirect_to_devnull(1)  # what waits in its buffer would fail again at the end
    if isinstance(error, KeyboardInterrupt):
        text, code = "stopped", interrupts.INTERRUPTED
    elif text := failures.error_line(error, file):
        text, code = f"error: {text}", getattr(error, "exit_code", 2)
    else:
        import traceback

        text, code = traceback.format_exc(), 1
    try:
        print(text, file=sys.stderr)
    except OSError:  # nobody reads
        redirect_to_devnull(2)
    return code


def redirect_to_devnull(number: int) -> None:
    """Send what is written to a file descriptor to /dev/null from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def version() -> str:
    """Return the text that --version prints."""
    import mlx.core as mx  # late, as all that a start need not wait for

    return f"BDH-MLX, mlx {mx.__version__}, python {sys.version.split()[0]}"
