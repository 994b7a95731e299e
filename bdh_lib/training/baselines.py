"""What bits per byte mean: gzip, xz and models that count bytes, on the same records.

python baselines.py train.bin val.bin
"""

import gzip
import lzma
import sys
from pathlib import Path

import numpy as np


def order_n(train: np.ndarray, val: np.ndarray, order: int = 3) -> float:
    """Mean bits per byte of val under byte counts of train, in contexts of up to `order` bytes.

    Witten-Bell: p_k(b | c) = (count(c b) + followers(c) p_{k-1}(b | c')) / (count(c) +
    followers(c)), with c' one byte shorter, followers the number of distinct bytes seen after c,
    and p_{-1} = 1/256. The first `order` bytes of val are context only; a val without more bytes
    costs 8 bits, as of a model that knows nothing.
    """
    n = len(val) - order
    if n < 1:
        return 8.0
    p = np.full(n, 1 / 256)
    for k in range(order + 1):
        seen, asked = (_windows(stream, k + 1) for stream in (train, val))
        asked = asked[order - k :]
        grams, counts = np.unique(seen, return_counts=True)
        contexts, first, followers = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        count = _look_up(grams, counts, asked)
        total, distinct = (_look_up(contexts, t, asked >> 8) for t in (totals, followers))
        p = np.where(total > 0, (count + distinct * p) / np.maximum(total + distinct, 1), p)
    return float(-np.log2(p).mean())


def _windows(stream: np.ndarray, width: int) -> np.ndarray:
    """Every `width` bytes in a row as one number."""
    n = max(0, len(stream) - width + 1)
    number = np.zeros(n, np.uint64)
    for i in range(width):
        number = (number << np.uint64(8)) | stream[i : n + i]
    return number.astype(np.int64)


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each key asked for, 0 for one that is not there."""
    if not len(keys):
        return np.zeros(len(asked), int)
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def bits_per_byte(train: bytes, val: bytes) -> dict[str, float]:
    """Of each baseline on val; `xz after train` is what val adds to the packed train."""
    packed = {"gzip": gzip.compress(val, 9), "xz": _xz(val)}
    found = {name: 8 * len(data) / len(val) for name, data in packed.items()}
    found["xz after train"] = 8 * (len(_xz(train + val)) - len(_xz(train))) / len(val)
    found["order 3"] = order_n(*(np.frombuffer(side, np.uint8) for side in (train, val)))
    return found


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    for name, bits in bits_per_byte(*(Path(file).read_bytes() for file in sys.argv[1:3])).items():
        print(f"{name:<16}{bits:.3f} bits per byte")
