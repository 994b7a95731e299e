"""Where records come from: files, folders of them, the hub."""

import csv
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from bdh_lib.errors import UserError
from bdh_lib.files import expand_user, parse_json

SAMPLE = Path(__file__).with_name("sample.jsonl")
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
NOT_UTF8 = re.compile(r"[\udc80-\udcff]")  # a byte as surrogateescape gives it
HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?(?:#(.+))?")
WAYS_ON = (
    "Ways on: --dataset FILE for a local file, --dataset sample for the embedded one, "
    "`hf auth login` for a private or gated data set"
)
SPLIT = ("train.bin", "val.bin", "train.fields", "val.fields")  # a folder with these is used as is
WRITTEN_HERE = (  # names that tell a CHECKPOINT_DIR, a run, a model
    (".data/.lock",),
    ("metrics.jsonl", "config.json"),
    ("model.safetensors",),
)
LARGE = 20e6  # bytes of files that take longer to read than QUIET
QUIET, LINE_EVERY = 2, 5  # seconds before a bar is drawn; between lines where there is none
HUB_SECONDS = 10  # that the hub may take to answer at all; a hanging one would cost 400 s


def find(dataset: str) -> list[Path] | None:
    """The local files that `dataset` names, or None for a name on the hub. Raises UserError."""
    if not dataset.strip():
        raise UserError("DATASET is empty; name a file, a folder, a data set on the hub, or sample")
    if dataset == "sample":
        return [SAMPLE]
    path = expand_user(dataset, "DATASET")
    kind = _kind(path)
    if kind == stat.S_IFDIR:
        return _ready_files(path) or _data_files(path)
    if kind is not None:
        _check_regular(path)
        if path.suffix not in FILE_KINDS:
            raise UserError(f"DATASET {path} ends in none of {', '.join(FILE_KINDS)}")
        return [path]
    no_name = "/" in dataset and not HUB_NAME.fullmatch(dataset)
    if no_name or path.suffix in FILE_KINDS or dataset.startswith((".", "/", "~")):
        raise UserError(f"DATASET {path} does not exist (looked from {Path.cwd()})")
    return None


def _kind(path: Path) -> int | None:
    """What `stat` calls the kind of a file, or None where nothing is. Raises UserError."""
    try:
        str(path).encode()
        return stat.S_IFMT(path.stat().st_mode)
    except UnicodeEncodeError:
        raise UserError(f"DATASET {path} has a name that is not UTF-8; rename it") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        if "\0" not in str(path) and path.is_symlink():
            raise UserError(f"DATASET {path} is a link to a file that does not exist") from None
        return None
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> None:
    raise UserError(f"DATASET {error.filename} cannot be read: {error.strerror}") from None


def _check_regular(file: Path) -> None:
    """Raise UserError for a pipe, a socket or a device, which cannot be read twice."""
    if _kind(file) != stat.S_IFREG:
        raise UserError(f"DATASET {file} is no regular file; write what it gives to a file")


def _ready_files(folder: Path) -> list[Path]:
    """The files of a ready split, if the folder is one. Raises UserError."""
    ready = [folder / name for name in SPLIT if _kind(folder / name) is not None]
    for file in ready:
        _check_regular(file)
    missing = [name for name in ("train.bin", "val.bin") if folder / name not in ready]
    if ready and missing:
        raise UserError(f"DATASET {folder} is a ready split but has no {missing[0]}")
    return ready


def _data_files(folder: Path) -> list[Path]:
    """The data files in a folder and its subfolders. Raises UserError.

    Hidden files and folders are left out, and folders that this project writes: runs and prepared
    data may lie beside the data.
    """
    files = []
    for at, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [f for f in folders if f[0] != "." and not _is_written_here(Path(at, f))]
        files += [Path(at, n) for n in names if n[0] != "." and Path(n).suffix in FILE_KINDS]
    for file in files:
        _check_regular(file)
    if not files:
        raise UserError(f"DATASET {folder} is a folder without {', '.join(FILE_KINDS)} files")
    return sorted(files)


def _is_written_here(folder: Path) -> bool:
    """Whether a folder is a CHECKPOINT_DIR, a run, a checkpoint or an exported model."""
    there = os.path.exists  # Path's own raises for a folder that may not be entered
    return any(all(there(folder / name) for name in mark) for mark in WRITTEN_HERE)


def ready_split(dataset: str) -> list[Path]:
    """Its files, if that is what `dataset` names."""
    return [file for file in find(dataset) or [] if file.name in SPLIT]


def read_records(dataset: str) -> Iterator[dict | str]:
    """Every record of `dataset` in order; a str in place of a record says why one is unreadable.

    What takes long shows a line, and a bar on a terminal.
    """
    files, what = find(dataset), f"reading DATASET {dataset}"
    if files is None:
        print(f"{what} ...", flush=True)
    else:
        print_if_large(what, files)
    sources = map(_read_file, files) if files else [_read_hub(dataset)]
    yield from shown(chain.from_iterable(sources), what)


def print_if_large(what: str, files: list[Path], large: float = LARGE) -> None:
    """Say what is being done with the files where it takes a while."""
    size = sum(file.stat().st_size for file in files)
    if size > large:
        print(f"{what} ({size / 1e6:,.0f} MB) ...", flush=True)


def shown(records: Iterable, what: str) -> Iterator:
    """The records, with a bar on a terminal, and elsewhere a line every few seconds."""
    bar = tqdm(records, what, disable=None, delay=QUIET, unit=" records")
    last_line = time.monotonic()
    for i, record in enumerate(bar, 1):
        if bar.disable and time.monotonic() > last_line + LINE_EVERY:
            last_line = time.monotonic()
            print(f"{what}: {i:,} records ...", flush=True)
        yield record


def _read_file(file: Path) -> Iterator[dict | str]:
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        else:
            # bytes that are not UTF-8 come as lone surrogates, which no valid UTF-8 holds
            how = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
            with file.open(newline="" if file.suffix == ".csv" else None, **how) as lines:
                yield from PARSERS[file.suffix](lines)
    except Exception as error:  # parsers raise errors of many kinds
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:200]
        raise UserError(f"DATASET {file} cannot be read as {file.suffix}: {reason}") from None


def _parquet_rows(file: Path) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile  # imported late: a resume does without

    with ParquetFile(file) as rows:
        for batch in rows.iter_batches(1000):
            yield from batch.to_pylist()


def _is_utf8(text: str) -> bool:
    return text.isascii() or not NOT_UTF8.search(text)


def _parse_lines(lines: Iterable[str]) -> Iterator[dict | str]:
    """The record of each line: a bad one costs one, a large one itself thrice."""
    return map(_parse_line, lines)


def _parse_line(line: str) -> dict | str:
    if not line.strip("\ufeff \t\r\n"):
        return "blank line"
    if not _is_utf8(line):
        return "not valid UTF-8"
    try:
        record = parse_json(line.removeprefix("\ufeff"))
    except ValueError:  # also a number of too many digits, brackets too deep
        return "not JSON"
    return record if isinstance(record, dict) else "not a JSON object"


def _parse_document(lines: TextIO) -> Iterator[dict | str]:
    """The records of a JSON list, of one object, or of a line each. Raises ValueError."""
    first = lines.readline()
    if isinstance(_parse_line(first), dict):
        yield from _parse_lines(chain([first], lines))
    elif text := (first + lines.read()).strip():
        if not _is_utf8(text):
            raise ValueError("it is not valid UTF-8; save it as UTF-8")
        document = parse_json(text)
        for record in document if isinstance(document, list) else [document]:
            yield record if isinstance(record, dict) else "not a JSON object"


def _parse_rows(lines: Iterable[str]) -> Iterator[dict | str]:
    """The rows of a CSV, all values text. Raises csv.Error for quotes that do not end."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(lines, restval="", strict=True)
    if not _is_utf8("".join(rows.fieldnames or [])):
        raise csv.Error("its first line is not valid UTF-8; save it as UTF-8")
    try:
        for row in rows:
            if None in row:
                yield "more values than columns"
            else:
                yield row if _is_utf8("".join(row.values())) else "not valid UTF-8"
    except csv.Error as error:
        raise csv.Error(f"line {rows.reader.line_num:,}: {error}") from None


def _parse_paragraphs(lines: Iterable[str]) -> Iterator[dict | str]:
    """What stands between the blank lines of a text."""
    for blank, some in groupby(lines, lambda line: line == "\n"):
        if not blank:
            text = "".join(some).removesuffix("\n")
            yield {"text": text} if _is_utf8(text) else "not valid UTF-8"


PARSERS = {
    ".jsonl": _parse_lines,
    ".json": _parse_document,
    ".csv": _parse_rows,
    ".txt": _parse_paragraphs,
}


def parse_hub_name(dataset: str) -> tuple[str, str | None, str | None, str | None]:
    """Name, config, revision and split of a name on the hub. Raises UserError."""
    if match := HUB_NAME.fullmatch(dataset):
        return match.groups()
    raise UserError(
        f"DATASET {dataset!r} is neither a file nor a hub name, which looks like user/name, "
        f"user/name:config, user/name@revision or user/name#split. {WAYS_ON}"
    )


def commit(dataset: str) -> str | None:
    """The commit that a name on the hub means now, or None where the hub does not tell."""
    name, _, revision, _ = parse_hub_name(dataset)
    is_commit = re.fullmatch("[0-9a-f]{40}", revision or "")
    return revision if is_commit else _ask_hub(name, revision)


@lru_cache  # a run reads one commit, and a hub that hangs is asked once
def _ask_hub(name: str, revision: str | None) -> str | None:
    """The commit of a revision. A hub that does not answer is not asked again by this process."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=HUB_SECONDS).sha
    except (HfHubHTTPError, ValueError):  # it answers: `load_dataset` tells what is wrong
        return None
    except Exception as error:  # several libraries have errors of their own
        constants.HF_HUB_OFFLINE |= not _is_local(error)
        return None


def _is_local(error: Exception) -> bool:
    """Whether it is of this machine's files, and not of the network."""
    network = (ConnectionError, TimeoutError)
    return isinstance(error, OSError) and bool(error.strerror) and not isinstance(error, network)


def _read_hub(dataset: str) -> Iterator[dict]:
    name, config, revision, split = parse_hub_name(dataset)
    sha = _ask_hub(name, revision) or revision
    import datasets
    from huggingface_hub import constants

    datasets.config.HF_HUB_OFFLINE = offline = constants.HF_HUB_OFFLINE
    if offline and not os.environ.get("HF_HUB_OFFLINE"):
        print("warning: the hub does not answer; looking in the cache of earlier downloads")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries, told as one error
    try:
        yield from datasets.load_dataset(name, config, revision=sha, split=split or "train")
    except datasets.exceptions.DatasetNotFoundError as error:
        unknown = "is no file or folder here, and not on the hub, or private there"
        what = "is gated" if "gated" in str(error) else unknown
        raise UserError(f"DATASET {name} {what}. {WAYS_ON}") from None
    except OSError as error:
        if _is_local(error):
            raise UserError(
                f"DATASET {name}: {error.filename or 'what the hub sends'} cannot be written: "
                f"{error.strerror}; set HF_HOME to a folder that can be"
            ) from None
        reason = "it is not in the cache either" if offline else " ".join(str(error).split())[:200]
        raise UserError(
            f"DATASET {name} is no file or folder here, and the hub is out of reach ({reason}). "
            f"{WAYS_ON}"
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"DATASET {dataset}: {reason}. {WAYS_ON}") from None
