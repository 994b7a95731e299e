"""Turn an exception that ended a script into one line with its cure."""

import sys

from bdh_lib.script import compiler, limits

REQUIRED = ("mlx", "mlx.core", "numpy", "tqdm")  # what is imported before main()
NO_MEMORY = (  # in errors of the loader, NumPy, MLX, CUDA and Python, in any case
    *("out of memory", "failed to map segment", "Cannot allocate memory", "Unable to allocate"),
    *("bad_alloc", "start new thread"),
)


def error_line(error: BaseException, file: str) -> str:
    """Return what went wrong and its cure in one line; nothing for a fault of this project."""
    from bdh_lib.errors import UserError, escape_controls  # late: a start need not wait for it

    kinds = (compiler.error_line, memory_line, gpu_line, package_line, system_line)
    text = str(error) if isinstance(error, UserError) else ""
    text = text or next(filter(None, (kind(error) for kind in kinds)), "")
    if not text and (line := script_line(error, file)):
        text = f"{file.rpartition('/')[2]} line {line}: {type(error).__name__}: {error}"
    return escape_controls(" ".join(text.split()))


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
