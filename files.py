"""Paths, and files on which others rely: flushed, replaced at once, compared by their bytes."""

import hashlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:
    raise ImportError("BDH-MLX runs on macOS and Linux; on Windows it runs in WSL") from None

from errors import UserError


def flush(path: Path) -> None:
    """Have the drive itself keep the file or folder; fsync alone stops at a Mac's drive cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(path: str | Path) -> Path:
    """The path with `~` replaced, where a user is known by that name: Path's own raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Replace a small file at once: a reader finds the old or the new content, never a part."""
    making = path.with_name(f".{path.name}.tmp")
    try:
        making.write_text(text)
        flush(making)
        making.replace(path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; it is as it was") from None
