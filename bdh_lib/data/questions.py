"""Questions with their true responses, cut out of the bytes of records in mode `full`."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdh_lib.data.formats import FIELDS, SEPARATOR, STOP
from bdh_lib.data.prepare import DataSettings, load_as_trained, prepare, recorded_settings
from bdh_lib.data.split import Split, last_fields, record_ends
from bdh_lib.errors import UserError

N_QUESTIONS = 3  # that the trainer asks at each evaluation
MAX_READ = 1000  # records among which choose_questions looks
RESPONSE = FIELDS.index("response")
COUNTS = ("records", "texts", "fields", "bytes_read")  # of a report: equal for the same data


class Question(NamedTuple):
    """A record up to its last response, as the model reads it, and that response."""

    prompt: bytes
    truth: str
    structure: str  # of the record: "system/instruction/response"


def question_numbers(records: Split) -> np.ndarray:
    """Return the numbers of the records that end in a response, as in mode `full` alone."""
    if records.record_ends is None:
        return np.array([], int)
    return np.flatnonzero(last_fields(records.fields, records.record_ends) == RESPONSE)


def cut_question(records: Split, i: int) -> Question:
    """Return record number `i`, which ends in a response, as a question."""
    ends = records.record_ends
    begin = int(ends[i - 1]) if i else 0
    end = int(ends[i]) - len(SEPARATOR)
    fields = np.array(records.fields[begin:end])
    at = begin + int(np.flatnonzero(fields != RESPONSE)[-1]) + 1
    truth = bytes(records.bytes[at:end]).decode().removesuffix(STOP)
    return Question(bytes(records.bytes[begin:at]), truth, structure_of(fields))


def structure_of(fields: np.ndarray) -> str:
    """Return a name for the structure of a record, by the field of each of its bytes."""
    names = [FIELDS[i] for i in fields[np.flatnonzero(np.diff(fields, prepend=255))] if i]
    several = ", several turns" if names.count("response") > 1 else ""
    return "/".join(dict.fromkeys(names)) + several


def choose_questions(records: Split, n: int, length: int, max_new_tokens: int) -> list[Question]:
    """Return up to `n` questions, always the same: the first of each structure, then the second.

    Records of up to `length` bytes with a response of up to `max_new_tokens` bytes come first, then
    those that are least too long.
    """
    numbers = question_numbers(records)[:MAX_READ]
    excess = {}  # by question, the fitting ones first
    for question in (cut_question(records, i) for i in numbers):
        n_truth = len(question.truth.encode())
        n_bytes = len(question.prompt) + n_truth + len(STOP)
        excess[question] = (max(0, n_bytes - length), max(0, n_truth - max_new_tokens))
    of_structure = Counter()  # questions so far
    rank = {}
    for question in sorted(excess, key=excess.get):
        rank[question] = (excess[question][0], of_structure[question.structure])
        of_structure[question.structure] += 1
    return sorted(rank, key=rank.get)[:n]


def load_questions(
    dataset: str, columns: str | None, data: dict, folder: Path
) -> tuple[str, Split]:
    """Return a line that describes the records with questions, and the records.

    They are those that a run held out, where `data`, the report of its data, is of the same data
    set; else all. `folder` is for files on the way. Raises UserError without questions.
    """
    about, stream, fields = load_as_trained(dataset, "full", folder, columns, data)
    line = f"{about['dataset']}: all its records, also any that the model was trained on"
    cache = folder / "prepared"
    if settings := settings_of_run(dataset, about, data, cache):
        folder = prepare(settings._replace(mode="full"), cache)  # the same records in every mode
        line = f"{dataset}: the records that the run held out"
        stream, fields = (
            np.fromfile(folder / f"val.{kind}", np.uint8) for kind in ("bin", "fields")
        )
    records = Split(stream, fields, record_ends(folder, "val"))
    if records.record_ends is None:
        raise UserError(f"{dataset} is a ready split, which does not say where its records end")
    if not len(question_numbers(records)):
        raise UserError(f"{dataset} has no response to compare an answer with")
    return line, records


def settings_of_run(dataset: str, about: dict, data: dict, cache: Path) -> DataSettings | None:
    """Return how a run's data were prepared, if `dataset` holds them; None if its bytes are others.

    `about` is the report of `dataset`, `data` that of the run's data. The data are prepared anew in
    `cache`, and compared by sha256.
    """
    same_counts = all(about.get(name) == data.get(name) for name in COUNTS)
    if dataset != data.get("dataset") and not same_counts:
        return None  # not worth the time
    if not (settings := recorded_settings(data)):
        return None
    settings = settings._replace(dataset=dataset)
    try:
        report = json.loads((prepare(settings, cache) / "data.json").read_text())
    except UserError:  # the data changed since
        return None
    for side in ("train", "val"):
        trained = data.get(side)
        if not isinstance(trained, dict) or trained.get("sha256") != report[side]["sha256"]:
            return None
    return settings
