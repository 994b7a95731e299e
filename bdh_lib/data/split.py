"""A side of a data set in bytes; which records validate, and how both sides are written."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdh_lib.data.formats import FIELDS, SEPARATOR
from bdh_lib.files import sha256_file
from bdh_lib.progress import counted

ENDS = "{side}_ends.npy"  # in prepared data: where each record of train.bin or val.bin ends


@dataclass(frozen=True, eq=False)  # equal by identity: epochs are cached by it
class Split:
    """Records as bytes: uint8 arrays of one length.

    A split is one side, as in Hugging Face's `datasets`: training or validation, or all the records
    where nothing is held out.
    """

    bytes: np.ndarray
    fields: np.ndarray  # of each byte its place in FIELDS
    record_ends: np.ndarray | None = None  # after SEPARATOR; None: not known, or none to shuffle

    def field_names(self) -> set[str]:
        """Return the names of the fields that occur."""
        return {FIELDS[i] for i in np.unique(self.fields)}


def choose_validation(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which records are held out for validation: a seeded draw of about `share` of them.

    `keys` (3, records) are digests of each record's system text, instruction and all turns, 0 for
    none. The result is a bool for each record.

    Half are drawn by whole system texts (or instructions, where systems are too few or none), with
    all their records, since modes that train on one field need texts of it seen nowhere else; the
    rest by all fields. A text of more records than there is room for is never drawn.
    """
    rng = np.random.default_rng(seed)
    in_val = np.zeros(keys.shape[1], bool)
    for key, key_share in zip(keys, (share / 2, share / 2, share), strict=True):
        texts, text_of_record = np.unique(key, return_inverse=True)
        n_new = np.bincount(text_of_record, ~in_val)  # records that each text would add
        n_wanted = round(key_share * np.count_nonzero(key)) - in_val.sum()
        order = rng.permutation(len(texts))
        order = order[(n_new[order] <= n_wanted) & (texts[order] != 0)]
        in_val |= np.isin(text_of_record, order[np.cumsum(n_new[order]) <= n_wanted])
    if not in_val.any():  # few records: a share of them is none, but one text must be
        in_val = text_of_record == rng.integers(len(texts))
    return in_val


def write_sides(folder: Path, lengths: np.ndarray, train: np.ndarray, val: np.ndarray) -> dict:
    """Write the texts of these numbers to train and val, in their order, and return the report.

    Its "records" counts texts: a chat may have several.
    """
    sides = {"train": train, "val": val}
    report = {side: {"records": len(which)} for side, which in sides.items()}
    begins = np.cumsum(lengths) - lengths
    for kind in ("bin", "fields"):
        with (folder / f"all.{kind}").open("rb") as records:
            for side, which in sides.items():
                parts = zip(begins[which].tolist(), lengths[which].tolist(), strict=True)
                size, digest = _copy_parts(records, parts, folder / f"{side}.{kind}")
                name = "sha256" if kind == "bin" else "fields_sha256"
                report[side] |= {"bytes": size, name: digest}
        (folder / f"all.{kind}").unlink()
    for side, which in sides.items():
        file = folder / ENDS.format(side=side)
        np.save(file, np.cumsum(lengths[which], dtype=np.int64))
        report[side]["ends_sha256"] = sha256_file(file)
    return report


def _copy_parts(source, parts: Iterable, target: Path) -> tuple[int, str]:
    """Write the parts (begin, length) of `source` to a file; gives its size and its sha256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for begin, length in counted(parts, f"writing {target.stem}", "records"):
            source.seek(begin)
            piece = source.read(length)
            out.write(piece)
            digest.update(piece)
        return out.tell(), digest.hexdigest()


def record_ends(folder: Path, side: str) -> np.ndarray | None:
    """Return where each record of a side ends, after its SEPARATOR; None for a ready split."""
    file = folder / ENDS.format(side=side)
    return np.load(file) if file.is_file() else None


def last_fields(fields: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the field of each record's last byte, which is before its SEPARATOR."""
    return fields[ends - len(SEPARATOR) - 1]


def bytes_to_evaluate(ends: np.ndarray | None, limit: int | None) -> int | None:
    """Return how many bytes of val.bin an evaluation reads, None for all.

    They are whole records, at least one, of up to `limit` bytes. `ends` is what record_ends gives;
    where it is None, they are `limit` bytes.
    """
    if limit is None or ends is None:
        return limit
    whole_ones = int(np.searchsorted(ends, limit, side="right"))
    return int(ends[max(0, whole_ones - 1)])


def has_field(fields: np.ndarray, name: str) -> bool:
    """Tell whether any byte is of this field; `fields` may be larger than the memory."""
    field = FIELDS.index(name)
    n = 10**6  # bytes looked at together
    return any(field in fields[i : i + n] for i in range(0, len(fields), n))
