"""The prepared data of a run: bytes to train on and to evaluate, and the field of each."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bdh_lib.data.describe import describe
from bdh_lib.data.formats import FIELDS
from bdh_lib.data.prepare import data_settings, prepare
from bdh_lib.data.split import Split, bytes_to_evaluate, has_field, record_ends
from bdh_lib.errors import NoDataError, UserError, escape_controls
from bdh_lib.settings import Settings, settings_dict
from bdh_lib.training.distributed import World
from bdh_lib.training.schedule import schedule_summary


class Data(NamedTuple):
    """The prepared data of a run, memory mapped."""

    report: dict  # what was read, left out and written: data.json
    train: Split  # its record_ends are what units_to_shuffle returns
    val: Split  # what evaluations read of it


def load_prepared(s: Settings, mode: str) -> Data:
    """Prepare and open the data for a mode. Raises UserError where a side is empty."""
    cache, refresh = Path(s.CHECKPOINT_DIR) / ".data", vars(s).get("refresh_data", False)
    folder = prepare(data_settings(s, mode), cache, refresh)
    data_report = json.loads((folder / "data.json").read_text())
    if empty := [side for side in ("train", "val") if not data_report[side]["bytes"]]:
        raise NoDataError(f"the {empty[0]} split of mode {mode} is empty; take more data")
    train, val = (
        [np.memmap(folder / f"{side}.{kind}", np.uint8, "r") for kind in ("bin", "fields")]
        for side in ("train", "val")
    )
    ends, val_ends = (record_ends(folder, side) for side in ("train", "val"))
    read = bytes_to_evaluate(val_ends, s.EVAL_BYTES)
    if val_ends is not None and read is not None:
        val_ends = val_ends[val_ends <= read]
    val = Split(*(array[:read] for array in val), val_ends)
    return Data(data_report, Split(*train, units_to_shuffle(ends, train[1])), val)


def units_to_shuffle(ends: np.ndarray | None, fields: np.ndarray) -> np.ndarray | None:
    """Return where each unit ends that may change its place, None where nothing can be shuffled.

    A unit is a record, or all paragraphs of plain text in a row, whose order says something.
    """
    if ends is None:
        return None
    is_text = fields[ends - 1] == FIELDS.index("text")
    ends = ends[~(is_text & np.append(is_text[1:], False))]
    return ends if len(ends) > 1 else None


def open_split(s: Settings) -> Data:
    """Prepare and open the data of a run. Raises UserError where they are too few for it."""
    data_report, train, val = data = load_prepared(s, s.TRAINING_MODE)
    for side, least, cure in (
        ("train", s.BLOCK_SIZE + 1, "lower BLOCK_SIZE"),
        ("val", 2, "raise VAL_FRACTION"),
    ):
        if data_report[side]["bytes"] < least:
            raise UserError(
                f"the {side} split has {data_report[side]['bytes']:,} bytes and needs {least:,} "
                f"(BLOCK_SIZE is {s.BLOCK_SIZE:,}): {cure} or take more data"
            )
    for side, split, cure in (
        ("training bytes", train, "take other data"),
        ("validation bytes read", val, "raise EVAL_BYTES"),
    ):
        if s.LOSS_ON != "all" and not has_field(split.fields, s.LOSS_ON):
            raise UserError(
                f"LOSS_ON is {s.LOSS_ON!r}, and the {len(split.bytes):,} {side} have none of it; "
                f"{cure} or set LOSS_ON to 'all'"
            )
    passes = max(1, s.EPOCHS or 1)
    blocks = math.ceil(passes * len(train.bytes) / s.BLOCK_SIZE)
    if blocks < s.GRAD_ACCUM:
        raise UserError(
            f"GRAD_ACCUM is {s.GRAD_ACCUM:,}, more micro-batches in one iteration than blocks to "
            f"train on ({blocks:,} of {s.BLOCK_SIZE:,} bytes, passes: {passes:g}); lower it"
        )
    return data


def load_split(s: Settings, world: World) -> Data:
    """Open the data as open_split does, and print what they are.

    Raises UserError where processes differ in the data or in a setting.
    """
    data_report, train, val = data = open_split(s)
    check_processes_agree(s, data_report, world)
    print(escape_controls(describe(data_report)))
    print(f"plan: {schedule_summary(s, len(train.bytes))}; "
          f"an evaluation reads {len(val.bytes):,} bytes")  # fmt: skip
    return data


def check_processes_agree(s: Settings, data_report: dict, world: World) -> None:
    """Raise UserError where processes differ in the data or in a setting, also in a user's own.

    A schedule or a loss may read it, and then the weights of the processes would drift apart.
    """
    sums = {side: data_report[side]["sha256"] for side in ("train", "val")}
    first, *others = world.all_gather_object(settings_dict(s) | sums)
    names = dict.fromkeys([*first, *(name for other in others for name in other)])
    if unlike := [k for k in names if any(other.get(k) != first.get(k) for other in others)]:
        raise UserError(f"the processes differ in {', '.join(unlike)}; give all the same")
