"""Arrays in .safetensors files, which may come from anyone."""

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from bdh_lib.errors import UserError
from bdh_lib.files import parse_json


def read_arrays(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read arrays and header of a .safetensors file. Raises UserError for a damaged or crafted one.

    Arrays must not overlap or leave bytes unused: the format demands it, and MLX does not check it.
    """
    if not _is_safetensors(file):
        raise UserError(f"{file} cannot be read: it is not a .safetensors file, or cut short")
    try:
        arrays, header = mx.load(str(file), format="safetensors", return_metadata=True)
        mx.eval(arrays)  # mx.load is lazy: read now, or a later change of the file is read
        with file.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
            entries = parse_json(start.read(size))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    spans = sorted(e["data_offsets"] for name, e in entries.items() if name != "__metadata__")
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    if [*begins, file.stat().st_size - 8 - size] != [0, *ends]:
        raise UserError(f"{file} cannot be read: its arrays overlap or leave gaps")
    return arrays, header


def _is_safetensors(file: Path) -> bool:
    """Test whether a file begins with the size of a JSON object, and the object."""
    try:
        with file.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
            brace = start.read(1)
        return brace == b"{" and size <= file.stat().st_size - 8
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def sha256_arrays(arrays: dict[str, mx.array], header: dict | None = None) -> str:
    """Return the sha256 of the arrays' names, shapes and numbers, and of the header."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode() if header else b"")
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape}".encode())
        digest.update(np.array(array + 0))  # a copy: CUDA would move the original to the host
    return digest.hexdigest()
