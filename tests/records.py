"""Records, and files that hold them, for tests of the data."""

import csv
import io
import json
from pathlib import Path

from bdh_lib.data import prepare as preparing
from bdh_lib.data import sources
from bdh_lib.data.prepare import DataSettings

N = 20  # records of a file


def jsonl(*rows):
    """The lines of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows(make, n=N):
    """The records make(0) .. make(n - 1)."""
    return [make(i) for i in range(n)]


def asked(i):
    """Record number i of instruction and response."""
    return {"instruction": f"ask {i}", "response": f"reply {i}"}


def talk(*turns, key="messages", role="role", content="content"):
    """A chat of turns, each a pair of speaker and text."""
    return {key: [{role: speaker, content: text} for speaker, text in turns]}


def table(delimiter, header=("instruction", "response")):
    """The text of a CSV file of N records, whose responses hold a comma."""
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(
        [header, *((f"ask {i}", f"a, {i}") for i in range(N))]
    )
    return out.getvalue()


def excerpt(i, last="reply"):
    """The training text of asked(i) in mode full."""
    return f"### Instruction:\nask {i}\n\n### Response:\n{last} {i}\n---"


def prepared(source, cache, mode="full", columns=None):
    """The report of prepared data, and the text of both sides."""
    folder = preparing.prepare(DataSettings(str(source), mode, 0.1, 1, columns), cache)
    sides = [(folder / f"{side}.bin").read_bytes() for side in ("train", "val")]
    return json.loads((folder / "data.json").read_text()), b"\n\n".join(sides).decode()


def split_folder(folder, *names):
    """A folder of JSONL files, of 20 records for training and 5 for any other split."""
    for name in names:
        (file := folder / name).parent.mkdir(parents=True, exist_ok=True)
        side = sources.split_of(Path(name)) or "extra"
        file.write_text(jsonl(*({"prompt": f"{side} q{i}", "completion": f"{side} a{i}"}
                                for i in range(20 if side == "train" else 5))))  # fmt: skip
    return folder
