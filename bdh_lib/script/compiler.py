"""MLX's compiler for the CPU: g++, and the temporary folder in which MLX keeps what it compiled."""

import os
import sys

NOT_COMPILED = ("[Compile::eval_cpu]", "shared library")  # in errors of the compiler
NOT_STORED = ("No space left", "shared library", "quota")  # in those that are the folder's fault
GET_COMPILER = "apt install g++ (or your system's package of it)"
TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # variables that MLX takes in turn
TEMPORARY_SPACE = 1_000_000  # bytes that a first compile may take in the temporary folder


def ignore_empty_variables() -> None:
    """Unset the variables of the temporary folder that are empty: MLX takes them for a folder."""
    for name in TEMPORARY:
        if os.environ.get(name) == "":
            del os.environ[name]


def temporary_folder() -> tuple[str | None, str]:
    """Return the folder to which MLX writes what it compiles, after the variable that names it."""
    name = next((name for name in TEMPORARY if name in os.environ), None)
    return name, os.environ[name] if name else "/tmp"


def temporary_folder_fault() -> str:
    """Return why MLX could not write what it compiles; nothing if it could."""
    import tempfile

    name, folder = temporary_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TEMPORARY_SPACE))
    except OSError as error:
        subject = f"{name} is {folder}" if name else folder
        return f"{subject}, where {TEMPORARY_SPACE:,} bytes cannot be written ({error.strerror})"
    return ""


def check() -> None:
    """Raise UserError if MLX could not write what it compiles, and has compiled nothing yet.

    Warn if it may have compiled all that is needed, or has no compiler.
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


def error_line(error: BaseException) -> str:
    """Describe an error of MLX's compiler for the CPU, g++, or of loading what it compiled."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in NOT_COMPILED):
        return ""
    fault = temporary_folder_fault()
    if not fault and any(sign in text for sign in NOT_STORED):
        fault = f"look at {temporary_folder()[1]}"  # full for a moment, or mounted noexec
    cure = f"{fault}; set TMPDIR to another folder" if fault else f"repair g++: {GET_COMPILER}"
    return f"MLX cannot compile: {text[-200:]}; {cure}"  # before it is a compiler's long command
