"""From a data set to two files of bytes: its records are split, formatted, written and cached.

Records are read one at a time (a JSON document over several lines is read whole), those of the hub
by the `datasets` library, and the prepared bytes are memory mapped, so a data set of many gigabytes
needs little memory and a resumed run needs no network.
"""

import errno
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np

from bdh_lib.data import describe, hub, sources
from bdh_lib.data.formats import FIELDS, REQUIRED_FIELDS
from bdh_lib.data.split import ENDS, choose_validation, write_sides
from bdh_lib.data.texts import Texts, write_texts
from bdh_lib.errors import NoDataError, UserError
from bdh_lib.files import (
    is_sealed,
    parse_json,
    read_json_object,
    seal,
    sha256_file,
    sha256_text,
    write_fault,
)
from bdh_lib.progress import heartbeat
from bdh_lib.settings import Settings

VERSION = 3  # of prepared data: raise it where a change of the code changes any of their bytes
IN_VAL = "in_val.npy"  # in prepared data: of each text of the mode, whether it validates
PROCESS_START = time.time()  # about when the process started, in which --refresh-data acts once


class DataSettings(NamedTuple):
    """What prepared bytes depend on beside the data themselves.

    These are DATASET, TRAINING_MODE, VAL_FRACTION, SEED and COLUMNS.
    """

    dataset: str
    mode: str
    val_fraction: float
    seed: int
    columns: str | None = None

    def as_dict(self) -> dict:
        """Return these, and the version of what is made of them, as data.json keeps it."""
        return self._asdict() | {"version": VERSION}


def data_settings(s: Settings, mode: str) -> DataSettings:
    """Return what the data of a run depend on, in any mode."""
    return DataSettings(s.DATASET, mode, s.VAL_FRACTION, s.SEED, s.COLUMNS)


def recorded_settings(report: dict) -> DataSettings | None:
    """Return what prepared data depended on, by their report; None if it is of another format.

    `report` is data.json as the config.json of any model may hold it.
    """
    made_from = report.get("made_from")
    kinds = get_type_hints(DataSettings)
    if not isinstance(made_from, dict):
        return None
    values = {name: made_from.get(name) for name in kinds}
    if not all(isinstance(values[name], kind) for name, kind in kinds.items()):
        return None
    return DataSettings(**values) if values["mode"] in REQUIRED_FIELDS else None


def cache_key(settings: DataSettings, files: list[Path] | None) -> str:
    """Return the name of the folder of prepared data.

    It changes with a setting, with the commit on the hub, and with a path, size or time of `files`,
    which are what sources.resolve_files gives.
    """
    content = settings.as_dict()
    if files:
        stats = [(str(file.resolve()), file.stat()) for file in files]
        content["dataset"] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    else:
        name, config, revision, split = hub.parse_name(settings.dataset)
        content["dataset"] = [name, config, split, hub.commit(settings.dataset) or revision]
    return sha256_text(json.dumps(content, sort_keys=True))[:16]


def prepare(settings: DataSettings, cache: Path, refresh: bool = False) -> Path:
    """Return a folder with train.bin, val.bin (uint8) and data.json (the report).

    It is made once, and then reused.

    train.fields and val.fields say which of FIELDS each byte belongs to. Raises UserError when
    nothing can be trained on. With `refresh` a folder that is older than this process is made anew.

    A validation split that is given is used. Else records are held out, in every mode the same: the
    split is drawn by their fields and not by the mode's text, so a record that validates in one
    mode trains in none. A text of the mode that both sides share is left out of validation.
    The records of train.bin are in the order of the data, those of val.bin in a seeded one.
    """
    dataset = settings.dataset
    with heartbeat(f"preparing DATASET {dataset}"):
        files = sources.resolve_files(dataset)  # once: there may be many
        folder = cache / cache_key(settings, files)
        with _locked(cache):
            if not refresh and files is None and not hub.commit(dataset):
                folder = _newest(cache, settings) or folder
            if not is_intact(folder) or (refresh and _made_at(folder) < PROCESS_START):
                _make(folder, settings, files)
            return folder


def _made_at(folder: Path) -> float:
    return (folder / "data.json").stat().st_mtime


def _newest(cache: Path, settings: DataSettings) -> Path | None:
    """Return the newest prepared data of a name on the hub, whose commit the hub does not say."""
    for folder in sorted((f.parent for f in cache.glob("*/data.json")), key=_made_at, reverse=True):
        if is_intact(folder):
            report = parse_json((folder / "data.json").read_text())
            if report.get("made_from") == settings.as_dict():
                when = time.strftime("%Y-%m-%d", time.localtime(_made_at(folder)))
                print(
                    f"the hub does not answer for DATASET {report['dataset']}; taking what was "
                    f"prepared on {when} of commit {report['commit'] or 'unknown'}"
                )
                return folder
    return None


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Hold the folder of prepared data, swept of what a killed process left. Raises UserError."""
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("a") as lock:
            _wait_for(lock, cache)
            for leftover in cache.glob("*.tmp"):
                shutil.rmtree(leftover)
            yield


def _wait_for(lock, cache: Path) -> None:
    """Take the lock, which another trainer that prepares data may hold for long."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that prepares data in {cache} ...")
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise UserError for an OSError of writing below `folder`, or of a file that is read there."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        file = error.filename or folder  # a failed write names no file
        if full or Path(file).is_relative_to(folder):
            raise UserError(f"{folder} cannot be written: {write_fault(error)}") from None
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def is_intact(folder: Path) -> bool:
    """Tell whether the files of prepared data have the sha256 digests that data.json has."""
    try:
        report = read_json_object(folder / "data.json")
        if not is_sealed(report):
            return False
        sources.print_if_large("checking the prepared data", [*folder.iterdir()], 50)
        sums = {IN_VAL: report.get("in_val_sha256")}  # a ready split has none
        for side in ("train", "val"):
            sums[f"{side}.bin"] = report[side]["sha256"]
            sums[f"{side}.fields"] = report[side]["fields_sha256"]
            sums[ENDS.format(side=side)] = report[side].get("ends_sha256")
        return all(sha256_file(folder / file) == digest for file, digest in sums.items() if digest)
    except (OSError, UserError):  # no such file, or no JSON object in it
        return False


def _make(folder: Path, settings: DataSettings, files: list[Path] | None) -> None:
    dataset = settings.dataset
    staging = folder.with_name(f"{folder.name}.tmp")
    staging.mkdir()
    try:
        if ready := sources.ready_split(files):
            report = _copy_split(ready, dataset, settings.mode, staging)
        else:
            report = _split(settings, staging)
        report["made_from"] = settings.as_dict()
        report["commit"] = None if files else hub.commit(dataset)
        (staging / "data.json").write_text(json.dumps(seal(report), indent=1))
        if cache_key(settings, sources.resolve_files(dataset)) != folder.name:
            raise UserError(f"DATASET {dataset} changed while it was read; start again")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or to be made anew
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _split(settings: DataSettings, folder: Path) -> dict:
    """Read and format the records, and write both sides. Returns the report. Raises UserError."""
    source = sources.open_source(settings.dataset)
    texts = write_texts(source, settings.mode, folder, settings.columns)
    report = texts.report
    report["given_validation"] = "val" in source.parts
    if report["given_validation"]:
        in_val = texts.in_val
    else:
        _check_distinct(texts, settings)
        in_val = choose_validation(texts.keys, settings.val_fraction, settings.seed)
    held_out = np.repeat(in_val, texts.counts)
    # np.unique sorts for the inverse; without it, as in np.isin, it takes ten times as long
    which = np.unique(texts.digests, return_inverse=True)[1]
    shared = held_out & np.isin(which, which[~held_out])
    report["shared"] = int(shared.sum())
    _check_sides(texts, held_out, shared, settings)
    val_texts = held_out & ~shared
    # in a seeded order, so that the first EVAL_BYTES are of all files and not of the first alone
    val = np.random.default_rng(settings.seed).permutation(np.flatnonzero(val_texts))
    np.save(folder / IN_VAL, val_texts)
    report["in_val_sha256"] = sha256_file(folder / IN_VAL)
    return report | write_sides(folder, texts.lengths, np.flatnonzero(~held_out), val)


def _check_distinct(texts: Texts, settings: DataSettings) -> None:
    """Raise UserError for data that have one distinct record, of which no split can be drawn."""
    if (texts.keys[-1] == texts.keys[-1][0]).all():
        raise NoDataError(
            f"DATASET {settings.dataset} has 1 distinct record, a split needs at least 2; "
            f"{'; '.join(describe.skip_lines(texts.report)[:3]) or 'nothing skipped'}"
            f"{'; a record of a .txt ends at a blank line' if '.txt' in settings.dataset else ''}"
        )


def _check_sides(texts: Texts, held_out, shared, settings: DataSettings) -> None:
    """Raise UserError if a side of the split has no text, or validation none of its own."""
    dataset, mode = settings.dataset, settings.mode
    n = len(texts.lengths)
    is_given = texts.report["given_validation"]
    for side, chosen in (("held out", held_out), ("left to train on", ~held_out)):
        if not chosen.any():
            cure = f"change VAL_FRACTION ({settings.val_fraction}) or SEED, or take more data"
            if is_given:
                cure = "look at the files of that split, or name those to train on alone"
            raise NoDataError(
                f"DATASET {dataset}: none of the {n:,} records of TRAINING_MODE {mode!r} is "
                f"{'; '.join([side, cure, *describe.skip_lines(texts.report)[:3]])}"
            )
    if shared.sum() == held_out.sum():
        if is_given:
            raise NoDataError(
                f"DATASET {dataset}: every text of its validation is trained on, too, in "
                f"TRAINING_MODE {mode!r}; take another validation, or another mode"
            )
        raise NoDataError(
            f"DATASET {dataset} has {len(np.unique(texts.digests))} distinct texts in "
            f"TRAINING_MODE {mode!r}, each of more records than VAL_FRACTION "
            f"({settings.val_fraction}) holds out: raise it, take more data or another mode"
        )


def load_unsplit(
    dataset: str, mode: str, folder: Path, columns: str | None = None
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return all of a data set as one side of a split.

    That is the report, the bytes, and the index in FIELDS of each byte, both uint8 of (n,).
    Of a ready split, or a validation that is given, it is the held out side. `folder` is for files
    on the way. Raises UserError when nothing of it has the fields of `mode`.
    """
    with heartbeat(f"preparing DATASET {dataset}"), _writing(folder):
        if ready := sources.ready_split(sources.resolve_files(dataset)):
            held_out = [file for file in ready if file.stem == "val"]
            report = _copy_split(held_out, f"{dataset}, held out side", mode, folder)
        else:
            source = sources.open_source(dataset)
            if "val" in source.parts:
                source = source._replace(parts={"val": source.parts["val"]})
            texts = write_texts(source, mode, folder, columns)
            report = texts.report
            report["dataset"] += ", held out side" if "val" in source.parts else ""
            every = np.arange(len(texts.lengths))
            write_sides(folder, texts.lengths, train=np.array([], int), val=every)
    stream, fields = (np.fromfile(folder / f"val.{kind}", np.uint8) for kind in ("bin", "fields"))
    return report, stream, fields


def load_as_trained(
    dataset: str, mode: str, folder: Path, columns: str | None, data: dict
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Do as load_unsplit does; without `columns` take those of a run if the data set has them.

    `data` is the report of the run's data.
    """
    trained = recorded_settings(data)
    if columns is None and trained and trained.columns:
        with suppress(NoDataError):  # the data set has other columns
            loaded = load_unsplit(dataset, mode, folder, trained.columns)
            if loaded[0]["records"] is not None:  # a ready split has no columns
                print(f"columns as in the training: {trained.columns}")
            return loaded
    return load_unsplit(dataset, mode, folder, columns)


def _copy_split(files: list[Path], dataset: str, mode: str, folder: Path) -> dict:
    """Take a split that is there, raw bytes; without .fields beside it, all is `text`. The report.

    Raises UserError if a .fields file does not fit its bytes.
    """
    sides = [file for file in files if file.suffix == ".bin"]
    sources.print_if_large(f"copying DATASET {dataset}", files, 10)
    report = {"dataset": dataset, "mode": mode, "records": None, "fields": {}, "skipped": {}}
    report |= {"structures": {"ready split": None}, "shared": 0}
    for file in sides:
        _check_bytes(file)
        side = folder / file.name
        labels = file.with_suffix(".fields")
        shutil.copyfile(file, side)
        size = file.stat().st_size
        if labels in files:
            if labels.stat().st_size != size:
                raise UserError(f"DATASET {labels} must have a byte for each of {file}'s {size:,}")
            if size and np.fromfile(labels, np.uint8).max() >= len(FIELDS):
                raise UserError(f"DATASET {labels} holds more than the {len(FIELDS)} FIELDS")
            shutil.copyfile(labels, side.with_suffix(".fields"))
        else:
            text = np.full(size, FIELDS.index("text"), np.uint8)
            text.tofile(side.with_suffix(".fields"))
        sums = {"sha256": sha256_file(side)}
        sums["fields_sha256"] = sha256_file(side.with_suffix(".fields"))
        report[file.stem] = {"records": None, "bytes": size} | sums
    return report


def _check_bytes(file: Path) -> None:
    """Raise UserError for tokens of 16 bits, as nanoGPT writes them under the same name."""
    sample = np.fromfile(file, np.uint8, 2_000_000)
    high = sample[1::2]
    is_even = file.stat().st_size % 2 == 0
    if is_even and len(high) and np.mean(high == 0) > 0.02 and high.max() <= 50_304 >> 8:
        raise UserError(
            f"DATASET {file} holds tokens of 16 bits, as nanoGPT prepares them; BDH reads bytes: "
            "give the text itself, as a .txt or .jsonl file"
        )
