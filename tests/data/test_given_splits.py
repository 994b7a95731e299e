"""Data that come with splits of their own."""

from pathlib import Path

import pytest
from records import jsonl, prepared, split_folder

from bdh_lib.data import hub as hub_access
from bdh_lib.data import prepare as preparing
from bdh_lib.data import sources
from bdh_lib.data.describe import describe
from bdh_lib.data.prepare import DataSettings, load_unsplit
from bdh_mlx import UserError


@pytest.mark.parametrize("val", ["valid", "val", "validation", "dev"])
@pytest.mark.parametrize(
    "names", ["{}.jsonl", "my_{}_v2.jsonl", "{}/a.jsonl", "{}-00000-of-1.jsonl"]
)
def test_splits_that_are_given_are_used(tmp_path, val, names):
    folder = split_folder(tmp_path / "set", *(names.format(s) for s in ("train", val, "test")))
    report, text = prepared(folder, tmp_path / "cache")
    assert (report["train"]["records"], report["val"]["records"]) == (20, 5)
    assert "test q" not in text
    settings = DataSettings(str(folder), "full", 0.1, 1)
    files = preparing.prepare(settings, tmp_path / "cache")
    sides = [(files / f"{side}.bin").read_text() for side in ("train", "val")]
    assert [side.count("train q") for side in sides] == [20, 0]
    assert [side.count("val q") for side in sides] == [0, 5]
    printed = describe(report)
    assert "validation, as given: 5 records" in printed and "say little of the loss" in printed
    report["val"]["bytes"] = 1000
    assert "say little of the loss" not in describe(report)
    assert f"not read: the test split, {Path(names.format('test')).name}" in printed
    assert f"--evaluate {folder}#test" in printed
    about, stream, _ = load_unsplit(f"{folder}#test", "full", tmp_path)
    assert about["records"] == 5 and b"test q3" in stream.tobytes()
    about, stream, _ = load_unsplit(str(folder), "full", tmp_path)
    assert "held out side" in about["dataset"] and b"val a4" in stream.tobytes()
    assert b"train" not in stream.tobytes()


def test_a_tenth_is_held_out_where_no_validation_is_given(tmp_path):
    folder = split_folder(tmp_path / "set", "train.jsonl", "test.jsonl", "more.jsonl")
    report, text = prepared(folder, tmp_path / "cache")
    assert report["records"] == 25 and "test q" not in text and "extra q3" in text
    only = prepared(f"{folder}#train", tmp_path / "cache")[0]
    assert only["records"] == 20


def test_splits_that_cannot_be_told_apart_are_asked_for(tmp_path):
    folder = split_folder(tmp_path / "set", "validation.jsonl", "test.jsonl")
    with pytest.raises(UserError, match=r"splits validation, test and no split to train.*#val"):
        prepared(folder, tmp_path / "cache")
    with pytest.raises(UserError, match="no files of a split 'tset'; it has: test, val"):
        prepared(f"{folder}#tset", tmp_path / "cache")
    plain = split_folder(tmp_path / "plain", "a.jsonl", "train.jsonl")
    assert prepared(plain, tmp_path / "cache")[0]["records"] == 25


def test_a_validation_that_cannot_serve_is_told_as_such(tmp_path):
    folder = split_folder(tmp_path / "set", "train.jsonl", "valid.jsonl")
    (folder / "valid.jsonl").write_text(jsonl({"prompt": "alone"}))
    with pytest.raises(UserError, match="held out; look at the files of that split"):
        prepared(folder, tmp_path / "cache")
    (folder / "valid.jsonl").write_text((folder / "train.jsonl").read_text())
    with pytest.raises(UserError, match="every text of its validation is trained on, too"):
        prepared(folder, tmp_path / "cache")


def test_a_file_is_of_the_split_that_its_own_name_says():
    assert sources.split_of(Path("test/train.jsonl")) == "train"
    assert sources.split_of(Path("train/part.jsonl")) == "train"
    assert sources.split_of(Path("latest/contest.jsonl")) is None
    assert sources.split_of(Path("eval.jsonl")) == sources.split_of("evaluation_set") == "test"


def test_one_split_of_each_use_is_taken_from_the_hub_and_the_others_are_named(monkeypatch):
    splits = {"dev": [1], "training": [2], "train": [3], "validation": [4], "extra": [5]}
    monkeypatch.setattr(hub_access, "load", lambda dataset: splits)
    source = sources.open_source("user/name")
    assert source.parts == {"train": [3], "val": [4]}
    assert source.left_out == [
        "the splits dev, training, extra; name one to take it: user/name#dev"
    ]


def test_a_text_of_the_validation_that_is_trained_on_is_left_out_of_it(tmp_path):
    folder = split_folder(tmp_path / "set", "train.jsonl", "valid.jsonl")
    with (folder / "valid.jsonl").open("a") as file:
        file.write(jsonl({"prompt": "train q1", "completion": "train a1"}))
    report, _ = prepared(folder, tmp_path / "cache")
    assert report["shared"] == 1 and report["val"]["records"] == 5
