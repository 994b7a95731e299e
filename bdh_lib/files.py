"""Paths, and files that are written whole: flushed, replaced at once, hashed."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:
    raise ImportError("BDH-MLX runs on macOS and Linux; on Windows it runs in WSL") from None

from bdh_lib.errors import UserError, escape_controls

MADE_BY = "BDH-MLX"  # stands at the beginning of pictures and traces, which may be made anew
MAX_STREAM = 10**8  # bytes of a pipe or a terminal; of a file its size is known


def fsync(path: Path) -> None:
    """Flush the file or folder to the drive itself; os.fsync alone stops at a Mac's drive cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    except (AttributeError, OSError):  # Linux has no such call; network drives and ZFS refuse it
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand_user(path: str | Path, name: str = "the path") -> Path:
    """Replace `~` in a path where a user has that name: Path.expanduser raises if none has.

    Every path of a user comes through here. Raises UserError, which calls it `name`, for an empty
    one and for one that MLX, which takes UTF-8 alone, could not open.
    """
    text = str(path)
    if not text:
        raise UserError(f"{name} is empty; is a variable of the shell not set?")
    if "\0" in text:
        raise UserError(f"{name} is {escape_controls(text)}; a path holds no NUL byte")
    if text != text.encode(errors="replace").decode():  # it holds what Python could not decode
        shown = escape_controls(text)
        raise UserError(f"{name} is {shown}: not UTF-8; rename it (or set LC_ALL=C.UTF-8)")
    return Path(os.path.expanduser(text))  # noqa: PTH111


def absolute(path: Path) -> Path:
    """Return the path from the root, without `..`. Unlike resolve() it accepts circular links."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def absence(path: Path) -> str:
    """Return why a path is not found: it does not exist, or is a link to nothing."""
    return "is a link that leads to nothing" if path.is_symlink() else "does not exist"


def read_input(path: Path, name: str) -> bytes:
    """Read a file, a pipe or a terminal. Raises UserError, also for a device, which may not end.

    `name` is the flag that names the path.
    """
    try:
        with path.open("rb") as file:  # opened first: on a Mac only then is /dev/stdin what it is
            kind = os.fstat(file.fileno()).st_mode
            if stat.S_ISCHR(kind) and not file.isatty():
                raise UserError(f"{name} {path} is a device; name a file or a pipe")
            return file.read() if stat.S_ISREG(kind) else read_stream(file, f"{name} {path}")
    except OSError as error:
        raise UserError(f"{name} {path}: {error.strerror}") from None


def read_stream(file: BinaryIO, name: str) -> bytes:
    """Read what may never end, a pipe or a terminal. Raises UserError past MAX_STREAM bytes."""
    content = file.read(MAX_STREAM + 1)
    if len(content) > MAX_STREAM:
        limit = f"more than {MAX_STREAM:,} bytes (MAX_STREAM in bdh_lib/files.py)"
        raise UserError(f"{name} gives {limit}; write them to a file and name it")
    return content


def parse_json(text: str | bytes):
    """Parse JSON. Raises ValueError, also for text that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def read_json_object(path: Path) -> dict:
    """Read the object in a JSON file; {} without a file. Raises UserError for other content."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def seal(content: dict) -> dict:
    """Return the content of a JSON file with its own sha256, for `is_sealed`."""
    return content | {"sha256": sha256_text(json.dumps(content))}


def is_sealed(content: dict) -> bool:
    """Tell whether the content of a JSON file is as `seal` returned it."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return content.get("sha256") == sha256_text(json.dumps(rest))


class NotWritten(UserError, OSError):
    """A file cannot be written. It is an OSError, too, for those who clean up after one."""


def write_fault(error: OSError | RuntimeError) -> str:
    """Return why something could not be written, and the cure where it is known."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, IsADirectoryError | FileExistsError):
        return f"{reason}; remove or rename it"
    return f"{reason} (is the disk full?)" if reason.startswith("[write]") else reason  # MLX's


def check_parent(path: Path, subject: str) -> None:
    """Raise UserError, which begins with `subject`, if no file can be made beside `path`."""
    if not os.access(path.parent, os.W_OK | os.X_OK):  # nor where it is a file
        raise UserError(f"{subject} {path.parent} is not a folder that can be written to")


def check_replaceable(path: Path, name: str) -> None:
    """Raise UserError if `path` cannot be written, or is a file that is not of this project.

    Its files are pictures and traces. `name` is the flag that names another file.
    """
    check_parent(path, f"{name} {path}:")
    if not os.path.isfile(path):  # noqa: PTH113  which raises nothing
        return
    with path.open("rb") as file:
        start = file.read(200)
    is_ours = start.startswith((b"\x89PNG", b'{"made_by"')) and MADE_BY.encode() in start
    if start and not is_ours:
        raise UserError(f"{path} was not written by BDH-MLX; name another file with {name}")


def temporary_name(name: str, process: int | str) -> str:
    """Return the name under which a process writes a file that then gets its own `name`."""
    return f".{name}.{process}.tmp{Path(name).suffix}"


@contextmanager
def atomic_writer(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which then replaces `path`: readers find old or new content.

    `durable` flushes both to the disk. Raises NotWritten; after an error the new file is removed.
    """
    requested = path
    path = Path(os.path.realpath(path))
    special = os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113  a device
    temporary = path if special else path.with_name(temporary_name(path.name, os.getpid()))
    try:
        yield temporary
        if durable:
            fsync(temporary)
        if not special:
            temporary.replace(path)
        if durable:
            fsync(path.parent)
    except BaseException as error:
        if not special:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        is_user_error = isinstance(error, UserError)
        if isinstance(error, OSError | RuntimeError) and not is_user_error:  # RuntimeError: MLX's
            raise NotWritten(f"{requested} cannot be written: {write_fault(error)}") from None
        raise


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a small file by `text`, on the disk itself. Raises NotWritten."""
    with atomic_writer(path, durable=True) as temporary:
        temporary.write_text(text)
