"""What is prepared: the text of each mode, what is skipped, signs of life, the cache."""

import errno
import fcntl
import io
import json
import os
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from helpers import RECORD, numbered, prepare, prepared_folder, write_jsonl

import train_mlx
from bdh_lib import progress
from bdh_lib.data import columns, formats, parsers, sources, texts
from bdh_lib.data import prepare as preparing
from bdh_lib.data.describe import describe
from bdh_lib.data.formats import FIELDS
from bdh_lib.data.prepare import load_unsplit
from bdh_lib.settings import settings_dict
from bdh_lib.training import dataset
from bdh_mlx import UserError
from train_mlx import format_example


def test_each_mode_gives_its_exact_text():
    assert format_example(RECORD, "system") == "Be kind."
    assert format_example(RECORD, "instruction") == "Greet."
    assert format_example(RECORD, "both") == "### System:\nBe kind.\n\n### Instruction:\nGreet."
    assert format_example(RECORD, "full") == (
        "### System:\nBe kind.\n\n### Instruction:\nGreet.\n\n### Response:\nHello, wörld\n---"
    )


def test_every_record_is_on_one_side_and_every_byte_is_kept(tmp_path):
    records = numbered(50)
    report, train, val = prepare(write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "cache")
    sides = [set(side.decode().split("\n---\n\n")) for side in (train, val)]
    texts = {format_example(r, "full").removesuffix("\n---") for r in records}
    assert (sides[0] | sides[1]) - {""} == texts
    assert sides[0] & sides[1] == {""}
    assert (report["train"]["records"], report["val"]["records"]) == (45, 5)
    assert (report["train"]["bytes"], report["val"]["bytes"]) == (len(train), len(val))


def test_each_byte_is_labelled_with_its_field(tmp_path):
    folder = prepared_folder(
        write_jsonl(tmp_path / "d.jsonl", numbered(30)), tmp_path / "cache", val_fraction=0.2
    )
    for side in ("train", "val"):
        text = np.fromfile(folder / f"{side}.bin", np.uint8)
        label = np.fromfile(folder / f"{side}.fields", np.uint8)
        assert len(text) == len(label)
        for field, start in (("system", b"Be kind."), ("response", "Hello, wörld".encode())):
            output = bytes(text[label == FIELDS.index(field)])
            assert output.startswith(start) and output.count(start) == bytes(text).count(start)
            assert b"###" not in output
        assert bytes(text[label == 0]).count(b"### Response:\n") == bytes(text).count(b"---")


def test_prompts_leave_out_sections_that_the_data_do_not_have():
    every = formats.PROMPTS["full"]
    assert formats.sample_prompts("full", {"system", "instruction", "response"}) == every
    assert formats.sample_prompts("full", {"", "instruction", "response"}) == every[1:]
    assert (
        formats.sample_prompts("both", {"text"})
        == formats.sample_prompts("full", {"text"})
        == ["\n\n"]
    )


def test_bad_records_are_counted_by_reason_and_never_trained_on(tmp_path):
    bad = [
        "not json",
        "[1, 2]",
        {"system": "s", "response": "r"},
        RECORD | {"response": None},
        RECORD | {"response": float("nan")},
        RECORD | {"instruction": {"x": 1}},
        RECORD | {"instruction": "  "},
        RECORD | {"system": "\ud800"},
        {"messages": "broken"},
        {"messages": [3]},
    ]
    file = write_jsonl(tmp_path / "d.jsonl", numbered(20) + bad)
    file.write_bytes(
        file.read_bytes() + b'\n{"system": "\xac", "instruction": "i", "response": "r"}'
    )
    report, train, val = prepare(file, tmp_path / "cache")
    assert report["skipped"] == {
        "not JSON": 1,
        "not a JSON object": 1,
        "instruction missing": 2,
        "response is null, not text": 1,
        "response is float, not text": 1,
        "instruction is dict, not text": 1,
        "instruction empty": 1,
        "system with a lone surrogate": 1,
        "messages is str, not a list of turns or its JSON": 1,
        "not valid UTF-8": 1,
    }
    assert report["left_out"] == {"turn that is str, not an object": 1}
    assert report["first_skipped"]["not a JSON object"] == 22
    texts = [format_example(r, "full").encode() for r in numbered(20)]
    assert len(train) + len(val) == sum(map(len, texts)) + 2 * 20  # a blank line after each
    assert b"None" not in train + val


def test_structures_that_are_all_different_do_not_fill_the_screen(tmp_path):
    records = numbered(20) + [{f"key {i}": 1} for i in range(500)]
    report, *_ = prepare(write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "cache")
    assert len(report["structures"]) == texts.MAX_NAMES and report["records"] == 520
    assert describe(report).count("\n") < 30


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_takes_long_shows_a_bar_on_a_terminal_and_lines_elsewhere(
    tmp_path, monkeypatch, capsys
):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(20))
    ready = prepared_folder(source, tmp_path / "cache", "full", 0.1, 1)
    assert capsys.readouterr() == ("", "")  # what is quick says nothing
    monkeypatch.setattr(sources, "LARGE", 0)
    for name, value in (("DELAY", 0), ("LINE_EVERY", -1)):
        monkeypatch.setattr(progress, name, value)
    monkeypatch.setattr(sources, "LARGE", 0)
    what = f"reading DATASET {source}"
    prepared_folder(source, tmp_path / "cache", "full", 0.1, 2)
    out, err = capsys.readouterr()
    assert f"{what} (0 MB) ...\n" in out and f"{what}: 20 records ...\n" in out
    assert "writing train: 18 records ...\n" in out and err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    prepared_folder(source, tmp_path / "cache", "full", 0.1, 3)
    assert f"\r{what}: " in sys.stderr.getvalue()
    assert f"{what}: 20" not in capsys.readouterr().out
    assert preparing.is_intact(ready) and "checking the prepared data" in capsys.readouterr().out
    prepared_folder(ready, tmp_path / "cache", "full", 0.1, 3)
    assert f"copying DATASET {ready} (0 MB) ...\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (sources, "_data_files"),
        (parsers, "read_file"),
        (preparing, "choose_validation"),
        (preparing, "write_sides"),
        (preparing, "is_intact"),
    ],
)
def test_each_step_that_takes_long_shows_a_sign_of_life(
    tmp_path, monkeypatch, capsys, module, step
):
    (folder := tmp_path / "data").mkdir()
    write_jsonl(folder / "d.jsonl", numbered(20))
    quick = getattr(module, step)
    monkeypatch.setattr(module, step, lambda *args: time.sleep(0.2) or quick(*args))
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    line = f"preparing DATASET {folder}: 0 s ...\n"
    prepared_folder(folder, tmp_path / "cache")
    assert line in capsys.readouterr().out
    if step == "read_file":
        load_unsplit(str(folder), "full", tmp_path)  # for an evaluation
        assert line in capsys.readouterr().out


def test_a_wait_for_another_process_is_told(tmp_path, capsys):
    with (tmp_path / ".lock").open("a") as held, (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        preparing._wait_for(lock, tmp_path)
    assert (
        f"waiting for another process that prepares data in {tmp_path}" in capsys.readouterr().out
    )


def test_a_mode_the_data_cannot_serve_says_what_is_lacking_and_what_would_work(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"question": "q", "answer": "a"}] * 3)
    with pytest.raises(UserError) as error:
        prepare(file, tmp_path / "cache", mode="both")
    assert "lacking system." in str(error.value)
    assert "skipped 3: system missing (first: record 1)" in str(error.value)
    assert str(error.value).endswith("Modes that would work: instruction, full")
    file = write_jsonl(tmp_path / "d.jsonl", [{"ask": "q", "Answer": "a"}] * 3)
    with pytest.raises(UserError, match=r"skipped 3: instruction missing.*--columns instruction="):
        prepare(file, tmp_path / "cache", mode="full")
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        prepare(file, tmp_path / "cache", mode="full")
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [".lock"]  # nothing half made


def test_full_leaves_out_the_section_of_system_texts_that_are_not_there(tmp_path):
    asked = [{"question": f"q{i}", "answer": f"a{i}", "system": None} for i in range(20)]
    report, *sides = prepare(write_jsonl(tmp_path / "d.jsonl", asked), tmp_path / "cache")
    found = b"".join(sides).decode()
    expected = [f"### Instruction:\nq{i}\n\n### Response:\na{i}\n---\n\n" for i in range(20)]
    assert sorted(found.split("---\n\n")) == sorted("".join(expected).split("---\n\n"))
    assert "no record has a system text" in describe(report) and not report["skipped"]
    result = [r | {"system": "Be kind."} if i % 4 else r for i, r in enumerate(asked)]
    report, *sides = prepare(write_jsonl(tmp_path / "d.jsonl", result), tmp_path / "cache")
    assert "5 of 20 have no system text: full is trained without its section" in describe(report)
    assert b"".join(sides).count(b"### System:\nBe kind.\n\n### Instruction:\nq") == 15
    assert report["train"]["records"] + report["val"]["records"] == 20 and not report["skipped"]


def test_data_that_cannot_be_read_are_not_called_a_cache_that_cannot_be_written(
    tmp_path, monkeypatch
):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(b"bytes" * 9)

    def copyfile(source, target, error=errno.EACCES):
        raise OSError(error, os.strerror(error), str(source), None, str(target))

    monkeypatch.setattr(preparing.shutil, "copyfile", copyfile)
    with pytest.raises(UserError, match=r"(train|val)\.bin cannot be read: Permission denied"):
        prepare(tmp_path, tmp_path / "cache")
    monkeypatch.setattr(preparing.shutil, "copyfile", partial(copyfile, error=errno.ENOSPC))
    with pytest.raises(UserError, match="cache cannot be written: No space left"):
        prepare(tmp_path, tmp_path / "cache")


def test_prepared_bytes_are_reused_and_follow_the_file(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "d.jsonl", numbered(20))
    first = prepare(file, tmp_path / "cache")
    monkeypatch.setattr(sources, "read_parts", lambda *args: pytest.fail("read again"))
    assert prepare(file, tmp_path / "cache") == first
    monkeypatch.undo()
    write_jsonl(file, numbered(21))
    assert prepare(file, tmp_path / "cache")[0]["records"] == 21


def test_the_flag_refreshes(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(40))
    args = ["--dataset", str(source), "--checkpoint-dir", str(tmp_path), "--block-size", "16"]
    s = train_mlx.read_settings([*args, "--refresh-data"])
    dataset.open_run_data(train_mlx.read_settings(args))
    monkeypatch.setattr(preparing, "PROCESS_START", time.time() + 9)
    asked = []
    make = preparing._make
    monkeypatch.setattr(preparing, "_make", lambda *a: asked.append(a) or make(*a))
    dataset.open_run_data(train_mlx.read_settings(args))
    assert not asked
    dataset.open_run_data(s)
    assert len(asked) == 1 and "refresh_data" not in settings_dict(s)


MADE_FROM = {"dataset": "sample", "mode": "full", "val_fraction": 0.1, "seed": 1, "columns": None}


def test_a_report_tells_what_its_data_depend_on(tmp_path):
    settings = preparing.DataSettings(**MADE_FROM)
    folder = preparing.prepare(settings, tmp_path)
    report = json.loads((folder / "data.json").read_text())
    assert preparing.recorded_settings(report) == settings


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"made_from": None},
        {"made_from": [MADE_FROM]},
        *({"made_from": MADE_FROM | {name: [1]}} for name in MADE_FROM),
        *({"made_from": MADE_FROM | {"mode": mode}} for mode in ("", "all", None)),
        {"made_from": {"seed": 1}},
    ],
)
def test_a_report_of_another_format_tells_nothing(report):
    assert preparing.recorded_settings({"made_from": MADE_FROM}) is not None
    assert preparing.recorded_settings(report) is None


def test_the_embedded_sample_is_sound():
    records = list(sources.read_records("sample"))
    assert 400 <= len(records) <= 700
    assert all([f for f, _ in columns.parse_record(r).turns] == [*RECORD] for r in records)
    for field in RECORD:
        assert len({r[field] for r in records}) == len(records)
    assert np.mean([len(format_example(r, "full")) for r in records]) > 700
