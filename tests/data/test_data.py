"""What is read, how it is detected, what is skipped, and which bytes are trained on."""

import errno
import fcntl
import io
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pytest
from conftest import ROOT

import train_mlx
from bdh_lib import flags, progress
from bdh_lib.data import columns, formats, parsers, sources, texts
from bdh_lib.data import hub as hub_access
from bdh_lib.data import prepare as preparing
from bdh_lib.data.describe import describe
from bdh_lib.data.formats import FIELDS
from bdh_lib.data.prepare import DataSettings, load_unsplit
from bdh_lib.data.split import bytes_to_evaluate, choose_validation, record_ends
from bdh_lib.training import dataset
from bdh_mlx import UserError
from train_mlx import format_example

RECORD = {"system": "Be kind.", "instruction": "Greet.", "response": "Hello, wörld"}


def prepared(source, cache, mode="full", val_fraction=0.1, seed=1, columns=None):
    """The folder of prepared data."""
    settings = DataSettings(str(source), mode, val_fraction, seed, columns)
    return preparing.prepare(settings, cache)


def prepare(source, cache, *args, **kwargs):
    """The report, and the bytes of both sides."""
    folder = prepared(source, cache, *args, **kwargs)
    sides = {side: (folder / f"{side}.bin").read_bytes() for side in ("train", "val")}
    return json.loads((folder / "data.json").read_text()), sides["train"], sides["val"]


def write_jsonl(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def numbered(n, **extra):
    return [{k: f"{v} {i}" for k, v in (RECORD | extra).items()} for i in range(n)]


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
    sides = [set(side.decode().split("\n---\n\n")) for side in (train + b"\n\n", val + b"\n\n")]
    texts = {format_example(r, "full").removesuffix("\n---") for r in records}
    assert (sides[0] | sides[1]) - {""} == texts
    assert sides[0] & sides[1] == {""}
    assert (report["train"]["records"], report["val"]["records"]) == (45, 5)
    assert (report["train"]["bytes"], report["val"]["bytes"]) == (len(train), len(val))


def test_each_byte_is_labelled_with_its_field(tmp_path):
    folder = prepared(
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


def test_identical_texts_go_to_one_side(tmp_path):
    records = numbered(10) * 20
    report, train, val = prepare(write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "cache")
    assert report["val"]["records"] == 20
    assert len(set(val.decode().split("\n\n### System:\n"))) <= 2  # first record keeps its header
    assert val.split(b"Greet. ")[1][:1] not in [p[:1] for p in train.split(b"Greet. ")[1:]]


def test_the_split_follows_the_seed(tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(50))
    one, again, other = (
        prepare(source, tmp_path / str(i), seed=seed)[2] for i, seed in enumerate((1, 1, 2))
    )
    assert one == again != other


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
    assert len(train) + len(val) == sum(map(len, texts)) + 2 * 18  # two streams, 18 joints
    assert b"None" not in train + val


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    records = numbered(12)
    write_jsonl(tmp_path / "d.jsonl", records)
    (tmp_path / "d.json").write_text(json.dumps(records))
    datasets.Dataset.from_list(records).to_csv(tmp_path / "d.csv")
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "d.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert list(sources.read_records(str(tmp_path / f"d.{kind}"))) == records, kind
    assert len(list(sources.read_records(str(tmp_path)))) == 48  # the folder holds all four


READ_TEXT = {  # a file of some records around `{}`, and the record that `{}` is part of
    "d.jsonl": ('{{"text": "a"}}\n{{"text": "{}"}}\n{{"text": "b"}}\n', 1),
    "d.csv": ('text,more\na,\n"{}",x\nb,\n', 1),
    "d.txt": ("a\n\n{}\n\nb\n", 1),
}


@pytest.mark.parametrize("name", READ_TEXT)
def test_valid_text_stays_as_it_is_and_what_is_not_utf8_costs_its_record(tmp_path, name):
    text, at = READ_TEXT[name]
    kept = "\ufffd \ufeff é 你 👍 \u2028 \x85 \u0000"
    if name == "d.jsonl":
        kept = kept.replace("\u0000", "")
    for start in (b"", b"\xef\xbb\xbf"):  # the mark at the start of a file is no text of it
        (tmp_path / name).write_bytes(start + text.format(kept).encode())
        records = list(sources.read_records(str(tmp_path / name)))
        assert [r["text"] for r in records] == ["a", kept, "b"]
    for bad in (b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf0\x9f\x91"):
        (tmp_path / name).write_bytes(text.format("BAD").encode().replace(b"BAD", bad))
        records = list(sources.read_records(str(tmp_path / name)))
        assert records[at] == "not valid UTF-8"
        assert [r["text"] for i, r in enumerate(records) if i != at] == ["a", "b"]


def test_a_json_file_keeps_u_fffd_and_is_refused_where_it_is_not_utf8(tmp_path):
    text = json.dumps([{"text": "a"}, {"text": "\ufffd"}], ensure_ascii=False).encode()
    (tmp_path / "d.json").write_bytes(text)
    assert list(sources.read_records(str(tmp_path / "d.json"))) == [
        {"text": "a"},
        {"text": "\ufffd"},
    ]
    (tmp_path / "d.json").write_bytes(text.replace(b'"a"', b'"\xff"'))
    with pytest.raises(UserError, match=r"cannot be read as \.json"):
        list(sources.read_records(str(tmp_path / "d.json")))


def test_a_csv_that_is_not_one_is_told_by_its_line(tmp_path):
    file = tmp_path / "d.csv"
    file.write_text('instruction,response\na,b,c\na,"b,\nc"\na\n')
    assert list(sources.read_records(str(file))) == [
        "more values than columns",
        {"instruction": "a", "response": "b,\nc"},
        {"instruction": "a", "response": ""},
    ]
    file.write_text('instruction,response\na,"b\nc,d\n"e"f,g\nh,i\n')
    assert list(sources.read_records(str(file))) == [
        "row with a wrong quote (',' expected after '\"')",
        {"instruction": "c", "response": "d"},
        "row with a wrong quote (',' expected after '\"')",
        {"instruction": "h", "response": "i"},
    ]
    file.write_text('instruction,response\na,"b\nc,d\n')
    assert list(sources.read_records(str(file))) == [
        "row with a wrong quote (unexpected end of data)",
        {"instruction": "c", "response": "d"},
    ]
    file.write_bytes("instruction,rèsponse\na,b\n".encode("latin-1"))
    with pytest.raises(UserError, match="its first line is not valid UTF-8"):
        list(sources.read_records(str(file)))
    long = "x" * 10**6
    file.write_text(f"text\n{long}\n")
    assert list(sources.read_records(str(file))) == [{"text": long}]
    file.write_text("")
    with pytest.raises(UserError, match="is empty: it has no record"):
        prepare(file, tmp_path / "cache")


ODD_JSON = {
    "5": ["not a JSON object"],
    "null": ["not a JSON object"],
    '[{"text": "a"}, 5, [], null]': [{"text": "a"}, *["not a JSON object"] * 3],
    '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}': [{"text": "a"}, {"text": "b"}],
    '{"text":\n"a"}\n{"text": "b"}': [{"text": "a"}, {"text": "b"}],
    '{"a": {"text": "b"}}': [{"a": {"text": "b"}}],
    '{"a": {"text": "b"}, "c": {"text": "b", "d": 1}}': [
        {"a": {"text": "b"}, "c": {"text": "b", "d": "1"}},
    ],
    '{"prompt": {"role": "a", "content": "b"}, "completion": {"role": "c", "content": "d"}}': [
        {"prompt": {"role": "a", "content": "b"}, "completion": {"role": "c", "content": "d"}},
    ],
    '{"prompt": ["a", "b"], "completion": ["c"]}': [{"prompt": ["a", "b"], "completion": ["c"]}],
    '{"prompt": ["a", "b"], "completion": "c"}': [{"prompt": ["a", "b"], "completion": "c"}],
    '{"messages": [{"role": "a", "content": "b"}, {"role": "c", "content": "d"}]}': [
        {"messages": [{"role": "a", "content": "b"}, {"role": "c", "content": "d"}]},
    ],
    '\n[\n{"text": 1.50},\n{"text": "a"}]': [{"text": "1.50"}, {"text": "a"}],
    '{"text": "a"}\n{"text": "b", "c": null}\nnot': [
        {"text": "a"}, {"text": "b", "c": None}, "not JSON",
    ],
    "[]": [],
    " \n": [],
    "[" * 100_000: "nested too deep",
    '[{"text": "a"}': "Expecting ',' delimiter: line 1 column 15",
    '[{"text": ' + "9" * 5000 + "}]": [{"text": "9" * 5000}],
}  # fmt: skip


@pytest.mark.parametrize("text", ODD_JSON, ids=lambda text: text[:12])
def test_a_json_file_is_one_document_or_a_line_for_each_record(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    if isinstance(expected := ODD_JSON[text], list):
        assert list(sources.read_records(str(tmp_path / "d.json"))) == expected
    else:
        with pytest.raises(UserError, match=rf"d\.json cannot be read as \.json: .*{expected}"):
            list(sources.read_records(str(tmp_path / "d.json")))


def test_a_parquet_file_keeps_its_values(tmp_path):
    rows = [{"text": t, "n": i, "l": [{"a": i}]} for i, t in enumerate(["a\ufffd", None, "é"])]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    assert list(sources.read_records(str(tmp_path / "d.parquet"))) == rows


def test_structures_that_are_all_different_do_not_fill_the_screen(tmp_path):
    records = numbered(20) + [{f"key {i}": 1} for i in range(500)]
    report, *_ = prepare(write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "cache")
    assert len(report["structures"]) == texts.MOST_NAMES and report["records"] == 520
    assert describe(report).count("\n") < 30


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_a_file_without_a_byte_is_one_line(tmp_path, kind):
    (tmp_path / f"d.{kind}").touch()
    with pytest.raises(UserError, match=rf"d\.{kind} (is empty|cannot be read as)") as error:
        prepare(tmp_path / f"d.{kind}", tmp_path / "cache")
    assert "\n" not in str(error.value)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_takes_long_shows_a_bar_on_a_terminal_and_lines_elsewhere(
    tmp_path, monkeypatch, capsys
):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(20))
    ready = prepared(source, tmp_path / "cache", "full", 0.1, 1)
    assert capsys.readouterr() == ("", "")  # what is quick says nothing
    monkeypatch.setattr(sources, "LARGE", 0)
    for name, value in (("DELAY", 0), ("LINE_EVERY", -1)):
        monkeypatch.setattr(progress, name, value)
    monkeypatch.setattr(sources, "LARGE", 0)
    what = f"reading DATASET {source}"
    prepared(source, tmp_path / "cache", "full", 0.1, 2)
    out, err = capsys.readouterr()
    assert f"{what} (0 MB) ...\n" in out and f"{what}: 20 records ...\n" in out
    assert "writing train: 18 records ...\n" in out and err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    prepared(source, tmp_path / "cache", "full", 0.1, 3)
    assert f"\r{what}: " in sys.stderr.getvalue()
    assert f"{what}: 20" not in capsys.readouterr().out
    assert preparing.is_intact(ready) and "checking the prepared data" in capsys.readouterr().out
    prepared(ready, tmp_path / "cache", "full", 0.1, 3)
    assert f"copying DATASET {ready} (0 MB) ...\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (sources, "_data_files"),
        (parsers, "read_file"),
        (preparing, "choose_validation"),
        (preparing, "write_split"),
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
    prepared(folder, tmp_path / "cache")
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


def test_a_csv_of_numbers_and_na_stays_text(tmp_path):
    (tmp_path / "d.csv").write_text("instruction,response\n1,NA\n2,None\n")
    assert [r["response"] for r in sources.read_records(str(tmp_path / "d.csv"))] == ["NA", "None"]


def test_a_text_file_is_split_at_blank_lines_and_keeps_its_bytes(tmp_path):
    text = "\n\n".join(f"Paragraph {i}\nwith two lines." for i in range(30))
    (tmp_path / "d.txt").write_text(text)
    report, train, val = prepare(tmp_path / "d.txt", tmp_path / "cache", mode="both")
    assert report["structures"] == {"text": 30} and report["val"]["records"] == 3
    assert sorted((train + b"\n\n" + val).split(b"\n\n")) == sorted(text.encode().split(b"\n\n"))


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
    found = b"".join(side + b"\n\n" for side in sides).decode()
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


class Hub(BaseHTTPRequestHandler):
    """A hub on 127.0.0.1 that knows the commit of one data set; `answer`: a commit or a status."""

    answer, requests = "", []

    def do_GET(self):
        self.requests.append(self.path)
        body = json.dumps({"id": "user/name", "sha": self.answer}).encode()
        self.send_response(self.answer if isinstance(self.answer, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The stub as the hub, as a process that starts finds it: call it to start another one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(Hub, "requests", [])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def begin(output, rows=20):
        hub_access._ask.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", output == "offline")
        monkeypatch.setattr(Hub, "answer", output)
        port = 9 if output == "silent" else server.server_port
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        split = lambda revision: [r | {"system": revision} for r in numbered(rows)]  # noqa: E731
        load = lambda *a, revision, **k: {"train": split(revision)}  # noqa: E731
        monkeypatch.setattr(datasets, "load_dataset", load)

    yield begin
    hub_access._ask.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing.jsonl", "does not exist"),
        ("./missing", "does not exist"),
        ("~/missing", "does not exist"),
        ("my/data/missing", "does not exist"),
        ("missing/", "does not exist"),
        ("data/my records", "does not exist"),
        (
            "https://hub.test/datasets/user/name",
            "is a URL; download it and name the file, or name a data set",
        ),
        (
            "hf://datasets/user/name/d.jsonl",
            "is a URL; download it and name the file, or name a data set",
        ),
        ("strange name?", "neither a file nor a hub name"),
        ("https://x.y/z", "DATASET https://x.y/z is a URL; download it"),
        ("hf://x/y", "DATASET hf://x/y is a URL; .* user/name"),
        ("sample#test", "DATASET sample has no splits; leave out #test"),
        (f"{sources.SAMPLE}#test", r"sample\.jsonl has no splits; leave out #test"),
    ],
)
def test_names_that_mean_nothing_are_refused_without_asking_the_hub(name, complaint, monkeypatch):
    monkeypatch.setattr(hub_access, "_ask", lambda *name: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=complaint):
        list(sources.read_records(name))


def test_folders_and_files_of_no_use_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"folder without.*files of data$"):
        list(sources.read_records(str(tmp_path)))
    for name, way in {
        "d.PDF": "save its text as .txt",
        "d.xlsx": "save it as CSV in UTF-8",
        "d.zip": "unpack it and name the folder",
        "d.tar.gz": "unpack it and name the folder",
        "data": "name it by what it holds, such as .jsonl",
    }.items():
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=f"ends in none of .*; {way}"):
            list(sources.read_records(str(tmp_path / name)))
    with pytest.raises(UserError, match=r"it holds d\.PDF, d\.tar\.gz, d\.xlsx and 2 others"):
        list(sources.read_records(str(tmp_path)))
    write_jsonl(tmp_path / "one.jsonl", [RECORD] * 3)
    with pytest.raises(UserError, match="1 distinct record"):
        prepare(tmp_path / "one.jsonl", tmp_path / "cache")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json cannot be read"):
        list(sources.read_records(str(tmp_path / "bad.json")))


def odd_path(folder, kind):
    """Something in `folder` that is no data file although its name says so."""
    path = folder / "d.jsonl"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as at:
            at.bind(str(path))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(os.devnull)
    elif kind == "link in a circle":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to(folder / "gone")
    elif kind == "name that is not UTF-8":
        if sys.platform == "darwin":
            pytest.skip("a Mac's file system refuses such names")
        path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl"))
        write_jsonl(path, numbered(20))
    return path


ODD = {
    "socket": "is no regular file",
    "fifo": "is no regular file",
    "device": "is no regular file",
    "link in a circle": "cannot be read: Too many levels of symbolic links",
    "link to nothing": "is a link to a file that does not exist",
    "name that is not UTF-8": "not UTF-8",
}


@pytest.mark.parametrize(("kind", "complaint"), ODD.items())
@pytest.mark.parametrize("where", ["alone", "in a folder", "in a ready split"])
def test_what_is_no_data_file_is_told_and_never_waited_for(kind, complaint, where):
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        path = odd_path(Path(folder), kind)
        write_jsonl(Path(folder) / "other.jsonl", numbered(20))
        if where == "in a ready split" and kind != "name that is not UTF-8":
            path = path.rename(path.with_name("train.bin"))
            if kind == "link in a circle":
                path.unlink()
                path.symlink_to(path)
        with pytest.raises(UserError, match=complaint):
            prepare(path if where == "alone" else folder, Path(folder) / "cache")


def test_nothing_is_no_name_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", numbered(20))
    for name in ("", " "):
        with pytest.raises(UserError, match="DATASET is empty"):
            prepare(name, tmp_path / "cache")


@pytest.fixture
def another_user():
    """A folder of its own, and a user whom permissions bind: root is asked to be nobody."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield Path(folder)
        if root:
            os.seteuid(0)
        for path in Path(folder).rglob("*"):
            path.chmod(0o700)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json", "d.txt", "d.parquet", "val.bin"])
def test_a_file_that_may_not_be_read_is_named(another_user, name):
    (another_user / "in").mkdir()
    (another_user / "tmp").mkdir()
    file = write_jsonl(another_user / "in" / name, numbered(3))
    write_jsonl(another_user / "in" / ("train.bin" if name == "val.bin" else "a.jsonl"), [])
    file.chmod(0)
    for source in (another_user / "in", file)[: 1 if name == "val.bin" else 2]:
        with pytest.raises(UserError, match=rf"{name} cannot be read.*Permission denied"):
            prepare(source, another_user / "cache")
        with pytest.raises(UserError, match=rf"{name} cannot be read.*Permission denied"):
            load_unsplit(str(source), "full", another_user / "tmp")


def test_a_folder_is_walked_no_more_than_needed(tmp_path, monkeypatch):
    """Before it is read, while it is, and after it, to see changes; a resume walks once."""
    walks, walk = [], os.walk
    monkeypatch.setattr(sources.os, "walk", lambda *a, **k: walks.append(a) or walk(*a, **k))
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "d.jsonl", numbered(20))
    for most in (3, 1):
        prepare(tmp_path / "in", tmp_path / "cache")
        assert len(walks) <= most
        walks.clear()


def test_a_folder_that_may_not_be_read_is_named(another_user):
    write_jsonl(another_user / "d.jsonl", numbered(20))
    (another_user / "sub").mkdir()
    for mode in (0o100, 0o400, 0):
        (another_user / "sub").chmod(mode)
        with pytest.raises(UserError, match="sub cannot be read: Permission denied"):
            prepare(another_user / "sub", another_user / "cache")
    with pytest.raises(UserError, match="sub cannot be read: Permission denied"):
        prepare(another_user, another_user / "cache")
    with pytest.raises(UserError, match=r"sub/d\.jsonl cannot be read: Permission denied"):
        prepare(another_user / "sub" / "d.jsonl", another_user / "cache")


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", ["checkpoints_mlx", "runs"])
def test_runs_and_hidden_files_in_a_folder_are_no_data(tmp_path, monkeypatch, name, linked):
    (here := tmp_path / "my data").mkdir()
    write_jsonl(here / "d.jsonl", numbered(20))
    (here / "sub").mkdir()
    write_jsonl(here / "sub" / "e.jsonl", numbered(9, response="More."))
    monkeypatch.chdir(here)
    if linked:
        (tmp_path / "elsewhere").mkdir()
        (here / name).symlink_to(tmp_path / "elsewhere")
    first = prepare(".", Path(name) / ".data")
    assert first[0]["records"] == 29
    for run, files in {
        f"{name}/full": ("config.json", "metrics.jsonl", "modes.json"),
        "copied run": ("config.json", "metrics.jsonl", "best.json"),
        "copied run/step-000001": ("config.json", "manifest.json", "model.safetensors"),
        "shared": ("config.json", "model.safetensors"),
        ".git": ("a.json",),
    }.items():
        (here / run).mkdir()
        for file in files:
            (here / run / file).write_text('{"text": "no data"}\n')
    write_jsonl(here / ".hidden.jsonl", numbered(40))
    assert prepare(".", Path(name) / ".data") == first
    monkeypatch.setattr(preparing, "_make", lambda *a: pytest.fail("prepared again"))
    assert prepare(".", Path(name) / ".data") == first
    assert load_unsplit(".", "full", tmp_path)[0]["records"] == 29  # for an evaluation


@pytest.mark.parametrize(
    ("raised", "complaint"),
    [
        (datasets.exceptions.DatasetNotFoundError("x is a gated dataset on the Hub."), "is gated"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset x doesn't exist"),
            "no file or folder here, and not on the hub",
        ),
        (ConnectionError("Couldn't reach x"), "no file or folder here.*out of reach"),
        (ValueError('Unknown split "tset". Should be one of [train]'), "Unknown split"),
    ],
)
def test_each_trouble_with_the_hub_is_one_message_with_the_ways_on(
    hub, monkeypatch, raised, complaint
):
    hub("silent")

    def load_dataset(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=complaint) as error:
        list(sources.read_records("user/name"))
    for way in ("hf auth login", "--dataset FILE", "--dataset sample"):
        assert way in str(error.value)


@pytest.mark.parametrize("name", ["-", "user/a--b", "a.git", "a" * 97])
def test_a_name_that_no_hub_allows_is_one_line_of_ours(hub, monkeypatch, name):
    hub("silent")
    check = huggingface_hub.utils.validate_repo_id
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kwargs: check(name))
    with pytest.raises(UserError, match="neither a file nor a hub name") as error:
        list(sources.read_records(name))
    assert ".." not in str(error.value) and "epo" not in str(error.value)


def test_a_hub_name_carries_configuration_revision_and_split(hub, monkeypatch):
    hub("silent")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [RECORD] if kwargs["split"] else {"train": [RECORD], "other": [RECORD] * 5}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("user/name", "name:cfg", "user/name:cfg@v1.0#test[:10%]", "user/name@refs/pr/1"):
        assert list(sources.read_records(name)) == [RECORD]
    assert [(*a, k["revision"], k["split"]) for a, k in asked] == [
        ("user/name", None, None, None),
        ("name", "cfg", None, None),
        ("user/name", "cfg", "v1.0", "test[:10%]"),
        ("user/name", None, "refs/pr/1", None),
    ]


HOMES = {
    "HOME=": {"HOME": ""},
    "no HOME": {"HOME": None},
    "HOME a file": {"HOME": os.devnull},
    "HOME not to be made": {"HOME": f"{os.devnull}/home"},
}


@pytest.mark.parametrize("variables", HOMES.values(), ids=HOMES)
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_local_files_need_no_home(tmp_path, variables, kind):
    datasets.Dataset.from_list(numbered(20)).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(numbered(20)))
    script = (
        "from bdh_lib.data import sources\n"
        f"print(len(list(sources.read_records({str(tmp_path / f'd.{kind}')!r}))))"
    )
    env = {k: v for k, v in (os.environ | variables).items() if v is not None}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("20\n", "")


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (OSError(errno.ENOTDIR, "Not a directory", "/x/hf"), "/x/hf cannot be written: Not a dir"),
        (OSError(errno.ENOSPC, "No space left on device"), "sends cannot be written: No space"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "the hub is out of reach"),
    ],
)
def test_a_cache_of_downloads_that_cannot_be_written_is_no_silent_hub(
    hub, monkeypatch, error, complaint
):
    hub(OLD)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=complaint) as result:
        list(sources.read_records("user/name"))
    assert ("set HF_HOME" in str(result.value)) == ("written" in complaint)
    assert ("out of reach" in complaint) == huggingface_hub.constants.HF_HUB_OFFLINE


UNTRUSTED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [
        (RuntimeError(UNTRUSTED), ConnectionError("Couldn't reach user/name")),  # wrapped by httpx2
        (ssl.SSLCertVerificationError(1, UNTRUSTED),) * 2,
    ],
)
def test_a_certificate_that_is_not_trusted_is_named_with_the_way_on(
    hub, monkeypatch, asked, loaded
):
    hub(OLD)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", Mock(side_effect=asked))
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=loaded))
    with pytest.raises(UserError, match=r"out of reach \(\[SSL: CERT.*failed; .*SSL_CERT_FILE"):
        list(sources.read_records("user/name"))


OLD, NEW = "a" * 40, "b" * 40


def test_new_rows_on_the_hub_are_read_and_old_ones_not_twice(hub, tmp_path, monkeypatch):
    hub(OLD)
    report, train, _ = prepare("user/name", tmp_path)
    assert report["commit"] == OLD and OLD.encode() in train  # that commit is what is read
    assert f"data: user/name (commit {OLD}), 20 records" in describe(report)
    hub(NEW, rows=30)
    report, train, _ = prepare("user/name", tmp_path)
    assert (report["commit"], report["records"]) == (NEW, 30) and NEW.encode() in train
    assert Hub.requests == ["/api/datasets/user/name"] * 2  # once by each process
    monkeypatch.setattr(preparing, "_make", lambda *a: pytest.fail("prepared again"))
    for output, there in ((OLD, OLD), (NEW, NEW)):
        hub(output)
        assert prepare("user/name", tmp_path)[0]["commit"] == there
    hub("silent")
    preparing.cache_key(DataSettings("user/name@v1.0", "full", 0.1, 1), None)
    hub(OLD)
    preparing.cache_key(DataSettings("user/name:cfg@v1.0#test", "full", 0.1, 1), None)
    assert Hub.requests[-1] == "/api/datasets/user/name/revision/v1.0"


@pytest.mark.parametrize("output", ["silent", "offline", 500, 404, 401, 429])
def test_a_hub_that_does_not_tell_leaves_the_newest_prepared_data(hub, tmp_path, capsys, output):
    for i, commit in enumerate((NEW, OLD)):
        hub(commit)
        folder = prepared("user/name", tmp_path)
        os.utime(folder / "data.json", (1e9 - i * 1e6,) * 2)
        prepared("user/name", tmp_path, seed=2)  # of another seed
        prepared("user/other", tmp_path)
    hub(output)
    capsys.readouterr()
    assert prepare("user/name", tmp_path)[0]["commit"] == NEW
    assert capsys.readouterr().out == (
        "the hub does not tell of DATASET user/name; taking what was prepared on 2001-09-09 of "
        f"commit {NEW}\n"
    )


def test_a_commit_that_is_named_is_not_asked_for(hub, tmp_path, monkeypatch):
    hub(OLD)
    prepare("user/name", tmp_path)
    hub(NEW)
    monkeypatch.setattr(preparing, "_make", lambda *a: pytest.fail("prepared again"))
    assert prepare(f"user/name@{OLD}", tmp_path)[0]["commit"] == OLD  # how to go back
    hub("silent")
    assert prepare(f"user/name@{OLD}", tmp_path)[0]["commit"] == OLD


@pytest.mark.parametrize("local", [True, False])
def test_refreshed_data_are_prepared_anew_once(hub, tmp_path, monkeypatch, local):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(20)) if local else "user/name"
    hub(OLD)
    settings, cache = DataSettings(str(source), "full", 0.1, 1), tmp_path / "cache"
    folder = preparing.prepare(settings, cache)
    made = folder.stat().st_ino
    again = partial(preparing.prepare, settings, cache, refresh=True)
    assert again().stat().st_ino == made  # by this process itself
    monkeypatch.setattr(preparing, "STARTED", time.time() + 9)
    assert preparing.prepare(settings, cache).stat().st_ino == made
    read = sources.read_parts
    monkeypatch.setattr(sources, "read_parts", lambda *args: [("all", "not JSON")])
    with pytest.raises(UserError, match="no record"):
        again()
    assert preparing.is_intact(folder)  # a failure costs nothing
    calls = []
    monkeypatch.setattr(sources, "read_parts", lambda *args: calls.append(1) or read(*args))
    assert again() == folder and calls and preparing.is_intact(folder)


def test_the_flag_refreshes(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(40))
    args = ["--dataset", str(source), "--checkpoint-dir", str(tmp_path), "--block-size", "16"]
    s = train_mlx.settings([*args, "--refresh-data"])
    dataset.open_split(train_mlx.settings(args))
    monkeypatch.setattr(preparing, "STARTED", time.time() + 9)
    asked = []
    make = preparing._make
    monkeypatch.setattr(preparing, "_make", lambda *a: asked.append(a) or make(*a))
    dataset.open_split(train_mlx.settings(args))
    assert not asked
    dataset.open_split(s)
    assert len(asked) == 1 and "refresh_data" not in flags.settings_dict(s)


def test_without_a_network_the_script_says_so_and_exits_with_2(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "train_mlx.py", "--checkpoint-dir", tmp_path],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "out of reach" in run.stderr


def test_the_embedded_sample_is_sound():
    records = list(sources.read_records("sample"))
    assert 400 <= len(records) <= 700
    assert all([f for f, _ in columns.parse_record(r).turns] == [*RECORD] for r in records)
    for field in RECORD:
        assert len({r[field] for r in records}) == len(records)
    assert np.mean([len(format_example(r, "full")) for r in records]) > 700


# ------------------------------------------------------------------------- held out in every mode


def many(systems, records, seed=0):
    """Records of few systems and some repeated instructions, as instruction data sets have them."""
    rng = np.random.default_rng(seed)
    system, instruction, response = (rng.integers(n, size=records) for n in (systems, 300, 2))
    return [
        {"system": f"System {s}.", "instruction": f"Do {i}.", "response": f"Done {r}."}
        for s, i, r in zip(system, instruction, response, strict=True)
    ]


def dealt(file, cache, mode, share=0.1):
    """The texts of each side in a mode, as sets."""
    _, *sides = prepare(file, cache, mode=mode, val_fraction=share)
    joint = "\n\n### System" if mode in ("both", "full") else "\n\n"
    return [
        {t.removeprefix("### System").removeprefix(":") for t in s.decode().split(joint)}
        for s in sides
    ]


@pytest.mark.parametrize("systems", [1, 3, 40, 100])
def test_a_record_held_out_in_one_mode_trains_in_none(tmp_path, systems):
    records = many(systems, 400)
    file = write_jsonl(tmp_path / "d.jsonl", [*records, {"instruction": "Lone."}])
    modes = ["instruction", "both", "full"] + ["system"] * (systems > 3)
    sides = {mode: dealt(file, tmp_path / "cache", mode) for mode in modes}
    text = lambda r, mode: format_example(r, mode).removeprefix("### System:")  # noqa: E731
    trained = [r for r in records if text(r, "full") in sides["full"][0]]
    held_out = [r for r in records if text(r, "full") in sides["full"][1]]
    assert held_out and not [r for r in held_out if r in trained]
    for mode, (train, val) in sides.items():
        assert val and not train & val, mode
        assert val <= {text(r, mode) for r in held_out} | {"Lone."}  # by record, the same ones
        assert not val & {text(r, mode) for r in trained}  # nor as a section in another mode


def test_the_split_holds_out_its_share_and_whole_systems_where_they_fit(tmp_path):
    records = many(40, 1000)
    records = [r for i, r in enumerate(records) if r not in records[:i]]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    report, *_ = prepare(file, tmp_path / "cache")
    assert report["val"]["records"] == round(0.1 * len(records)) and report["shared"] == 0
    train, val = dealt(file, tmp_path / "cache", "system")
    assert val and len(train) + len(val) == 40


def test_half_of_the_share_is_drawn_by_whole_system_texts():
    sizes = [*[10] * 50, 500]  # a text of half of the records never fits
    system = np.repeat(np.arange(1, 52), sizes)
    keys = np.stack([system, np.zeros_like(system), np.arange(1, 1001)]).astype(np.uint64)
    for seed in range(20):
        in_val = choose_validation(keys, 0.1, seed)
        whole = [np.all(in_val[system == text]) for text in range(1, 52)]
        assert in_val.sum() == 100 and sum(whole) == 5 and not whole[-1], seed


def test_few_records_with_a_system_text_are_not_all_held_out(tmp_path):
    """In data of which most is plain text or has no system text."""
    few = numbered(40, system="Rule")
    text = [{"text": f"Line {i}"} for i in range(2000)]
    asked = [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(2000)]
    for others, mode in ((text, "full"), (asked, "both"), (text + asked, "system")):
        file = write_jsonl(tmp_path / "d.jsonl", others + few)
        _, train, val = prepare(file, tmp_path / "cache", mode=mode)
        assert 25 <= train.count(b"Rule") < 40 and train.count(b"Rule") + val.count(b"Rule") == 40


def test_a_mode_whose_texts_cannot_be_held_out_says_so(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", many(3, 400))
    with pytest.raises(
        UserError, match=r"3 distinct texts in TRAINING_MODE 'system'.*VAL_FRACTION"
    ):
        prepare(file, tmp_path / "cache", mode="system")


def test_an_evaluation_reads_whole_records_of_all_files_in_a_seeded_order(tmp_path):
    for name in "abc":
        answers = [r | {"response": f"{name} {i}" * 9} for i, r in enumerate(numbered(200))]
        write_jsonl(tmp_path / f"{name}.jsonl", [r | {"system": f"{name}{i}"}
                                                 for i, r in enumerate(answers)])  # fmt: skip
    orders = []
    for cache, seed in (("one", 1), ("again", 1), ("other", 2)):
        folder = prepared(tmp_path, tmp_path / cache / ".data", "full", 0.3, seed)
        val = (folder / "val.bin").read_bytes()
        read = bytes_to_evaluate(record_ends(folder, "val"), len(val) // 2)
        records = val[:read].split(b"\n---\n\n")
        assert 0.48 * len(val) < read <= len(val) // 2 and val[:read].endswith(b"\n---")
        assert val[read:].startswith(b"\n\n### System:\n")
        files = [record.split(b"### Response:\n")[1][:1] for record in records]
        assert all(20 < files.count(name) < 40 for name in (b"a", b"b", b"c"))
        fields = np.fromfile(folder / "val.fields", np.uint8)
        assert bytes(np.frombuffer(val, np.uint8)[fields == 2]).startswith(b"Greet. ")
        assert val.count(b"Greet. ") * len(b"Greet. ") <= np.count_nonzero(fields == 2)
        orders.append(records)
        for limit, expected in ((2, 1), (len(records[0]) + 4, 1), (len(val), 180), (10**9, 180)):
            read = bytes_to_evaluate(record_ends(folder, "val"), limit)
            assert len(val[:read].split(b"\n---\n\n")) == expected  # at least one, whole
        assert bytes_to_evaluate(record_ends(folder, "val"), None) is None
        train = (folder / "train.bin").read_bytes()
        result = [record.split(b"### Response:\n")[1][:1] for record in train.split(b"\n---\n\n")]
        assert result == sorted(result)  # training stays in the order of the data
    assert orders[0] == orders[1] != orders[2]
    (folder / "val_ends.npy").write_bytes(b"damaged")
    assert not preparing.is_intact(folder)


def test_a_training_side_without_what_loss_on_counts_is_refused(tmp_path):
    (split := tmp_path / "split").mkdir()
    for side, fields in (("train", b"\1"), ("val", b"\1\3")):
        (split / f"{side}.bin").write_bytes(b"x" * 9000)
        (split / f"{side}.fields").write_bytes((fields * 9000)[:9000])
    args = ["--dataset", str(split), "--checkpoint-dir", str(tmp_path / "ck")]
    s = train_mlx.settings([*args, "--training-mode", "full", "--loss-on", "response"])
    with pytest.raises(UserError, match="9,000 training bytes have none of it; take other data"):
        dataset.open_split(s)
    (split / "train.fields").write_bytes(b"\1" * 8999 + b"\3")
    _, train, val = dataset.open_split(s)
    assert len(train.bytes) == len(val.bytes) == 9000  # a ready split is in no other order
    (split / "val.fields").write_bytes(b"\1" * 9000)
    with pytest.raises(UserError, match="validation bytes read have none of it; raise EVAL_BYTES"):
        dataset.open_split(s)


def test_a_ready_split_is_taken_as_it_is(tmp_path):
    (source := tmp_path / "split").mkdir()
    (source / "train.bin").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="no val"):
        prepare(source, tmp_path / "cache")
    (source / "val.bin").write_bytes(b"held out")
    report, train, val = prepare(source, tmp_path / "cache")
    assert (train, val) == (bytes(range(256)), b"held out")
    assert (report["train"]["bytes"], report["val"]["bytes"]) == (256, 8)
    (source / "val.fields").write_bytes(b"\1\1\1\1\2\2\2\2")
    folder = prepared(source, tmp_path / "cache", "full", 0.1, 1)
    assert (folder / "val.fields").read_bytes() == b"\1\1\1\1\2\2\2\2"
    assert (folder / "train.fields").read_bytes() == bytes([FIELDS.index("text")]) * 256
    assert preparing.is_intact(folder)
    report, stream, fields = load_unsplit(str(source), "full", tmp_path)  # for an evaluation
    assert (report["records"], stream.tobytes()) == (None, b"held out")
    assert fields[3:5].tolist() == [1, 2]
    (source / "val.fields").write_bytes(b"\1")
    with pytest.raises(UserError, match="a byte for each"):
        prepare(source, tmp_path / "cache")


@pytest.mark.parametrize("limit", [100, 3000, 9000])
def test_a_disk_that_fills_while_data_are_prepared_leaves_nothing(tmp_path, limit):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(UserError, match="cache cannot be written: File too large"):
            prepare(source, tmp_path / "cache")
        with pytest.raises(UserError, match="way cannot be written: File too large"):
            (tmp_path / "way").mkdir()
            load_unsplit(str(source), "full", tmp_path / "way")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [".lock"]
    assert prepare(source, tmp_path / "cache")[0]["records"] == 200
