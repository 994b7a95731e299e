"""How a script starts and ends: its standard streams, errors as one line, the exit code.

This module imports nothing slow, so that a script is ready for Ctrl-C before it imports MLX.
"""

import io
import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location

from bdh_lib import limits

INTERRUPT_TIMEOUT = 1.0  # seconds that Ctrl-C waits for the interpreter, which MLX may hold
REQUIRED = ("mlx", "mlx.core", "numpy", "tqdm")  # what is imported before main()
NOT_COMPILED = ("[Compile::eval_cpu]", "shared library")  # in errors of MLX's compiler for the CPU
NOT_STORED = ("No space left", "shared library", "quota")  # in those that are the folder's fault
GET_COMPILER = "apt install g++ (or your system's package of it)"
NO_MEMORY = (  # in errors of the loader, NumPy, MLX, CUDA and Python, in any case
    *("out of memory", "failed to map segment", "Cannot allocate memory", "Unable to allocate"),
    *("bad_alloc", "start new thread"),
)
TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # variables that MLX takes in turn
TEMPORARY_SPACE = 1_000_000  # bytes that a first compile may take in the temporary folder
INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 141  # 141: 128 + SIGPIPE, as other programs end


class Interrupts:
    """Whether Ctrl-C ends a process that does not answer it within INTERRUPT_TIMEOUT."""

    end_the_process = True


class Output(io.TextIOWrapper):
    """Standard output or error that keeps the `error` of a failed write: argparse swallows it.

    Once it `ignores_errors`, it writes to nowhere where its reader is gone.
    """

    ignores_errors, error = False, None

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
    open_streams()
    for name in TEMPORARY:
        if os.environ.get(name) == "":  # it is not a value, but MLX would take it for one
            del os.environ[name]
    try:
        try:
            limits.check_memory_limits()
            code = import_script(file).main()
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
    """Open the standard streams that are closed, and show any character on any terminal.

    A closed one is /dev/null, and not writable where output would be lost: a file that is opened
    later would get its number, which MLX takes for an error.
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
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    module = load_module(file)
    install_interrupt_handler()
    return module


def load_module(file: str):
    """Load the module in a file of any name, as users copy the trainer; or return a loaded one."""
    if file in sys.modules:
        return sys.modules[file]
    spec = spec_from_file_location("script", file)
    module = sys.modules["script"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install_interrupt_handler() -> None:
    """Raise KeyboardInterrupt at Ctrl-C; end the process if that takes over INTERRUPT_TIMEOUT.

    Python calls no handler before a call of MLX returns. Several signals in one call are one.
    """
    from select import select
    from threading import Event, Thread

    answered = Event()

    def on_signal(number, frame):
        answered.set()
        raise KeyboardInterrupt

    def watch():
        while os.read(read, 4096):
            if not answered.wait(INTERRUPT_TIMEOUT) and Interrupts.end_the_process:
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
        text, code = "stopped", INTERRUPTED
    elif text := error_line(error, file):
        text, code = f"error: {text}", getattr(error, "exit_code", 2)
    else:
        import traceback

        text, code = traceback.format_exc(), 1
    try:
        print(text, file=sys.stderr)
    except OSError:  # nobody reads
        redirect_to_devnull(2)
    return code


def error_line(error: BaseException, file: str) -> str:
    """Return what went wrong and its cure in one line; nothing for a fault of this project."""
    from bdh_lib.errors import UserError, escape_controls  # late: a start need not wait for it

    kinds = (compiler_line, memory_line, gpu_line, package_line, system_line)
    text = str(error) if isinstance(error, UserError) else ""
    text = text or next(filter(None, (kind(error) for kind in kinds)), "")
    if not text and (line := script_line(error, file)):
        text = f"{file.rpartition('/')[2]} line {line}: {type(error).__name__}: {error}"
    return escape_controls(" ".join(text.split()))


def compiler_line(error: BaseException) -> str:
    """Describe an error of MLX's compiler for the CPU, g++, or of loading what it compiled."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in NOT_COMPILED):
        return ""
    fault = temporary_folder_fault()
    if not fault and any(sign in text for sign in NOT_STORED):
        fault = f"look at {temporary_folder()[1]}"  # full for a moment, or mounted noexec
    cure = f"{fault}; set TMPDIR to another folder" if fault else f"repair g++: {GET_COMPILER}"
    return f"MLX cannot compile: {text[-200:]}; {cure}"  # before it is a compiler's long command


def memory_line(error: BaseException) -> str:
    """Describe memory that is out, of whichever library: each of them has its own error."""
    text = " ".join(str(error).split())
    signs = [sign for sign in NO_MEMORY if sign.lower() in text.lower()]
    is_memory = isinstance(error, RuntimeError | ImportError | OSError) and signs
    if not isinstance(error, MemoryError) and not is_memory:
        return ""
    what = "no thread can be started" if signs == ["start new thread"] else "memory is out"
    detail = f": {text}" if text and len(text) < 200 else ""  # NumPy's is a page
    sizes = [f"`{command}` allows {size:,} bytes" for command, size, _ in limits.memory_limits()]
    cure = f"; {', '.join(sizes)}: raise that limit" if sizes else ""
    return f"{what}{detail}{cure or '; close other programs, or take a smaller model or batch'}"


def gpu_line(error: BaseException) -> str:
    """Describe a fault of a Mac's GPU."""
    if not isinstance(error, RuntimeError) or not str(error).lower().startswith("[metal"):
        return ""
    return f"{error}; close other programs, let the display sleep, and start again (docs/mac.md)"


def package_line(error: BaseException) -> str:
    """Describe a package that is not installed."""
    is_missing = isinstance(error, ModuleNotFoundError) and error.name in REQUIRED
    return f"{error}; pip install -r requirements.txt" if is_missing else ""


def system_line(error: BaseException) -> str:
    """Describe an error of the operating system, as of a file or of the output."""
    if not isinstance(error, OSError):
        return ""
    reason = error.strerror or str(error)
    if error is sys.stdout.error:
        return f"the output: {reason}"
    if isinstance(error, FileNotFoundError) and not error.filename:  # os.getcwd names no file
        return "the current folder has been deleted; go to another one (cd)"
    return f"{error.filename}: {reason}" if error.filename else reason


def script_line(error: BaseException, file: str) -> int | None:
    """Return the line of the script, outside its functions, that led to `error`: a setting."""
    entry = error.__traceback__
    while entry:
        code = entry.tb_frame.f_code
        if code.co_name == "<module>" and code.co_filename == file:
            return entry.tb_lineno
        entry = entry.tb_next
    return None


def redirect_to_devnull(number: int) -> None:
    """Send what is written to a file descriptor to /dev/null from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def version() -> str:
    """Return the text that --version prints."""
    import mlx.core as mx  # late, as all that a start need not wait for

    return f"BDH-MLX, mlx {mx.__version__}, python {sys.version.split()[0]}"


def temporary_folder() -> tuple[str | None, str]:
    """Return the folder to which MLX writes what it compiles, and the variable that names it."""
    name = next((name for name in TEMPORARY if name in os.environ), None)
    return name, os.environ[name] if name else "/tmp"


def temporary_folder_fault() -> str:
    """Return why MLX could not write what it compiles; nothing where it could."""
    import tempfile

    name, folder = temporary_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TEMPORARY_SPACE))
    except OSError as error:
        subject = f"{name} is {folder}" if name else folder
        return f"{subject}, where {TEMPORARY_SPACE:,} bytes cannot be written ({error.strerror})"
    return ""


def check_compiler() -> None:
    """Raise UserError where MLX could not write what it compiles, and has compiled nothing yet.

    Warn where it may have compiled all that is needed, and where it has no compiler.
    """
    from pathlib import Path
    from shutil import which

    import mlx.core as mx  # late, as all that a start need not wait for

    from bdh_lib.errors import UserError, warn

    if sys.platform == "linux" and mx.default_device() == mx.cpu and not which("g++"):
        warn(f"without the compiler g++ MLX computes more slowly; {GET_COMPILER}")
        return
    if not (fault := temporary_folder_fault()):
        return
    compiled = Path(temporary_folder()[1], "mlx", mx.__version__)
    if not any(compiled.glob("*/*")):
        raise UserError(f"{fault}; set TMPDIR to another folder")
    warn(f"{fault}; what MLX compiled there before is used")
