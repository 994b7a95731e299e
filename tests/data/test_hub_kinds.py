"""Data sets of each kind on a hub, read by a process of their own."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT
from hub_stub import COMMIT, serving
from records import split_folder

CARD = """---
configs:
{}---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a hub with a data set of each kind."""
    root = tmp_path_factory.mktemp("hub")
    sets = root / "datasets" / "user"
    split_folder(sets, "plain/data.jsonl")
    split_folder(sets / "splits", "data/train.jsonl", "data/validation.jsonl", "data/test.jsonl")
    split_folder(sets / "sft", "train_sft.jsonl", "test_sft.jsonl")
    names = "".join(f"  - split: {n}\n    path: {n}.jsonl\n" for n in ("train_sft", "test_sft"))
    (sets / "sft/README.md").write_text(CARD.format(f"- config_name: a\n  data_files:\n{names}"))
    split_folder(sets / "configs", "main/train.jsonl", "hard/train.jsonl")
    names = "".join(f"- config_name: {n}\n  data_files: {n}/*\n" for n in ("main", "hard"))
    (sets / "configs/README.md").write_text(CARD.format(names))
    (sets / "script").mkdir()
    (sets / "script/script.py").write_text("import datasets\n")
    (sets / "gated").mkdir()
    (sets / "gated/GATED").touch()
    (sets / "nothing").mkdir()
    (sets / "nothing/notes.xyz").touch()
    with serving(root) as (address, _):
        yield address


def plan_data(address, tmp_path, name):
    """What a process prints that prepares a data set of the hub."""
    script = (
        "import json, sys; from pathlib import Path\n"
        "from bdh_lib.data.describe import describe\n"
        "from bdh_lib.data.prepare import DataSettings, UserError, prepare\n"
        "try: folder = prepare(DataSettings(sys.argv[1], 'full', 0.1, 1), Path(sys.argv[2]))\n"
        "except UserError as error: sys.exit(f'error: {error}')\n"
        "print(describe(json.loads((folder / 'data.json').read_text())))"
    )
    env = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    run = [sys.executable, "-c", script, name, tmp_path / "cache"]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


HUB = {
    "user/plain": ["5 records", f"commit {COMMIT}", "training: 4 records"],
    "user/splits": ["validation, as given: 5", "the test split, 5 records", "user/splits#test"],
    "user/splits#test": ["5 records", "training: 4 records"],
    "user/sft": ["the splits train_sft, test_sft and no split to train on", "user/sft#train_sft"],
    "user/sft#train_sft": ["20 records"],
    "user/configs": ["several configurations, main, hard: name one, as in user/configs:main"],
    "user/configs:main": ["20 records"],
    "user/script": ["is a script, which is not run here", "@refs/convert/parquet"],
    "user/gated": ["is gated", "hf auth login"],
    "user/mispelt": ["not on the hub, or private there", "--dataset FILE"],
    "user/nothing": ["holds no data file of a known kind"],
}


@pytest.mark.parametrize("name", HUB)
def test_each_kind_of_data_on_the_hub(hub, tmp_path, name):
    output = plan_data(hub, tmp_path, name)
    for part in HUB[name]:
        assert part in output, output


def test_what_was_read_from_the_hub_needs_no_network_later(hub, tmp_path):
    first = plan_data(hub, tmp_path, "user/plain")
    later = plan_data("http://127.0.0.1:9", tmp_path, "user/plain")
    assert "training: 4 records" in first
    assert "taking what was prepared on" in later and "training: 4 records" in later
