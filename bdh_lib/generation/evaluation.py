"""`python generate.py RUN --evaluate DATA`: the data, and a table of the loss by field."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdh_lib.data.describe import count_text, skip_lines
from bdh_lib.data.formats import FIELDS, LABEL_OF
from bdh_lib.data.prepare import load_as_trained
from bdh_lib.data.questions import settings_of_run
from bdh_lib.data.split import Split
from bdh_lib.errors import UserError
from bdh_lib.tables import format_table
from bdh_lib.units import bits_per_byte


class EvaluationData(NamedTuple):
    """All of a data set as one side of a split; of a ready split its validation."""

    report: dict
    split: Split
    is_of_run: bool  # whether the run trained on all of it but its validation


def read_data(dataset: str, mode: str, columns: str | None, trained_on: dict) -> EvaluationData:
    """Read a data set in a mode; `trained_on` is the report of the run's data. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        report, stream, fields = load_as_trained(dataset, mode, Path(folder), columns, trained_on)
        is_ready = report["records"] is None  # then its validation alone was read
        settings = not is_ready and settings_of_run(dataset, report, trained_on, Path(folder))
    if len(stream) < 2:
        raise UserError(f"{dataset} has {len(stream)} byte; a loss needs at least 2")
    return EvaluationData(report, Split(stream, fields), bool(settings))


def describe_data(data: EvaluationData, T: int) -> str:
    """Say what is evaluated in blocks of T bytes, and what was left out of it."""
    report = data.report
    lines = [
        f"{report['dataset']}: {count_text(report['records'])}mode {report['mode']}, "
        f"{len(data.split.bytes):,} bytes in blocks of {T:,}, as the trainer validates",
        *(f"  {skip}" for skip in skip_lines(report)),
    ]
    if data.is_of_run:
        lines.append(
            "  of these the run trained on all but its validation, whose loss is in its log"
        )
    return "\n".join(lines)


def loss_table(whole: float, means: dict[str, float], split: Split) -> str:
    """Return a table of the loss on all targets of a split and by field; both in nats per byte."""
    count = np.bincount(split.fields[1:], minlength=len(FIELDS)).tolist()
    n_bytes = dict(zip(LABEL_OF.values(), count, strict=True)) | {"whole": sum(count)}
    rows = [("field", "bytes", "share", "nats/byte", "bits/byte")]
    for name, mean in (means | {"whole": whole}).items():
        n = n_bytes[name]
        share = n / n_bytes["whole"]
        rows.append((name, f"{n:,}", f"{share:.1%}", f"{mean:.4f}", f"{bits_per_byte(mean):.4f}"))
    return format_table(rows)
