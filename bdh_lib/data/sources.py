"""Where records come from: files, folders of them, the hub; and which split each is of."""

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from bdh_lib.data import hub, parsers
from bdh_lib.data.parsers import FILE_KINDS
from bdh_lib.errors import UserError
from bdh_lib.files import expand_user
from bdh_lib.progress import counted

SAMPLE = Path(__file__).with_name("sample.jsonl")
# a folder with these is used as it is
PREPARED_FILES = ("train.bin", "val.bin", "train.fields", "val.fields")
PROJECT_FILES = (  # names found in a CHECKPOINT_DIR, a run, a model
    (".data/.lock",),
    ("metrics.jsonl", "config.json"),
    ("model.safetensors",),
)
SPLITS = {  # words in names of files, folders and splits by their use, as `datasets` takes them
    "train": ("train", "training"),
    "val": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
DOCUMENTS = re.compile(r"(readme|license|licence|changelog|contributing|notice)\b", re.IGNORECASE)
METADATA_FILES = re.compile(  # of `datasets`, beside data: descriptions, and what `map` gave
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-\w+\.arrow"
)
UNREAD_FILES = {  # what to do with files that people bring and that are not read, by their endings
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack it and name the folder",
    (".xlsx", ".xls", ".ods"): "save it as CSV in UTF-8",
    (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm"): "save its text as .txt",
}
LARGE = 20e6  # bytes of files that take seconds to read


class Source(NamedTuple):
    """The parts of a data set: "train" and "val" where they are given, else "all".

    A part is a list of files, or a split of the hub. `left_out` names what is in no part.
    """

    dataset: str
    parts: dict[str, Iterable]
    left_out: Sequence[str] = ()
    is_local: bool = True


def resolve_files(dataset: str) -> list[Path] | None:
    """Return the local files that `dataset` names, or None for a name on the hub.

    Raises UserError.
    """
    if not dataset.strip():
        raise UserError("DATASET is empty; name a file, a folder, a data set on the hub, or sample")
    if dataset == "sample":
        return [SAMPLE]
    if re.match(r"\w+://", dataset):
        raise UserError(
            f"DATASET {dataset} is a URL; download it and name the file, or name a data set on the "
            "hub as user/name"
        )
    path = expand_user(dataset, "DATASET")
    kind = _kind(path)
    whole, mark, split = str(path).rpartition("#")
    if kind is None and mark and Path(whole).is_dir():
        return _split_files(Path(whole), split)
    if kind is None and mark and (whole == "sample" or Path(whole).is_file()):
        raise UserError(f"DATASET {whole} has no splits; leave out #{split}")
    if kind == stat.S_IFDIR:
        return _ready_files(path) or _data_files(path)[0]
    if kind is not None:
        _check_regular(path)
        if parsers.file_kind(path) not in FILE_KINDS:
            raise _unknown_ending(path)
        return [path]
    no_name = "/" in dataset and not hub.NAME.fullmatch(dataset)
    if no_name or parsers.file_kind(path) in FILE_KINDS or dataset.startswith((".", "/", "~")):
        raise UserError(f"DATASET {path} does not exist (looked from {Path.cwd()})")
    return None


def _unknown_ending(path: Path) -> UserError:
    ways = (way for endings, way in UNREAD_FILES.items() if parsers.file_kind(path) in endings)
    return UserError(
        f"DATASET {path} ends in none of {', '.join(FILE_KINDS)} "
        f"(and {', '.join(parsers.COMPRESSED)} after it); "
        f"{next(ways, 'name it by what it holds, such as .jsonl or .txt')}"
    )


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of one split of a folder. Raises UserError."""
    files = _data_files(folder)[0]
    purpose = {file: split_of(file.relative_to(folder)) for file in files}
    chosen = [file for file in files if purpose[file] and purpose[file] == SPLIT_OF.get(split)]
    if not chosen:
        splits = ", ".join(sorted({*purpose.values()} - {None})) or "none"
        raise UserError(f"DATASET {folder} has no files of a split {split!r}; it has: {splits}")
    return chosen


def split_of(name: Path | str) -> str | None:
    """Return what the words of a name say that it is for, the file's before its folder's."""
    for part in reversed(Path(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return None


def open_source(dataset: str) -> Source:
    """Find the parts of a data set. Raises UserError if it is not clear what they are."""
    path = expand_user(dataset, "DATASET")
    if dataset == "sample" or _kind(path) != stat.S_IFDIR:
        files = resolve_files(dataset)
        return _hub_source(dataset) if files is None else Source(dataset, {"all": files})
    files, left_out = _data_files(path)
    by_split = {name: [] for name in (*SPLITS, None)}
    for file in files:
        by_split[split_of(file.relative_to(path))].append(file)
    if not by_split["val"] and not by_split["test"]:
        return Source(dataset, {"all": files}, left_out)
    if test := by_split["test"]:
        left_out = [*left_out, _test_line(_names(test), f"{path}#test")]
    if not (train := sorted(by_split["train"] + by_split[None])):
        others = {"validation": by_split["val"], "test": test}
        raise _no_train_split(dataset, [name for name, part in others.items() if part])
    parts = {"train": train, "val": by_split["val"]} if by_split["val"] else {"all": train}
    return Source(dataset, parts, left_out)


def _hub_source(dataset: str) -> Source:
    """Take the splits of a data set on the hub by their names. Raises UserError without `train`."""
    print(f"reading DATASET {dataset} ...", flush=True)
    splits = hub.load(dataset)
    if len(splits) == 1:
        return Source(dataset, {"all": next(iter(splits.values()))}, is_local=False)
    taken = {use: next((w for w in words if w in splits), None) for use, words in SPLITS.items()}
    if not taken["train"]:
        raise _no_train_split(dataset, [*splits])
    left_out = []
    if others := [name for name in splits if name not in taken.values()]:
        left_out += [f"the splits {', '.join(others)}; name one to take it: {dataset}#{others[0]}"]
    if test := taken["test"]:
        left_out += [_test_line(f"{len(splits[test]):,} records", f"{dataset}#{test}")]
    train, val = taken["train"], taken["val"]
    parts = {"train": splits[train], "val": splits[val]} if val else {"all": splits[train]}
    return Source(dataset, parts, left_out, is_local=False)


def _test_line(what: str, name: str) -> str:
    return f"the test split, {what}; to evaluate on it: --evaluate {name}"


def _no_train_split(dataset: str, splits: list[str]) -> UserError:
    return UserError(
        f"DATASET {dataset} has the splits {', '.join(splits)} and no split to train on; "
        f"name one, as in {dataset}#{splits[0]}"
    )


def _names(files: list[Path], most: int = 3) -> str:
    """Return the first names of files, and how many others there are."""
    more = f" and {len(files) - most:,} others" if len(files) > most else ""
    return ", ".join(file.name for file in files[:most]) + more


def _kind(path: Path) -> int | None:
    """Return what `stat` calls the kind of a file, or None if nothing is. Raises UserError."""
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
        raise UserError(f"DATASET {file} is not a regular file; write what it gives to a file")


def _ready_files(folder: Path) -> list[Path]:
    """Return the files of a ready split, if the folder is one. Raises UserError."""
    if not os.access(folder, os.X_OK, effective_ids=True):  # else a file in it would be named
        raise UserError(f"DATASET {folder} cannot be read: {os.strerror(errno.EACCES)}")
    ready = [folder / name for name in PREPARED_FILES if _kind(folder / name) is not None]
    for file in ready:
        _check_regular(file)
    missing = [name for name in ("train.bin", "val.bin") if folder / name not in ready]
    if ready and missing:
        raise UserError(f"DATASET {folder} is a ready split but has no {missing[0]}")
    return ready


def _data_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the data files in a folder and its subfolders, and what is left out of it.

    Hidden files and folders are left out, and folders that this project writes: runs and prepared
    data may lie beside the data. So are files about the data, such as README.md, and links that
    lead nowhere. Raises UserError if there is no data file.
    """
    files, others, written = [], [], []
    for at, folders, names in os.walk(folder, onerror=_unreadable):
        written += [Path(at, f) for f in folders if f[0] != "." and _is_written_here(Path(at, f))]
        folders[:] = [f for f in folders if f[0] != "." and Path(at, f) not in written]
        for name in sorted(names):
            if name[0] != ".":
                is_data = parsers.file_kind(Path(name)) in FILE_KINDS and not _is_about(Path(name))
                (files if is_data else others).append(Path(at, name))
    dangling = list(filter(_leads_nowhere, files))
    files = sorted({*files} - {*dangling})
    for file in files:
        _check_regular(file)
    if not files:
        held = f"; it holds {_names(others + dangling)}" if others + dangling else ""
        held += " (links that lead nowhere)" if dangling else ""
        raise UserError(
            f"DATASET {folder} is a folder without {', '.join(FILE_KINDS)} files of data{held}"
        )
    left_out = [f"{len(others):,} other files: {_names(others)}"] if others else []
    if dangling:
        left_out.append(f"{len(dangling):,} links that lead nowhere: {_names(dangling)}")
    if written:
        left_out.append(f"runs and models: {_names(written)}")
    return files, left_out


def _leads_nowhere(file: Path) -> bool:
    """Tell whether a file is a link to one that does not exist, or in a circle."""
    try:
        file.stat()
    except OSError as error:
        return file.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return False


def _is_about(file: Path) -> bool:
    """Tell whether a file is about the data, as README.md is, and not of the data."""
    is_text = parsers.file_kind(file) in (".txt", ".md")
    return bool(METADATA_FILES.fullmatch(file.name) or (is_text and DOCUMENTS.match(file.name)))


def _is_written_here(folder: Path) -> bool:
    """Tell whether a folder is a CHECKPOINT_DIR, a run, a checkpoint or an exported model."""
    there = os.path.exists  # Path's own raises for a folder that may not be entered
    return any(all(there(folder / name) for name in mark) for mark in PROJECT_FILES)


def ready_split(files: list[Path] | None) -> list[Path]:
    """Return those of the files that `find` gave which are a ready split: all of them or none."""
    return [file for file in files or [] if file.name in PREPARED_FILES]


def read_parts(source: Source) -> Iterator[tuple[str, dict | list | str]]:
    """Yield every record with the name of its part; a str says why one is unreadable.

    What takes long shows a line, and a bar on a terminal.
    """
    what = f"reading DATASET {source.dataset}"
    if source.is_local:
        print_if_large(what, [file for part in source.parts.values() for file in part])
    records = (
        (name, record)
        for name, part in source.parts.items()
        for record in (_read_files(part) if source.is_local else hub.rows(source.dataset, part))
    )
    yield from counted(records, what, "records")


def _read_files(files: list[Path]) -> Iterator[dict | list | str]:
    return chain.from_iterable(map(parsers.read_file, files))


def read_records(dataset: str) -> Iterator[dict | list | str]:
    """Yield the records of all parts of a data set, in their order."""
    return (record for _, record in read_parts(open_source(dataset)))


def print_if_large(what: str, files: list[Path], times: float = 1) -> None:
    """Say what is being done with the files where they are `times` as large as LARGE."""
    size = sum(file.stat().st_size for file in files)
    if size > times * LARGE:
        print(f"{what} ({size / 1e6:,.0f} MB) ...", flush=True)
