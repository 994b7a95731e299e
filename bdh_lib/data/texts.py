"""The training texts of all records of a data set, written to two files, and a report of them."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bdh_lib.data import columns, sources
from bdh_lib.data.describe import cannot_serve
from bdh_lib.data.formats import FIELDS, SEPARATOR, Turns, needed_fields, training_texts
from bdh_lib.errors import NoDataError

PIECE = 10**6  # characters of a record that are hashed at once
MAX_NAMES = 20  # of structures and of columns in a report, where each record has its own


class Texts(NamedTuple):
    """The texts of a mode, as they lie one after the other in all.bin, and their records."""

    report: dict  # the counts of Tally, and what was read
    lengths: np.ndarray  # of each text, in bytes, SEPARATOR included
    digests: np.ndarray  # of each text, 64 bits
    counts: np.ndarray  # of each record with a turn: the number of its texts
    keys: np.ndarray  # (3, records): digests of system, instruction and all turns, 0 for none
    in_val: np.ndarray  # of each such record: whether its part of the data is the validation


class Formatted(NamedTuple):
    """The training texts of a record in a mode, or why it has none."""

    texts: list[Turns]
    left_out: Sequence[str] = ()  # a reason for each turn that is in no text
    skipped: str | None = None


@dataclass
class Tally:
    """Counts of what records hold, and of what of them is not trained on."""

    structures: Counter = field(default_factory=Counter)  # records, by what parse_record names them
    skipped: Counter = field(default_factory=Counter)  # records without a text, by the reason
    first_skipped: dict = field(default_factory=dict)  # by the reason, the record's number from 1
    left_out: Counter = field(default_factory=Counter)  # turns that are in no text, by the reason
    records: Counter = field(default_factory=Counter)  # with a turn of it, by the field
    turns: Counter = field(default_factory=Counter)  # by the field
    characters: Counter = field(default_factory=Counter)  # of these turns, by the field
    seen_columns: set = field(default_factory=set)  # names in the records
    read_columns: set = field(default_factory=set)  # names that COLUMNS or an alias chose
    unused: Counter = field(default_factory=Counter)  # records, by the name of a column not read
    unused_bytes: Counter = field(default_factory=Counter)  # of its values, by the name
    n_bytes: int = 0  # of the turns
    n_texts: int = 0
    without_system: int = 0  # records of mode `full` without a system text
    several_turns: int = 0  # records of mode `full` with more than one response

    def add(self, record, parsed: columns.Parsed, formatted: Formatted, mode: str) -> None:
        """Count one record and what of it is skipped or left out in `mode`."""
        self.structures[parsed.structure] += 1
        self.n_texts += len(formatted.texts)
        for reason in chain(parsed.left_out, formatted.left_out):
            self.left_out[reason] += 1
        for name, text in parsed.turns:
            self.turns[name] += 1
            self.characters[name] += len(text)
            self.n_bytes += len(text) if text.isascii() else len(text.encode())
        self.read_columns.update(parsed.columns)
        for name in dict.fromkeys(name for name, _ in parsed.turns):
            self.records[name] += 1
        if isinstance(record, dict):
            self.seen_columns.update(columns.with_nested(record))
        for name, size in columns.unused_values(record, parsed).items():
            self.unused[name] += 1
            self.unused_bytes[name] += size
        if formatted.skipped:
            self.skipped[formatted.skipped] += 1
            self.first_skipped.setdefault(formatted.skipped, self.structures.total())
        elif mode == "full" and parsed.kind != "text":
            fields = [name for name, _ in formatted.texts[0]]
            self.without_system += "system" not in fields
            self.several_turns += fields.count("response") > 1

    def report(self) -> dict:
        """Return the counts, as data.json keeps them."""
        fields = {
            name: {
                "records": n,
                "texts": self.turns[name],
                "mean_length": self.characters[name] / self.turns[name],
            }
            for name, n in self.records.items()
        }
        unused = {
            name: {"records": self.unused[name], "bytes": size}
            for name, size in self.unused_bytes.most_common(MAX_NAMES)
        }
        return {
            "records": self.structures.total(),
            "texts": self.n_texts,
            "structures": dict(self.structures.most_common(MAX_NAMES)),
            "fields": fields,
            "skipped": dict(self.skipped.most_common()),
            "first_skipped": self.first_skipped,
            "left_out": dict(self.left_out.most_common(MAX_NAMES)),
            "unused": unused,
            "bytes_read": self.n_bytes + self.unused_bytes.total(),
            "without_system": self.without_system,
            "several_turns": self.several_turns,
        }


def format_record(parsed: columns.Parsed, mode: str) -> Formatted:
    """Format a record in a mode.

    Mode `full` leaves out a record with a broken system text, and keeps one without a system text.
    """
    present = {name for name, _ in parsed.turns}
    for name in ("text",) if parsed.kind == "text" else needed_fields(mode):
        if name not in present:
            return Formatted([], (), parsed.reason(name))
    if mode == "full" and parsed.is_broken("system"):
        return Formatted([], (), parsed.reason("system"))
    texts, left_out = training_texts(parsed.turns, mode)
    if not texts:
        return Formatted([], (), "system missing before the instruction")
    return Formatted(texts, left_out)


def write_texts(
    source: sources.Source, mode: str, folder: Path, columns_setting: str | None
) -> Texts:
    """Write the texts that the records have in a mode to all.bin and all.fields.

    Raises UserError if there is no text.
    """
    tally = Tally()
    lengths, digests, keys = array("Q"), array("Q"), array("Q")  # 64 bits each
    counts, in_val = array("I"), array("B")
    with (folder / "all.bin").open("wb") as out, (folder / "all.fields").open("wb") as labels:
        for part, record in sources.read_parts(source):
            parsed = columns.parse_record(record, columns_setting)
            formatted = format_record(parsed, mode)
            tally.add(record, parsed, formatted, mode)
            for text in formatted.texts:
                length, digest = _write_text([*text, ("", SEPARATOR)], out, labels)
                lengths.append(length)
                digests.append(digest)
            if parsed.turns:
                keys.extend(_record_keys(parsed.turns))
                counts.append(len(formatted.texts))
                in_val.append(part == "val")
    report = {"dataset": source.dataset, "mode": mode, **tally.report()}
    report["not_read"] = list(source.left_out)
    _check_columns(columns_setting, tally.seen_columns)
    columns.check_read(columns_setting, tally.read_columns, tally.unused)
    if not lengths:
        raise NoDataError(cannot_serve(report))
    keys = np.array(keys, np.uint64).reshape(-1, 3).T
    lengths, digests, counts = map(np.array, (lengths, digests, counts))
    return Texts(report, lengths, digests, counts, keys, np.array(in_val, bool))


def _check_columns(columns_setting: str | None, names: set[str]) -> None:
    """Raise NoDataError if COLUMNS names a column that no record has."""
    lower = {name.strip().lower() for name in names}
    for column in columns.parse_columns_setting(columns_setting).values():
        if column and column.lower() not in lower:
            shown = ", ".join(sorted(names)[:MAX_NAMES]) or "none"
            raise NoDataError(f"COLUMNS names {column!r}, which no record has; they have: {shown}")


def _write_text(text: Turns, out: BinaryIO, labels: BinaryIO) -> tuple[int, int]:
    """Write a text and the field of each of its bytes; its length in bytes and its digest."""
    length = 0
    digest = hashlib.blake2b(digest_size=8)
    for name, piece in text:
        part = piece.encode()
        out.write(part)
        digest.update(part)
        n = len(part)
        del part  # a record may be large
        labels.write(bytes([FIELDS.index(name)]) * n)
        length += n
    return length, int.from_bytes(digest.digest())


def _record_keys(turns: Turns) -> list[int]:
    """Return the digests of a record's first system text, first instruction, and all turns."""
    first = dict(reversed(turns))
    keys = (first.get("system"), first.get("instruction"), sorted(turns))
    return [_digest(key) if key else 0 for key in keys]


def _digest(key: str | Turns) -> int:
    """Return the 64-bit blake2b of json.dumps(key), fed in pieces: a record may be large."""
    digest = hashlib.blake2b(digest_size=8)
    texts = [key] if isinstance(key, str) else [text for pair in key for text in pair]
    if sum(map(len, texts)) <= PIECE:
        digest.update(json.dumps(key).encode())
        return int.from_bytes(digest.digest())
    joints = ['"', '"']
    if not isinstance(key, str):
        joints = ['[["', *(['", "', '"], ["'] * len(key))[:-1], '"]]']
    for joint, text in zip(joints, [*texts, ""], strict=True):
        digest.update(joint.encode())
        for i in range(0, len(text), PIECE):
            digest.update(json.dumps(text[i : i + PIECE])[1:-1].encode())
    return int.from_bytes(digest.digest())
