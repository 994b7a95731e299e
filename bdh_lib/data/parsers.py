"""From a file to its records, one at a time: JSON, CSV, text, Parquet, Arrow; compressed or not."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, dropwhile, groupby, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bdh_lib.data.chats import is_chat
from bdh_lib.data.columns import choose_columns
from bdh_lib.errors import UserError

BOMS = {  # byte order marks, the longer ones first
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PARQUET = b"PAR1\x15"
WEB_PAGE = "a web page: download the file itself"
SIGNATURES = {  # how files start that are not what their name says, and what to do
    b"version https://git-lfs": "a pointer of Git LFS and no data: run `git lfs pull`",
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save it as CSV",
    b"\x1f\x8b": "compressed: unpack it, or put .gz after its name",
    b"\x28\xb5\x2f\xfd": "compressed: unpack it, or put .zst after its name",
    PARQUET: "a Parquet file: name it .parquet",
    b"%PDF-": "a PDF: save its text as .txt",
    b"<!doctype html": WEB_PAGE,
    b"<!DOCTYPE html": WEB_PAGE,
    b"<html": WEB_PAGE,
}
NOT_UTF8, NOT_JSON, NOT_AN_OBJECT = "not valid UTF-8", "not JSON", "not a JSON object"
TEXTS = re.compile(r'\[\s*"')  # how a list of texts begins
MARKDOWN_RULE = re.compile(r"\|?( *:?-+:? *(\||$))+")  # below the header of a table
LARGEST_ROW = 64_000_000  # characters of a row of a table that takes several lines


def file_kind(file: Path) -> str:
    """Return the suffix that says how a file is read, in small letters; for a.csv.gz: .csv."""
    if file.suffix.lower() in COMPRESSED:
        file = file.with_suffix("")
    return file.suffix.lower()


def read_file(file: Path) -> Iterator[dict | list | str]:
    """Yield the records of a file; a str says why one is unreadable. Raises UserError."""
    kind, encoding = file_kind(file), Encoding()
    try:
        with COMPRESSED.get(file.suffix.lower(), Path.open)(file, "rb") as raw:
            _check_signature(raw, kind)
            if kind in TABLES:
                yield from _arrow_rows(raw, kind)
                return
            with _open_text(raw, encoding) as lines:
                yield from PARSERS[kind](lines, encoding)
    except Exception as error:  # parsers raise errors of many kinds
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:300]
        if isinstance(cause, UnicodeDecodeError):
            reason = f"it is not a whole {cause.encoding}; save it as UTF-8"
        raise UserError(f"DATASET {file} cannot be read as {kind}: {reason}") from None
    if encoding.is_not_utf8:
        raise UserError(f"DATASET {file} {encoding.advice(file)}")


def _check_signature(raw: BinaryIO, kind: str) -> None:
    """Raise ValueError for a file that is of another kind than its name says.

    A web page may be named as text.
    """
    start = raw.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    for signature, what in SIGNATURES.items():
        is_text = what == WEB_PAGE and kind in (".txt", ".md")
        is_as_named = signature == PARQUET and kind == ".parquet"
        if start.startswith(signature) and not is_text and not is_as_named:
            raise ValueError(f"it is {what}")


# --------------------------------------------------------------------------------------- encodings


class Encoding:
    """The encoding of the lines of a file: UTF-8, or what a byte order mark names.

    Bytes that are not UTF-8 come as lone surrogates, which no valid UTF-8 holds.
    """

    def __init__(self):
        self.n_invalid = 0
        self.sample = ""
        self.has_valid_non_ascii = False

    def is_valid(self, text: str) -> bool:
        """Tell whether a text is valid UTF-8, and note what it says of the file."""
        if text.isascii():
            return True
        try:
            text.encode()
        except UnicodeEncodeError:
            self.n_invalid += 1
            self.sample = self.sample or text
            return False
        self.has_valid_non_ascii = True
        return True

    @property
    def is_not_utf8(self) -> bool:
        """Tell whether no text beyond ASCII is UTF-8, and more than one is not."""
        return self.n_invalid > 1 and not self.has_valid_non_ascii

    def advice(self, file: Path) -> str:
        """Return what the encoding is likely to be, and how to convert the file."""
        controls = sum(c < " " and c not in "\t\r\n\f" for c in self.sample)
        if controls > len(self.sample) / 50:
            return "is not text: it holds control characters and bytes that are not UTF-8"
        high = [b >= 0x80 for b in self.sample.encode("utf-8", "surrogateescape")]
        alone = sum(a and not b for a, b in zip(high, [*high[1:], False], strict=True))
        if 2 * alone > sum(high):  # accents among other letters
            name, what = "WINDOWS-1252", "Windows-1252, of Western Europe"
        else:
            name, what = "ENCODING", "one of another script: Windows-1251, GB18030, Shift_JIS ..."
        return (
            f"is not UTF-8, most likely {what}; convert it: "
            f"iconv -f {name} -t UTF-8 '{file}' > 'new{file_kind(file)}'"
        )


def _open_zst(file: Path, _mode: str) -> io.BufferedReader:
    import pyarrow  # imported late: a resume does without; Python reads it itself from 3.14 on

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


def _open_text(raw: BinaryIO, encoding: Encoding) -> io.TextIOWrapper:
    """Return the text of a file, with its ends of lines as they are.

    Raises ValueError for zero bytes, and for UTF-16 without its mark.
    """
    start = raw.peek(4096)[:4096]
    name = next((BOMS[mark] for mark in BOMS if start.startswith(mark)), None)
    if start and start.count(0) > 0.9 * len(start):
        raise ValueError("it is filled with zero bytes, as a crash leaves a file")
    if name is None and start.count(0) > len(start) / 5:  # the zeros of Latin letters
        order = "BE" if start[::2].count(0) > start[1::2].count(0) else "LE"
        raise ValueError(f"it looks like UTF-16 without its mark: iconv -f UTF-16{order} -t UTF-8")
    errors = "surrogatepass" if name in ("utf-16", "utf-32") else "surrogateescape"
    return io.TextIOWrapper(raw, encoding=name or "utf-8", errors=errors, newline="")


# -------------------------------------------------------------------------------------------- JSON


class Decoder(json.JSONDecoder):
    """Decodes numbers as they stand in the text, and lets a heartbeat and Ctrl-C in meanwhile.

    C reads a document in one call, in which only Python code lets others in: the hooks, which do
    nothing, and a loop over texts, which have no hook.
    """

    def __init__(self):
        super().__init__(**dict.fromkeys(("parse_int", "parse_float", "object_hook"), lambda x: x))

    def raw_decode(self, s: str, idx: int = 0):
        if TEXTS.match(s, idx):
            return json.decoder.JSONArray((s, idx + 1), self.scan_once)
        return super().raw_decode(s, idx)


DECODER = Decoder()


def parse_exactly(text: str):
    """Parse JSON, with its numbers as they stand in the text. Raises ValueError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


def _parse_line(line: str, encoding: Encoding):
    """Return the value in a line, or a str that says why there is none."""
    if _is_blank(line):
        return "blank line"
    if not encoding.is_valid(line):
        return NOT_UTF8
    try:
        value = parse_exactly(line.removeprefix("\ufeff"))
    except json.JSONDecodeError:
        return NOT_JSON
    except ValueError as error:  # brackets too deep
        return str(error)
    holds_records = isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)
    return value if isinstance(value, dict) or holds_records else NOT_AN_OBJECT


def _records_of(value) -> Iterator[dict | list | str]:
    """Yield the records of a JSON value: an object, a chat, or a list of them."""
    if isinstance(value, list) and not is_chat(value):
        for item in value:
            yield item if isinstance(item, dict) or is_chat(item) else NOT_AN_OBJECT
    else:
        yield value if isinstance(value, (dict, list)) else NOT_AN_OBJECT


def _parse_lines(lines: Iterable[str], encoding: Encoding) -> Iterator[dict | list | str]:
    """Yield the records of each line. A bad line costs one record; a line takes thrice its size."""
    for value in map(partial(_parse_line, encoding=encoding), lines):
        yield from [value] if isinstance(value, str) else _records_of(value)


def _parse_json(
    lines: Iterator[str], encoding: Encoding, is_lines: bool = False
) -> Iterator[dict | list | str]:
    """Read a line for each record, or one document over several lines. Raises ValueError.

    A file that `is_lines` by its name is read as lines where it is not a document either.
    """
    lines = iter(lines)
    start = [*_first_lines(lines, 2)]
    is_document = _is_document(start, is_lines)
    lines = chain(start, lines)
    del start  # a record may be large
    if not is_document:
        yield from _parse_lines(lines, encoding)
        return
    lines = [*lines]
    try:
        records = [*_parse_document("".join(lines), encoding)]
    except ValueError:
        if not is_lines:
            raise
        records = _parse_lines(lines, encoding)
    yield from records


def _is_blank(line: str) -> bool:
    return not line.strip("\ufeff \t\r\n")


def _first_lines(lines: Iterator[str], count: int) -> Iterator[str]:
    """Yield the lines up to the `count`-th that is not blank."""
    for line in lines:
        yield line
        count -= not _is_blank(line)
        if not count:
            return


def _is_document(start: list[str], is_lines: bool) -> bool:
    """Tell a JSON document by its first two lines that are not blank, or by its only one."""
    texts = [line for line in start if not _is_blank(line)]
    values = [_parse_line(line, Encoding()) for line in texts]
    if len(values) < 2:
        return True
    if is_lines:
        opens = texts[0].lstrip("\ufeff \t")[0] in "[{"
        return opens and all(value == NOT_JSON for value in values)
    return not isinstance(values[0], dict)


def _parse_document(text: str, encoding: Encoding) -> Iterator[dict | list | str]:
    """Yield the records of JSON values that stand in a row, or between commas.

    A single object may hold the records. Raises ValueError.
    """
    if not encoding.is_valid(text):
        encoding.n_invalid += 1  # a document is whole or nothing
        if encoding.is_not_utf8:
            raise ValueError(f"it {encoding.advice(Path('FILE.json'))}")
        raise ValueError("it is not valid UTF-8; save it as UTF-8")
    values = []
    at = 0
    text = text.removeprefix("\ufeff").strip()
    while at < len(text):
        try:
            value, at = DECODER.raw_decode(text, at)
        except RecursionError:
            raise ValueError("its brackets are nested too deep") from None
        values.append(value)
        while text[at : at + 1] in (" ", "\t", "\r", "\n", ","):
            at += 1
    if len(values) == 1 and isinstance(values[0], dict):
        values = _wrapped_list(values[0]) or _records_of_object(values[0]) or values
    for value in values:
        yield from _records_of(value)


def _wrapped_list(value: dict) -> list | None:
    """Return the list of records that an object holds, as in {"version": "1", "data": [...]}."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or is_chat(lists[0]) or not lists[0]:
        return None
    return lists[0] if all(isinstance(r, dict) or is_chat(r) for r in lists[0]) else None


def _check_lists(value: dict) -> None:
    """Raise ValueError for an object of several lists of records, as splits in one file are."""
    lists = {n: v for n, v in value.items() if isinstance(v, list) and v and not is_chat(v)}
    names = [name for name, items in lists.items() if isinstance(items[0], dict)]
    if len(names) > 1:
        files = ", ".join(f"{name}.json" for name in names)
        raise ValueError(f"it holds {len(names)} lists of records, {', '.join(names)}; write each "
                         f"to a file of its own, {files}, and name their folder")  # fmt: skip


def _records_of_object(value: dict) -> list | None:
    """Return the records of an object that holds them by column or by name, None for another.

    By column pandas and `datasets` write a table.
    """
    parts = [*value.values()]
    if column := choose_columns(tuple(value)):
        if _are_plain_turns(value.get(column.get("messages"))):
            return None
        is_indexed = all(isinstance(c, dict) and all(map(str.isdigit, c)) for c in parts)
        columns = [[*column.values()] for column in parts] if is_indexed else parts
        is_table = all(isinstance(c, list) and not is_chat(c) for c in columns)
        if is_table and len({*map(len, columns)}) == 1 and len(columns[0]) > 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        return None
    _check_lists(value)
    is_named = len(parts) > 1 and all(isinstance(part, dict) for part in parts)
    is_alike = is_named and len({frozenset(part) for part in parts}) == 1
    return parts if is_alike and choose_columns(tuple(parts[0])) else None


def _are_plain_turns(value) -> bool:
    """Tell the turns of one chat that are plain texts, as LIMA has them, from a column of chats."""
    turns = value if isinstance(value, list) else [None]
    return all(isinstance(turn, str) and turn[:1] not in ("[", "{") for turn in turns)


# -------------------------------------------------------------------------------- tables and text


def _delimiter(header: str) -> str:
    """Return the delimiter of a table by its header.

    It is a tab where there is one, as no name of a column has it. Else it is a comma or semicolon,
    whichever cuts the header into more columns, or a bar where neither cuts it.
    """
    if "\t" in header:
        return "\t"
    columns = {d: len(next(csv.reader([header], delimiter=d), [])) for d in ",;|"}
    delimiter = max(",;", key=columns.get)
    return delimiter if columns[delimiter] > 1 or columns["|"] < 2 else "|"


def _parse_csv(lines: Iterator[str], encoding: Encoding) -> Iterator[dict | str]:
    """Read the rows of a table with a header, all values text; a bad row costs itself alone.

    A space that follows the delimiter everywhere in the header is part of it. Raises csv.Error.
    """
    csv.field_size_limit(2**31 - 1)
    lines = dropwhile(_is_blank, lines)
    first = next(lines, "")
    delimiter = _delimiter(first)
    others = next(csv.reader([first], delimiter=delimiter), [])[1:]
    is_spaced = bool(others) and all(name[:1] == " " for name in others)
    rows = _csv_rows(chain([first], lines), delimiter=delimiter, skipinitialspace=is_spaced)
    columns = next(rows, [])
    if isinstance(columns, str):
        raise csv.Error(f"its header: {columns}")
    if not encoding.is_valid("".join(columns)):
        raise csv.Error("its first line is not valid UTF-8; save it as UTF-8")
    if delimiter == "|":
        columns, rows = _without_rule(columns, rows)
    columns = _unique([name or f"column {i}" for i, name in enumerate(columns, 1)])
    for row in rows:
        if isinstance(row, str):
            yield row
        elif len(row) > len(columns):
            yield "more values than columns"
        elif not encoding.is_valid("".join(row)):
            yield NOT_UTF8
        elif row:
            yield dict(zip(columns, row + [""] * (len(columns) - len(row)), strict=True))


def _without_rule(columns: list[str], rows: Iterator[list[str] | str]) -> tuple[list, Iterator]:
    """Return the header and the rows of a table of bars.

    A Markdown table loses its row |---|:--| and the spaces that pad its cells.
    """
    first = [*islice(rows, 1)]
    rows = chain(first, rows)
    if not (first and MARKDOWN_RULE.fullmatch("|".join(first[0]))):
        return columns, rows
    next(rows)
    padded = (row if isinstance(row, str) else [*map(str.strip, row)] for row in rows)
    return [*map(str.strip, columns)], padded


def _unique(columns: list[str]) -> list[str]:
    """Number the columns of a name that an earlier one has: the first one keeps it."""
    return [
        f"{name} ({columns[:i].count(name) + 1})" if name in columns[:i] else name
        for i, name in enumerate(columns)
    ]


def _csv_rows(lines: Iterator[str], **dialect) -> Iterator[list[str] | str]:
    """Yield the values of each row; a str in place of one with a wrong quote.

    A quote that does not end would take the rows after it: they are read again, and no row takes
    more than LARGEST_ROW.
    """
    row = []
    again = deque()

    def feed():
        size = 0
        while line := (again.popleft() if again else next(lines, "")):
            size = size + len(line) if row else len(line)
            row.append(line)
            if size > LARGEST_ROW and len(row) > 1:
                raise csv.Error(f"it does not end within {LARGEST_ROW:,} characters")
            yield line

    reader = csv.reader(feed(), strict=True, **dialect)
    while True:
        row.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"row with a wrong quote ({error})"
            again.extendleft(reversed(row[1:]))
            reader = csv.reader(feed(), strict=True, **dialect)


def _parse_paragraphs(lines: Iterable[str], encoding: Encoding) -> Iterator[dict | str]:
    """Yield what stands between the blank lines of a text; each end of a line becomes \\n."""
    plain = (line.rstrip("\r\n") + ("\n" if line.endswith(("\r", "\n")) else "") for line in lines)
    for blank, group in groupby(plain, lambda line: line == "\n"):
        if not blank:
            text = "".join(group).removesuffix("\n")
            yield {"text": text} if encoding.is_valid(text) else NOT_UTF8


def _arrow_rows(raw: BinaryIO, kind: str) -> Iterator[dict | str]:
    """Yield the rows of a table of Parquet or Arrow; a str says why one is unreadable.

    A float of 32 or 16 bits becomes the one of 64 with the same shortest digits.
    """
    from pyarrow import types  # imported late: a resume does without

    schema, batches = (_parquet_batches if kind == ".parquet" else _arrow_batches)(raw)
    short = [field.name for field in schema if types.is_floating(field.type)]
    short = [name for name in short if schema.field(name).type.bit_width < 64]
    for batch in batches:
        for row in _rows_of(batch):
            for name in short if isinstance(row, dict) else ():
                row[name] = None if row[name] is None else float(str(np.float32(row[name])))
            yield row


def _rows_of(batch) -> list[dict | str]:
    """Return the rows of a batch, or why one cannot be read, as of a date past the year 9999."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [" ".join(str(error).split())]
    return [row for i in range(batch.num_rows) for row in _rows_of(batch.slice(i, 1))]


def _parquet_batches(raw: BinaryIO):
    """Return the schema of a file and its batches of at most 1000 rows."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(raw)
    return file.schema_arrow, file.iter_batches(1000)


def _arrow_batches(raw: BinaryIO):
    """Return the schema of a file and its batches: a stream, as save_to_disk writes, or a file."""
    from pyarrow import ipc

    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    reader = (ipc.open_file if is_file else ipc.open_stream)(raw)
    if is_file:
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    return reader.schema, reader


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
PARSERS = {
    ".jsonl": partial(_parse_json, is_lines=True),
    ".ndjson": partial(_parse_json, is_lines=True),
    ".json": _parse_json,
    ".csv": _parse_csv,
    ".tsv": _parse_csv,
    ".txt": _parse_paragraphs,
    ".md": _parse_paragraphs,
}
TABLES = (".parquet", ".arrow")
FILE_KINDS = (*PARSERS, *TABLES)
