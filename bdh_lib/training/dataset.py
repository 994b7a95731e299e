"""The prepared data of a run: bytes to train on and to evaluate, and the field of each."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdh_lib.data.formats import FIELDS
from bdh_lib.data.prepare import data_settings, prepare
from bdh_lib.data.split import Split, bytes_to_evaluate, has_field, last_fields, record_ends
from bdh_lib.errors import NoDataError, UserError
from bdh_lib.settings import Settings, settings_dict
from bdh_lib.training.distributed import World


class Data(NamedTuple):
    """The prepared data of a run, memory mapped."""

    report: dict  # what was read, left out and written: data.json
    train: Split  # its record_ends are what units_to_shuffle returns
    val: Split  # what evaluations read of it


def open_mode_data(s: Settings, mode: str) -> Data:
    """Prepare and open the data of any mode. Raises UserError if a side is empty."""
    cache = Path(s.CHECKPOINT_DIR) / ".data"
    folder = prepare(data_settings(s, mode), cache, s.refresh_data)
    data_report = json.loads((folder / "data.json").read_text())
    for side in ("train", "val"):
        if not data_report[side]["bytes"]:
            raise NoDataError(f"the {side} split of mode {mode} is empty; take more data")
    return Data(data_report, _open_train(folder), _open_val(folder, s.EVAL_BYTES))


def _open_train(folder: Path) -> Split:
    stream, fields = _map_side(folder, "train")
    return Split(stream, fields, units_to_shuffle(record_ends(folder, "train"), fields))


def _open_val(folder: Path, limit: int | None) -> Split:
    """Open what evaluations read: whole records of up to `limit` bytes (bytes_to_evaluate)."""
    stream, fields = _map_side(folder, "val")
    ends = record_ends(folder, "val")
    read = bytes_to_evaluate(ends, limit)
    if ends is not None and read is not None:
        ends = ends[ends <= read]
    return Split(stream[:read], fields[:read], ends)


def _map_side(folder: Path, side: str) -> tuple[np.memmap, np.memmap]:
    """Map the bytes of a side, and their fields, into memory: both uint8, of one length."""
    return tuple(np.memmap(folder / f"{side}.{kind}", np.uint8, "r") for kind in ("bin", "fields"))


def units_to_shuffle(ends: np.ndarray | None, fields: np.ndarray) -> np.ndarray | None:
    """Return where each unit ends that may change its place, None if nothing can be shuffled.

    A unit is a record, or all paragraphs of plain text in a row, whose order says something.
    """
    if ends is None:
        return None
    is_text = last_fields(fields, ends) == FIELDS.index("text")
    ends = ends[~(is_text & np.append(is_text[1:], False))]
    return ends if len(ends) > 1 else None


def open_run_data(s: Settings) -> Data:
    """Prepare and open the data of a run. Raises UserError if it cannot train on them."""
    data = open_mode_data(s, s.TRAINING_MODE)
    check_lengths(s, data.report)
    check_loss_on(s, data)
    check_grad_accum(s, len(data.train.bytes))
    return data


def check_lengths(s: Settings, data_report: dict) -> None:
    """Raise UserError for a side that is shorter than one sequence to train on or to evaluate."""
    for side, least, cure in (
        ("train", s.BLOCK_SIZE + 1, "lower BLOCK_SIZE"),
        ("val", 2, "raise VAL_FRACTION"),
    ):
        if data_report[side]["bytes"] < least:
            raise UserError(
                f"the {side} split has {data_report[side]['bytes']:,} bytes and needs {least:,} "
                f"(BLOCK_SIZE is {s.BLOCK_SIZE:,}): {cure} or take more data"
            )


def check_loss_on(s: Settings, data: Data) -> None:
    """Raise UserError for a side without a byte of the field that LOSS_ON counts."""
    for side, split, cure in (
        ("training bytes", data.train, "take other data"),
        ("validation bytes read", data.val, "raise EVAL_BYTES"),
    ):
        if s.LOSS_ON != "all" and not has_field(split.fields, s.LOSS_ON):
            raise UserError(
                f"LOSS_ON is {s.LOSS_ON!r}, and the {len(split.bytes):,} {side} have none of it; "
                f"{cure} or set LOSS_ON to 'all'"
            )


def check_grad_accum(s: Settings, n_bytes: int) -> None:
    """Raise UserError if a step has more micro-batches than there are blocks in all epochs.

    Without EPOCHS the blocks of one are counted.
    """
    epochs = max(1, s.EPOCHS or 1)
    blocks = math.ceil(epochs * n_bytes / s.BLOCK_SIZE)
    if blocks < s.GRAD_ACCUM:
        raise UserError(
            f"GRAD_ACCUM is {s.GRAD_ACCUM:,}, more micro-batches in one iteration than blocks to "
            f"train on ({blocks:,} of {s.BLOCK_SIZE:,} bytes, epochs: {epochs:g}); lower it"
        )


def check_processes_agree(s: Settings, data_report: dict, world: World) -> None:
    """Raise UserError if processes differ in the data or in a setting, also in a user's own.

    A schedule or a loss may read it, and then the weights of the processes would drift apart.
    """
    sums = {side: data_report[side]["sha256"] for side in ("train", "val")}
    first, *others = world.all_gather_object(settings_dict(s) | sums)
    names = dict.fromkeys([*first, *(name for other in others for name in other)])
    if unlike := [k for k in names if any(other.get(k) != first.get(k) for other in others)]:
        raise UserError(f"the processes differ in {', '.join(unlike)}; give all the same")
