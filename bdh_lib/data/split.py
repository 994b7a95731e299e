"""From a data set to two files of bytes: its records are split, formatted, written and cached.

Records are read one at a time (a .json that is one list is read whole), what is on the hub by the
`datasets` library, and the prepared bytes are memory mapped, so a data set of many gigabytes needs
little memory and a resumed run needs no network.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bdh_lib.data import columns, sources
from bdh_lib.data.formats import FIELDS, REQUIRED_FIELDS, SEPARATOR, field_segments, required_fields
from bdh_lib.errors import UserError
from bdh_lib.files import parse_json, sha256_file

IN_VAL = "in_val.npy"  # in prepared data: of each record with any field, whether it validates
VAL_ENDS = "val_ends.npy"  # and where each record of val.bin ends
MOST_STRUCTURES = 20  # that are told, where each record has keys of its own
STARTED = time.time()  # about when this process started


def cache_settings(dataset: str, mode: str, val_share: float, seed: int) -> dict:
    """What prepared bytes depend on beside the data's own, as data.json keeps it."""
    how = {"split": "by record, validation shuffled", "text": "valid UTF-8, turns in a row joined"}
    return {"dataset": dataset, "mode": mode, "val_share": val_share, "seed": seed} | how


def cache_key(dataset: str, mode: str, val_share: float, seed: int) -> str:
    """Name of the prepared bytes: changes with the files (path, size, time), the commit on the hub
    or a setting.
    """
    settings = cache_settings(dataset, mode, val_share, seed)
    if files := sources.find(dataset):
        settings["dataset"] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns)
                               for f in files]  # fmt: skip
    else:
        name, config, revision, split = sources.parse_hub_name(dataset)
        settings["dataset"] = [name, config, split, sources.commit(dataset) or revision]
    key = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def prepare(
    dataset: str, mode: str, val_share: float, seed: int, cache: Path, refresh: bool = False
) -> Path:
    """Folder with train.bin, val.bin (uint8) and data.json (the report), made once and then reused.

    train.fields and val.fields say which of FIELDS each byte belongs to. Raises UserError when
    nothing can be trained on. `refresh` makes what was made before this process began anew.

    Held out is held out in every mode: the split is of records, drawn by their fields and not by
    the mode's text, so a record that validates in one mode trains in none. A text of the mode that
    records of both sides share is left out of validation, so that no text is on both sides.
    The records of train.bin are in the order of the data, those of val.bin in a seeded one.
    """
    how = (dataset, mode, val_share, seed)
    folder = cache / cache_key(*how)
    with _locked(cache):
        if not refresh and sources.find(dataset) is None and not sources.commit(dataset):
            folder = _newest(cache, cache_settings(*how)) or folder
        if not is_intact(folder) or (refresh and _made_at(folder) < STARTED):
            _make(folder, *how)
        return folder


def _made_at(folder: Path) -> float:
    return (folder / "data.json").stat().st_mtime


def _newest(cache: Path, made_from: dict) -> Path | None:
    """The newest prepared data of a name on the hub, for when the hub does not tell its commit."""
    for folder in sorted((f.parent for f in cache.glob("*/data.json")), key=_made_at, reverse=True):
        if is_intact(folder):
            report = parse_json((folder / "data.json").read_text())
            if report.get("made_from") == made_from:
                when = time.strftime("%Y-%m-%d", time.localtime(_made_at(folder)))
                print(
                    f"the hub does not tell of DATASET {report['dataset']}; taking what was "
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
            for litter in cache.glob("*.tmp"):
                shutil.rmtree(litter)
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
    """Tell an OSError of writing below `folder`, or of a file that is read there, as UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        file = error.filename or folder  # a failed write names no file
        reason = error.strerror or error
        if full or Path(file).is_relative_to(folder):
            raise UserError(f"{folder} cannot be written: {reason}") from None
        raise UserError(f"{file} cannot be read: {reason}") from None


def is_intact(folder: Path) -> bool:
    """Whether prepared data are whole: each side as long as, and the bytes that, data.json says."""
    try:
        report = parse_json((folder / "data.json").read_text())
        sources.print_if_large(
            "checking the prepared data", [*folder.iterdir()], 50 * sources.LARGE
        )
        if report.pop("sha256") != _sha256_of(report):
            return False
        for side in ("train", "val"):
            for kind, name in (("bin", "sha256"), ("fields", "fields_sha256")):
                if sha256_file(folder / f"{side}.{kind}") != report[side][name]:
                    return False
        for name, file in (("in_val_sha256", IN_VAL), ("val_ends_sha256", VAL_ENDS)):
            if (expected := report.get(name)) and sha256_file(folder / file) != expected:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _sha256_of(report: dict) -> str:
    return hashlib.sha256(json.dumps(report).encode()).hexdigest()


def _make(folder, dataset, mode, val_share, seed):
    making = folder.with_name(f"{folder.name}.tmp")
    making.mkdir()
    try:
        if ready := sources.ready_split(dataset):
            report = _copy_split(ready, dataset, mode, making)
        else:
            report = _split(dataset, mode, val_share, seed, making)
        report["made_from"] = cache_settings(dataset, mode, val_share, seed)
        report["commit"] = None if sources.find(dataset) else sources.commit(dataset)
        sealed = report | {"sha256": _sha256_of(report)}
        (making / "data.json").write_text(json.dumps(sealed, indent=1))
        if cache_key(dataset, mode, val_share, seed) != folder.name:
            raise UserError(f"DATASET {dataset} changed while it was read; start again")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or to be made anew
        making.replace(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _split(dataset: str, mode: str, val_share: float, seed: int, folder: Path) -> dict:
    """Read, format and deal out the records; the report. Raises UserError."""
    report, lengths, texts, keys = _format_all(dataset, mode, folder)
    if len(np.unique(keys[-1])) < 2:
        raise UserError(
            f"DATASET {report['dataset']} has 1 distinct record, a split needs at least 2; "
            f"{'; '.join(skip_lines(report)[:3]) or 'nothing skipped'}"
            f"{'; a record of a .txt ends at a blank line' if '.txt' in dataset else ''}"
        )
    in_val = _choose_validation(keys, val_share, seed)
    served = lengths > 0
    for side, has in (("held out", in_val), ("left to train on", ~in_val)):
        if not np.any(has & served):
            raise UserError(
                f"DATASET {dataset}: none of the {served.sum():,} records of TRAINING_MODE "
                f"{mode!r} is {side}; change VAL_FRACTION ({val_share}) or SEED, or take more data"
                f"{'; '.join(['', *skip_lines(report)[:3]])}"
            )
    shared = in_val & served & np.isin(texts, texts[served & ~in_val])
    report["shared"] = int(shared.sum())
    if np.all(shared >= (in_val & served)):
        raise UserError(
            f"DATASET {dataset} has {len(np.unique(texts[served]))} distinct texts in "
            f"TRAINING_MODE {mode!r}, each of more records than VAL_FRACTION ({val_share}) holds "
            "out: raise it, take more data or another mode"
        )
    validates = served & in_val & ~shared
    # in a seeded order, so that the first EVAL_BYTES are of all files and not of the first alone
    val = np.random.default_rng(seed).permutation(np.flatnonzero(validates))
    np.save(folder / IN_VAL, validates)
    np.save(folder / VAL_ENDS, np.cumsum(lengths[val] + len(SEPARATOR)) - len(SEPARATOR))
    for name, file in (("in_val_sha256", IN_VAL), ("val_ends_sha256", VAL_ENDS)):
        report[name] = sha256_file(folder / file)
    return report | _write_split(folder, lengths, np.flatnonzero(served & ~in_val), val)


def _copy_split(files: list[Path], dataset: str, mode: str, folder: Path) -> dict:
    """Take a split that is there, raw bytes; without .fields beside it, all is `text`. The report.

    Raises UserError where a .fields file does not fit its bytes.
    """
    sides = [file for file in files if file.suffix == ".bin"]
    sources.print_if_large(f"copying DATASET {dataset}", files, 10 * sources.LARGE)
    report = {"dataset": dataset, "mode": mode, "records": None, "fields": {}, "skipped": {}}
    report |= {"structures": {"ready split": None}, "shared": 0}
    for file in sides:
        side, labels = folder / file.name, file.with_suffix(".fields")
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


def _format_all(dataset, mode, folder, wanted=None):
    """Write the training text of every record that has one in this mode, with the fields `wanted`.

    Gives a report and, of each record that has one in any mode, the length of its text in bytes (0:
    none in this mode), the text's digest, and the digests of system, instruction and all fields.
    """
    wanted = wanted or REQUIRED_FIELDS[mode]
    structures, skipped, count, size = Counter(), Counter(), Counter(), Counter()
    first, exchanges = {}, 0  # record skipped for each reason; a chat holds several exchanges
    lengths, texts, keys = array("Q"), array("Q"), array("Q")
    with (folder / "all.bin").open("wb") as out, (folder / "all.fields").open("wb") as labels:
        for record in sources.read_records(dataset):
            structure, contents = (
                columns.detect(record) if isinstance(record, dict) else ("bad", [record])
            )
            structures[structure] += 1
            exchanges += sum(isinstance(fields, dict) for fields in contents)
            for fields in contents:
                usable = columns.valid_fields(fields)
                for name, value in usable.items():
                    count[name] += 1
                    size[name] += len(value)
                if reason := columns.invalid_reason(
                    fields, ("text",) if structure == "text" else wanted
                ):
                    skipped[reason] += 1
                    first.setdefault(reason, structures.total())
                length, digest = 0, hashlib.blake2b(digest_size=8)
                for field, text in [] if reason else field_segments(usable, mode):
                    part = text.encode()
                    out.write(part)
                    digest.update(part)
                    n = len(part)
                    del part  # a record may be large
                    labels.write(bytes([FIELDS.index(field)]) * n)
                    length += n
                if usable:
                    lengths.append(length)
                    texts.append(int.from_bytes(digest.digest()))
                    by = (usable.get("system"), usable.get("instruction"), sorted(usable.items()))
                    keys.extend(_digest(key) if key else 0 for key in by)
    if count.keys() != {"text"} and wanted != required_fields(mode, count):  # known after a pass
        return _format_all(dataset, mode, folder, required_fields(mode, count))
    report = {
        "dataset": dataset,
        "mode": mode,
        "records": structures.total(),
        "exchanges": exchanges,
        "structures": dict(structures.most_common(MOST_STRUCTURES)),
        "fields": {f: {"records": n, "mean_length": size[f] / n} for f, n in count.items()},
        "skipped": dict(skipped.most_common()),
        "first_skipped": first,
    }
    if not any(lengths):
        raise UserError(_cannot_serve(report))
    return report, np.array(lengths), np.array(texts), np.array(keys).reshape(-1, 3).T


def _digest(key: str | list[tuple[str, str]]) -> int:
    """64-bit blake2b of json.dumps(key), fed in pieces of 1 MB: a record may be large."""
    if isinstance(key, str):
        texts, joints = [key], ['"', '"']
    else:
        texts = [text for pair in key for text in pair]
        joints = ['[["', *(['", "', '"], ["'] * len(key))[:-1], '"]]']
    digest = hashlib.blake2b(digest_size=8)
    for joint, text in zip(joints, [*texts, ""], strict=True):
        digest.update(joint.encode())
        for i in range(0, len(text), 10**6):
            digest.update(json.dumps(text[i : i + 10**6])[1:-1].encode())
    return int.from_bytes(digest.digest())


def load_unsplit(dataset: str, mode: str, folder: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """All of a data set as one side of a split: report, bytes, and the index in FIELDS of each.

    Of a ready split it is the held out side. `folder` is for files on the way. Raises UserError
    when nothing of it has the fields of `mode`.
    """
    with _writing(folder):
        if ready := sources.ready_split(dataset):
            held_out = [file for file in ready if file.stem == "val"]
            report = _copy_split(held_out, f"{dataset}, held out side", mode, folder)
        else:
            report, lengths, _, _ = _format_all(dataset, mode, folder)
            _write_split(folder, lengths, np.array([], int), np.flatnonzero(lengths))
    stream, fields = (np.fromfile(folder / f"val.{kind}", np.uint8) for kind in ("bin", "fields"))
    return report, stream, fields


def skip_lines(report: dict) -> list[str]:
    """How many records were skipped and why, most first; a line of a .jsonl file is a record."""
    first = report.get("first_skipped", {})
    return [
        f"skipped {n:,}: {reason}" + (f" (first: record {first[reason]:,})" if first else "")
        for reason, n in report["skipped"].items()
    ]


def _cannot_serve(report: dict) -> str:
    mode, has = report["mode"], report["fields"]
    if not report["records"]:
        return f"DATASET {report['dataset']} is empty: it has no record"
    wanted = required_fields(mode, has)
    lacks = [f for f in wanted if f not in has]
    works = [m for m in REQUIRED_FIELDS if set(required_fields(m, has)) <= set(has)]
    return (
        f"DATASET {report['dataset']} has no record for TRAINING_MODE {mode!r}, which needs "
        f"{', '.join(wanted)}: lacking {', '.join(lacks) or 'them together in one record'}. "
        f"Structure: {', '.join(report['structures']) or 'no records'}; "
        f"{'; '.join(skip_lines(report)[:3]) or 'nothing skipped'}. "
        f"Modes that would work: {', '.join(works) or 'none'}"
    )


def _choose_validation(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """For each record, whether it validates: a seeded draw of about `share` of them.

    Half are drawn by whole system texts (or instructions, where systems are too few or none), with
    all their records, since modes that train on one field need texts of it seen nowhere else; the
    rest by all fields. A text of more records than there is room for is never drawn.
    """
    rng, in_val = np.random.default_rng(seed), np.zeros(keys.shape[1], bool)
    for key, part in zip(keys, (share / 2, share / 2, share), strict=True):
        texts, which = np.unique(key, return_inverse=True)
        adds = np.bincount(which, ~in_val)
        room = round(part * np.count_nonzero(key)) - in_val.sum()  # 0: without this field
        order = rng.permutation(len(texts))
        order = order[(adds[order] <= room) & (texts[order] != 0)]
        in_val |= np.isin(which, order[np.cumsum(adds[order]) <= room])
    if not in_val.any():  # few records: a share of them is none, but one text must be
        in_val = which == rng.integers(len(texts))
    return in_val


def _write_split(folder: Path, lengths: np.ndarray, train: np.ndarray, val: np.ndarray) -> dict:
    """Write the records of these numbers to train and val, in their order, a blank line between."""
    sides = {"train": train, "val": val}
    report = {side: {"records": len(which)} for side, which in sides.items()}
    begins = np.cumsum(lengths) - lengths
    for kind, separator in (("bin", SEPARATOR.encode()), ("fields", bytes(len(SEPARATOR)))):
        with (folder / f"all.{kind}").open("rb") as records:
            for side, which in sides.items():
                parts = zip(begins[which].tolist(), lengths[which].tolist(), strict=True)
                size, digest = _copy_parts(records, parts, separator, folder / f"{side}.{kind}")
                name = "sha256" if kind == "bin" else "fields_sha256"
                report[side] |= {"bytes": size, name: digest}
        (folder / f"all.{kind}").unlink()
    return report


def _copy_parts(source, parts: Iterable, separator: bytes, target: Path) -> tuple[int, str]:
    """Write the parts (begin, length) of `source` to a file; gives its size and its sha256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for begin, length in sources.shown(parts, f"writing {target.stem}"):
            source.seek(begin)
            piece = (separator if out.tell() else b"") + source.read(length)
            out.write(piece)
            digest.update(piece)
        return out.tell(), digest.hexdigest()


def bytes_to_evaluate(folder: Path, limit: int | None) -> int | None:
    """Bytes of val.bin that an evaluation reads: whole records, at least one, else up to `limit`.

    A ready split does not tell where its records end and is cut at `limit`.
    """
    if limit is None or not (folder / VAL_ENDS).is_file():
        return limit
    ends = np.load(folder / VAL_ENDS)
    whole_ones = int(np.searchsorted(ends, limit, side="right"))
    return int(ends[max(0, whole_ones - 1)])


def has_field(fields: np.ndarray, name: str) -> bool:
    """Whether any byte is of this field; `fields` may be larger than the memory."""
    million, wanted = 10**6, FIELDS.index(name)
    return any(wanted in fields[i : i + million] for i in range(0, len(fields), million))


def data_changes(there: dict, here: dict) -> dict[str, str]:
    """How the bytes of two reports differ, under "train data" and "val data", where they do."""
    changes = {}
    for side in ("train", "val"):
        if there[side]["sha256"] != here[side]["sha256"]:
            one, other = (
                f"{count_text(of[side]['records'])}{of[side]['bytes']:,} bytes, {dataset_label(of)}"
                for of in (there, here)
            )
            change = (
                f"there {one}, here {other}" if one != other else f"other bytes, as many: {one}"
            )
            changes[f"{side} data"] = f"{side} data: {change}"
    return changes


def dataset_label(report: dict) -> str:
    """The data set of a report, with its commit where it is on the hub."""
    commit = report.get("commit")
    return report["dataset"] + (f" (commit {commit})" if commit else "")


def count_text(records: int | None) -> str:
    """So many records, before what else is told of them; of a ready split, which has none, ""."""
    return "" if records is None else f"{records:,} records, "


def describe(report: dict) -> str:
    """The report of `prepare` for people: structure, fields, what was skipped, the split."""
    lines = [f"data: {dataset_label(report)}, {count_text(report['records'])}mode {report['mode']}"]
    for structure, n in report["structures"].items():
        share = "" if n is None else f": {n / report['records']:.1%} of records"
        lines.append(f"  structure {structure}{share}")
    exchanges = report.get("exchanges", report["records"])  # a ready split has none
    if exchanges != report["records"]:
        lines.append(f"  {exchanges:,} exchanges in them, each a record from here on")
    for name, field in report["fields"].items():
        share, mean = field["records"] / exchanges, field["mean_length"]
        lines.append(
            f"  field {name}: in {share:.1%} of records, mean length {mean:,.0f} characters"
        )
    has, mode = report["fields"], report["mode"]
    if "response" in has and required_fields(mode, has) != REQUIRED_FIELDS[mode]:
        lines.append("  no record has a system text: full is trained without its section")
    lines += [f"  {skip}" for skip in skip_lines(report)]
    if report["shared"]:
        lines.append(f"  left out of validation {report['shared']:,}: text also in training")
    for side, name in (("train", "training"), ("val", "validation")):
        lines.append(
            f"  {name}: {count_text(report[side]['records'])}{report[side]['bytes']:,} bytes"
        )
    return "\n".join(lines)
