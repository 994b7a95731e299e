"""Data sets of the kinds that people bring: what is read of each, and what is told of the rest."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from conftest import ROOT
from hub_stub import COMMIT, serving

from bdh_lib.data import formats, parsers, sources
from bdh_lib.data import hub as hub_access
from bdh_lib.data import prepare as preparing
from bdh_lib.data.describe import describe
from bdh_lib.data.prepare import DataSettings, load_unsplit
from bdh_mlx import UserError

N = 20


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows(make, n=N):
    return [make(i) for i in range(n)]


def asked(i):
    return {"instruction": f"ask {i}", "response": f"reply {i}"}


def talk(*turns, key="messages", role="role", content="content"):
    return {key: [{role: speaker, content: text} for speaker, text in turns]}


def table(delimiter, header=("instruction", "response")):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(
        [header, *((f"ask {i}", f"a, {i}") for i in range(N))]
    )
    return out.getvalue()


def excerpt(i, last="reply"):
    return f"### Instruction:\nask {i}\n\n### Response:\n{last} {i}\n---"


KINDS = {  # file: its content, and what its training bytes must and must not hold
    "list.json": (json.dumps(rows(asked), indent=1), excerpt(3), None),
    "wrapped.json": (json.dumps({"version": "1", "data": rows(asked)}), excerpt(3), None),
    "wrapped.jsonl": (json.dumps({"data": rows(asked)}), excerpt(3), None),
    "wrapped, then blank.json": (json.dumps({"data": rows(asked)}) + "\n\n", excerpt(3), None),
    "columns.json": (
        json.dumps({name: [row[name] for row in rows(asked)] for name in asked(0)}), excerpt(3),
        None,
    ),
    "columns by row.json": (
        json.dumps({n: {str(i): row[n] for i, row in enumerate(rows(asked))} for n in asked(0)}),
        excerpt(3), None,
    ),
    "records by name.json": (json.dumps({f"r{i}": asked(i) for i in range(N)}), excerpt(3), None),
    "commas.jsonl": ("".join(json.dumps(r) + ",\n" for r in rows(asked)), excerpt(3), None),
    "commas.json": (",\n".join(map(json.dumps, rows(asked))), excerpt(3), None),
    "array.jsonl": (json.dumps(rows(asked), indent=2), excerpt(3), None),
    "array in a line.jsonl": (json.dumps(rows(asked)), excerpt(3), None),
    "array of lines.jsonl": (
        "[\n" + ",\n".join(map(json.dumps, rows(asked))) + "\n]\n", excerpt(3), None,
    ),
    "pretty.jsonl": ("\n".join(json.dumps(r, indent=2) for r in rows(asked)), excerpt(3), None),
    "pretty.ndjson": ("\n".join(json.dumps(r, indent=2) for r in rows(asked)), excerpt(3), None),
    "chats as lists.jsonl": (
        jsonl(*(talk(("human", f"ask {i}"), ("gpt", f"reply {i}"), role="from", content="value")
                ["messages"] for i in range(N))), excerpt(3), None,
    ),
    "numbers.jsonl": (
        jsonl(*(asked(i) | {"response": i + 0.5} for i in range(N))), ":\n3.5\n", None,
    ),
    "numbers.json": (
        json.dumps([asked(i) | {"response": i + 0.5} for i in range(N)]), ":\n3.5\n", None,
    ),
    "digits.jsonl": (
        jsonl(*rows(asked)).replace('"reply 3"', "1.50e3").replace('"reply 4"', "9" * 5000),
        ":\n1.50e3\n", None,
    ),
    "semicolon.csv": (table(";"), "a, 3\n---", None),
    "bar.csv": (table("|"), "a, 3\n---", None),
    "spaces.csv": (
        "instruction, response\n" + "".join(f'"ask {i}", "a, {i}"\n' for i in range(N)),
        "ask 3\n\n### Response:\na, 3\n---", None,
    ),
    "tab.csv": (table("\t"), "a, 3\n---", None),
    "tab.tsv": (table("\t"), "a, 3\n---", None),
    "capitals.csv": (table(",", ("Instruction", "RESPONSE")), "a, 3\n---", None),
    "utf16.csv": (table(",").encode("utf-16"), "a, 3\n---", None),
    "utf16.jsonl": (jsonl(*rows(asked)).encode("utf-16"), excerpt(3), None),
    "marked.csv": (b"\xef\xbb\xbf" + table(",").encode(), "a, 3\n---", None),
    "quotes.csv": (
        table(",").replace("ask 3", '"ask\n3"').replace('"a, 4"', '"say ""a"",\n\nthen"'),
        'say "a",\n\nthen\n---', None,
    ),
    "packed.jsonl.gz": (gzip.compress(jsonl(*rows(asked)).encode()), excerpt(3), None),
    "packed.csv.bz2": (bz2.compress(table(",").encode()), "a, 3\n---", None),
    "packed.JSON.xz": (lzma.compress(json.dumps(rows(asked)).encode()), excerpt(3), None),
    "packed.jsonl.zst": (
        pyarrow.Codec("zstd").compress(jsonl(*rows(asked)).encode(), asbytes=True), excerpt(3),
        None,
    ),
    "notes.md": ("\n\n".join(f"# Note {i}\nText." for i in range(N)), "# Note 3\nText.", None),
    "dos.txt": ("\r\n\r\n".join(f"One {i}\r\ntwo" for i in range(N)).encode(), "One 3\ntwo", "\r"),
    "context.jsonl": (
        jsonl(*(asked(i) | {"context": f"By {i}.", "category": "qa"} for i in range(N))),
        "ask 3\n\nBy 3.\n\n### Response", "qa",
    ),
    "passage.jsonl": (
        jsonl(*({"query": f"ask {i}", "passage": f"By {i}.", "reply": "r"} for i in range(N))),
        "ask 3\n\nBy 3.\n\n### Response", None,
    ),
    "input output.jsonl": (
        jsonl(*({"input": f"ask {i}", "output": f"reply {i}"} for i in range(N))), excerpt(3), None,
    ),
    "orca.jsonl": (
        jsonl(*({"system_prompt": f"You {i}", "question": f"ask {i}", "response": f"reply {i}"}
                for i in range(N))), f"### System:\nYou 3\n\n{excerpt(3)}", None,
    ),
    "squad.jsonl": (
        jsonl(*({"question": f"ask {i}", "context": "c", "answers": {"text": [f"r {i}", "no"]}}
                for i in range(N))), "\n\nc\n\n### Response:\nr 3\n---", "no",
    ),
    "tools.jsonl": (
        jsonl(*({"messages": [
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
            {"role": "tool", "content": f"tool {i}"},
            {"role": "assistant", "content": f"reply {i}"}]} for i in range(N))),
        excerpt(3), "tool",
    ),
    "two questions.jsonl": (
        jsonl(*(talk(("user", f"text {i}"), ("user", "sum up"), ("assistant", f"sum {i}"))
                for i in range(N))), "text 3\n\nsum up\n\n### Response:\nsum 3\n---", None,
    ),
    "turns.jsonl": (
        jsonl(*(talk(("user", f"ask {i}"), ("assistant", f"reply {i}"), ("user", "more?"),
                     ("assistant", f"more {i}")) for i in range(N))),
        "reply 3\n\n### Instruction:\nmore?\n\n### Response:\nmore 3\n---", None,
    ),
    "developer.jsonl": (
        jsonl(*(talk(("developer", f"brief {i}"), ("user", "q"), ("assistant", "a"))
                for i in range(N))), "### System:\nbrief 3\n\n### Instruction:\nq", None,
    ),
    "conversation.jsonl": (
        jsonl(*(talk(("Human", f"ask {i}"), ("ChatGPT", f"reply {i}"), key="conversation")
                for i in range(N))), excerpt(3), None,
    ),
    "trl.jsonl": (
        jsonl(*({"prompt": [{"role": "user", "content": f"ask {i}"}],
                 "completion": [{"role": "assistant", "content": f"reply {i}"}]}
                for i in range(N))), excerpt(3), None,
    ),
    "half with system.jsonl": (
        jsonl(*(asked(i) | {"system": "" if i % 2 else f"sys {i}"} for i in range(N))),
        f"---\n\n{excerpt(3)}", None,
    ),
    "replacement character.jsonl": (
        jsonl(*(asked(i) | {"response": f"\ufffd {i}"} for i in range(N))),
        ":\n\ufffd 3\n---", None,
    ),
}  # fmt: skip


def prepared(source, cache, mode="full", columns=None):
    """The report of prepared data, and all their bytes."""
    folder = preparing.prepare(DataSettings(str(source), mode, 0.1, 1, columns), cache)
    sides = [(folder / f"{side}.bin").read_bytes() for side in ("train", "val")]
    return json.loads((folder / "data.json").read_text()), b"\n\n".join(sides).decode()


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_read_whole(tmp_path, name):
    content, wanted, unwanted = KINDS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    report, text = prepared(tmp_path / name, tmp_path / "cache")
    assert report["train"]["records"] + report["val"]["records"] + report["shared"] == N
    assert not report["skipped"] and wanted in text
    assert unwanted is None or unwanted not in text


def test_numbers_are_the_same_text_from_every_kind_of_file(tmp_path):
    records = [{"instruction": i, "response": i + 0.25} for i in range(N)]
    write = {
        "jsonl": lambda file: file.write_text(jsonl(*records)),
        "json": lambda file: file.write_text(json.dumps(records)),
        "csv": lambda file: datasets.Dataset.from_list(records).to_csv(file),
        "parquet": lambda file: datasets.Dataset.from_list(records).to_parquet(file),
    }
    texts = set()
    for kind, make in write.items():
        make(tmp_path / f"d.{kind}")
        texts.add(prepared(tmp_path / f"d.{kind}", tmp_path / "cache")[1])
    assert len(texts) == 1 and ":\n3\n\n### Response:\n3.25\n---" in texts.pop()


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    splits = {name: datasets.Dataset.from_list(
        [{"prompt": f"{name} q{i}", "completion": f"{name} a{i}"} for i in range(N)]
    ) for name in ("train", "validation", "test")}  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    splits["train"].save_to_disk(tmp_path / "one")
    for split in ("all/train", "one"):  # what `map` writes into the folder of the data
        data = (tmp_path / split / "data-00000-of-00001.arrow").read_bytes()
        (tmp_path / split / "cache-1f0a.arrow").write_bytes(data)
    report, text = prepared(tmp_path / "all", tmp_path / "cache")
    assert (report["train"]["records"], report["val"]["records"]) == (N, N)
    assert "test q" not in text and not report["skipped"]
    report, text = prepared(tmp_path / "one", tmp_path / "cache")
    assert report["records"] == N and "train q3\n\n### Response:\ntrain a3\n---" in text
    assert "not read: 3 other files: cache-1f0a.arrow, dataset_info.json, st" in describe(report)


def test_an_arrow_file_may_be_a_file_or_a_stream(tmp_path):
    import pyarrow as pa

    table = pa.table({"instruction": [str(i) for i in range(N)], "response": pa.array([0.1] * N,
                      pa.float32())})  # fmt: skip
    for kind, writer in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with writer(tmp_path / f"{kind}.arrow", table.schema) as out:
            out.write_table(table, max_chunksize=7)
        report, text = prepared(tmp_path / f"{kind}.arrow", tmp_path / "cache")
        assert report["records"] == N and "\n3\n\n### Response:\n0.1\n---" in text
    (tmp_path / "d.arrow").write_bytes((tmp_path / "stream.arrow").read_bytes()[:100])
    with pytest.raises(UserError, match=r"d\.arrow cannot be read as \.arrow: "):
        prepared(tmp_path / "d.arrow", tmp_path / "cache")


def test_single_precision_in_parquet_is_as_short_as_it_was_written(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"instruction": pa.array([str(i) for i in range(N)])}
    columns["response"] = pa.array([0.1] * (N - 1) + [None], pa.float32())
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    report, text = prepared(tmp_path / "d.parquet", tmp_path / "cache")
    assert ":\n0.1\n---" in text and report["skipped"] == {"response is null, not text": 1}


REFUSED = {
    "joined.json": (json.dumps([{"instruction,output": "x"}] * N), r"unknown \(instruction,output"),
    "cp1252.csv": (table(",").replace("ask", "Où").encode("cp1252"), "Windows-1252.*iconv -f WIN"),
    "cyrillic.csv": (table(",").replace("ask", "Привет").encode("cp1251"), "another script"),
    "cp1252.jsonl": (jsonl(*rows(asked)).replace("ask", "Où").encode("cp1252"), "Windows-1252"),
    "cp1252.json": ('[{"text": "Où, où"}]'.encode("cp1252"), "Windows-1252"),
    **{
        f"zeros.{kind}": (bytes(4000), "filled with zero bytes") for kind in ("jsonl", "csv", "txt")
    },
    **{
        f"noise.{kind}": (np.random.default_rng(0).bytes(5000), "is no text")
        for kind in ("jsonl", "json", "txt")
    },
    "unmarked.jsonl": (jsonl(*rows(asked)).encode("utf-16-le"), "UTF-16 without its mark"),
    "unmarked.csv": (table(",").encode("utf-16-be"), "UTF-16 without its mark"),
    "columns.jsonl": (jsonl(*[{"foo": "a", "bar": "b"}] * N), "--columns instruction=COLUMN,resp"),
    "python.jsonl": ("{'instruction': 'a'}\n" * N, "skipped 20: not JSON"),
    "turn in a line.jsonl": (jsonl(*[{"role": "user", "content": "x"}] * N), "role, content"),
    "damaged.jsonl.gz": (gzip.compress(b"x" * 999)[:-9], r"cannot be read as \.jsonl"),
    "no.gz": (b"x", "ends in none of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=reason) as error:
        prepared(tmp_path / name, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_one_line_that_is_not_utf8_costs_itself_where_others_are(tmp_path):
    text = jsonl(*(asked(i) | {"response": f"é {i}"} for i in range(N))).encode()
    (tmp_path / "d.jsonl").write_bytes(text + text.split(b"\n")[0].replace(b"\xc3", b"\xff") * 2)
    report, _ = prepared(tmp_path / "d.jsonl", tmp_path / "cache")
    assert report["skipped"] == {"not valid UTF-8": 1} and report["records"] == N + 1


def test_a_bad_row_of_a_table_costs_itself_and_is_counted(tmp_path):
    text = table(",").replace("ask 3", '"ask 3').replace('ask 5,"a, 5"', "ask 5,a, 5, b")
    (tmp_path / "d.csv").write_text(text, newline="")
    report, text = prepared(tmp_path / "d.csv", tmp_path / "cache")
    assert report["records"] == N and sum(report["skipped"].values()) == 2
    assert "more values than columns" in report["skipped"] and "ask 4" in text


def test_tokens_of_nanogpt_are_recognised(tmp_path):
    rng = np.random.default_rng(0)
    for name, most in (("characters", 65), ("gpt2", 50257)):
        (folder := tmp_path / name).mkdir()
        for side in ("train", "val"):
            drawn = (most * rng.random(5000) ** 3).astype(np.uint16)  # as text: small ones often
            drawn.tofile(folder / f"{side}.bin")
        with pytest.raises(UserError, match="tokens of 16 bits, as nanoGPT"):
            prepared(folder, tmp_path / "cache")
    text = "Le café\x00 est là. 你好 ".encode() * 500
    for name, content in (("text", text), ("any bytes", rng.bytes(10_000))):
        (folder := tmp_path / name).mkdir()
        for side in ("train", "val"):
            (folder / f"{side}.bin").write_bytes(content)
        preparing.prepare(DataSettings(str(folder), "full", 0.1, 1), tmp_path / "cache")


# ------------------------------------------------------------------------------- what is left out


def test_all_that_is_not_trained_on_is_told(tmp_path):
    records = [asked(i) | {"source": "x" * 50, "note": ""} for i in range(N)]
    records += [{"instruction": "alone"}, talk(("user", "q"), ("assistant", "a"), ("user", "open"))]
    (folder := tmp_path / "data").mkdir()
    (folder / "d.jsonl").write_text(jsonl(*records))
    for name in ("README.md", "LICENSE.txt", "picture.png"):
        (folder / name).write_text("About the data.\n\nNo record.")
    report, text = prepared(folder, tmp_path / "cache")
    told = describe(report)
    assert "skipped 1: response missing (first: record 21)" in told
    assert "left out 1: question without a reply after it" in told
    assert f"source {1000 / report['bytes_read']:.1%}" in told and "note" not in report["unused"]
    assert "not read: 3 other files: LICENSE.txt, README.md, picture.png" in told
    assert "About the data" not in text and "open" not in text
    assert "field system" not in told and "no record has a system text" in told
    instruction = prepared(folder, tmp_path / "cache", "instruction")
    assert "field response: in 95.5% of records" in describe(instruction[0])
    assert "not part of this mode" in describe(instruction[0]) and "open" in instruction[1]


OTHER_THAN_NAMED = {  # how a file starts, and what is said of it
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n": "run `git lfs pull`",
    b"\r\n<!DOCTYPE html>\n<html>\n\n<p>Sign in</p>": "a web page: download the file itself",
    b"\xef\xbb\xbf<html>\n\n": "a web page: download the file itself",
    b"PK\x03\x04\x14": "a zip archive or an Excel workbook",
    gzip.compress(b"a\n\nb"): "compressed: unpack it, or put .gz after its name",
    pyarrow.Codec("zstd").compress(b"a\n\nb", asbytes=True): "or put .zst after its name",
    b"%PDF-1.7\n\n": "a PDF: save its text as .txt",
    b"PAR1\x15\x04": "a Parquet file: name it .parquet",
}


@pytest.mark.parametrize("content", OTHER_THAN_NAMED, ids=OTHER_THAN_NAMED.values())
def test_a_file_of_another_kind_than_its_name_says_is_told(tmp_path, content):
    for kind in ("jsonl", "json", "csv", "txt", "parquet", "arrow", "jsonl.gz"):
        file, what = tmp_path / f"d.{kind}", OTHER_THAN_NAMED[content]
        file.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
        if (kind == "txt" and "web page" in what) or (kind == "parquet" and "Parquet" in what):
            continue
        with pytest.raises(UserError) as refused:
            prepared(file, tmp_path / "cache")
        assert f"{file} cannot be read as .{kind[:5]}" in str(refused.value)
        assert what in str(refused.value)


def test_text_that_only_starts_like_another_kind_is_read(tmp_path):
    for start in ("PAR1", "%PDF", "version", "PK", "<html>", "<!DOCTYPE html>"):
        (tmp_path / "d.txt").write_text("\n\n".join(f"{start} {i}" for i in range(N)))
        assert f"{start} 3" in prepared(tmp_path / "d.txt", tmp_path / "cache")[1]


def test_chats_that_a_table_holds_as_json_are_read(tmp_path):
    """A CSV has no lists, and `datasets` writes turns of unlike keys as JSON, each a text."""
    records = [talk(("user", f"ask {i}"), ("assistant", ""), ("assistant", f"reply {i}"))
               for i in range(N)]  # fmt: skip
    for record in records:
        record["messages"][1]["tool_calls"] = [{"id": "c"}]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    turns = [{"messages": [json.dumps(turn) for turn in r["messages"]]} for r in records]
    datasets.Dataset.from_list(turns).to_parquet(tmp_path / "d.parquet")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(r["messages"])] for r in records)])
    read = {kind: prepared(tmp_path / f"d.{kind}", tmp_path / "c") for kind in ("csv", "parquet")}
    for report, text in read.values():
        assert text == prepared(tmp_path / "d.jsonl", tmp_path / "c")[1] and excerpt(3) in text
        assert report["left_out"] == {"reply that only calls tools": N}
        assert "messages[].tool_calls" in report["unused"]


def test_what_turns_hold_beside_their_text_is_told(tmp_path):
    records = [talk(("user", f"ask {i}"), ("assistant", f"reply {i}")) for i in range(N)]
    for record in records:
        record["messages"][1]["reasoning_content"] = "x" * 50
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    report, _ = prepared(tmp_path / "d.jsonl", tmp_path / "cache")
    share = f"{1000 / report['bytes_read']:.1%}"
    assert f"all bytes: messages[].reasoning_content {share}" in describe(report)
    questions = [talk(("user", f"ask {i}")) for i in range(N)]
    for record in questions:
        record["messages"][0]["id"] = "x"
    (tmp_path / "d.jsonl").write_text(jsonl(*questions))
    with pytest.raises(UserError) as refused:
        prepared(tmp_path / "d.jsonl", tmp_path / "cache")
    assert "messages[].id" in str(refused.value) and "--columns" not in str(refused.value)


def test_bad_responses_and_marked_replies_are_told(tmp_path):
    records = [asked(i) | {"label": i % 10 > 0} for i in range(4 * N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    report, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache")
    assert "skipped 8: label is false, for a bad response" in describe(report)
    assert "--columns label=" in describe(report) and excerpt(11) in text and "reply 10" not in text
    assert "reply 10" in prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns="label=")[1]
    turns = [talk(("user", f"ask {i}"), ("assistant", "wrong"), ("user", "no"), ("assistant", "a"))
             for i in range(N)]  # fmt: skip
    for record in turns:
        record["messages"][1]["weight"] = 0
    (tmp_path / "d.jsonl").write_text(jsonl(*turns))
    report, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache")
    assert f"left out {N}: reply that is marked as not to train on" in describe(report)
    assert "wrong" not in text


def test_columns_are_taken_as_the_setting_says(tmp_path):
    records = [{"ask": f"ask {i}", "say": f"reply {i}", "who": f"W {i}"} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    chosen = "instruction=ask, response=say, system=WHO"
    _, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns=chosen)
    assert f"### System:\nW 3\n\n{excerpt(3)}" in text
    with pytest.raises(
        UserError, match=r"COLUMNS names 'qury', which no record has.*ask, say, who"
    ):
        prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns="instruction=qury,response=say")


def test_values_of_objects_are_asked_for_and_taken(tmp_path):
    records = [{"translation": {"en": f"ask {i}", "fr": f"reply {i}"}} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "d.parquet")
    chosen = "instruction=translation.en,response=translation.fr"
    for kind in ("jsonl", "parquet"):
        with pytest.raises(UserError) as refused:
            prepared(tmp_path / f"d.{kind}", tmp_path / "cache")
        told = str(refused.value)
        assert "columns translation.fr, translation.en holds it: --columns instruction=COL" in told
        assert "or messages=COLUMN for turns, text=COLUMN for plain text" in told
        assert excerpt(3) in prepared(tmp_path / f"d.{kind}", tmp_path / "cache", columns=chosen)[1]


def test_columns_that_may_be_the_same_field_are_asked_for(tmp_path):
    records = [
        {"problem": f"ask {i}", "answer": str(i), "solution": f"reply {i}"} for i in range(N)
    ]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    told = describe(prepared(tmp_path / "d.jsonl", tmp_path / "cache")[0])
    flag = "response=solution"
    assert f"column solution may be the response, too: --columns {flag} takes it" in told
    report, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns=flag)
    assert excerpt(3) in text and "column answer may be the response, too" in describe(report)
    records = [asked(i) | {"input": "i", "context": "c", "Response": "x"} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    told = describe(prepared(tmp_path / "d.jsonl", tmp_path / "cache")[0])
    assert "column input may be the context, too" in told and "input may be the ins" not in told
    text = prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns="response=Response")[1]
    assert ":\nx\n---" in text
    chats = [talk(("user", "q"), ("assistant", f"a{i}")) | {"answer": "x"} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*chats))
    assert "may be" not in describe(prepared(tmp_path / "d.jsonl", tmp_path / "cache")[0])


def test_a_column_that_is_empty_gives_way_to_one_that_is_filled(tmp_path):
    """A table gives every record all columns, and those that it lacks as null or empty."""
    records = [*rows(asked), *({"text": f"plain {i}"} for i in range(N))]
    records += [{"question": f"also {i}", "answers": f"yes {i}"} for i in range(N)]
    names = ("instruction", "response", "text", "question", "answers", "messages")
    full = [{name: record.get(name) for name in names} for record in records]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    datasets.Dataset.from_list(full).to_parquet(tmp_path / "d.parquet")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(full)
    texts = {kind: prepared(tmp_path / f"d.{kind}", tmp_path / "c")[1]
             for kind in ("jsonl", "parquet", "csv")}  # fmt: skip
    assert texts["jsonl"] == texts["parquet"] == texts["csv"]
    assert excerpt(3) in texts["csv"] and "\n\nplain 3" in texts["csv"]
    assert "### Instruction:\nalso 3\n\n### Response:\nyes 3\n---" in texts["csv"]


@pytest.mark.parametrize("bad", ["# one\n# two\n", "{ one\n[ two\n", "{ one\n\n{ two\n"])
def test_bad_lines_at_the_start_cost_themselves_alone(tmp_path, bad):
    (tmp_path / "d.jsonl").write_text(bad + jsonl({"text": "a\u2028b\x85\x0c"}, {"text": "c"}))
    records = [*sources.read_records(str(tmp_path / "d.jsonl"))]
    assert [r for r in records if isinstance(r, dict)] == [
        {"text": "a\u2028b\x85\x0c"},
        {"text": "c"},
    ]
    assert records.count("not JSON") == 2


def test_one_chat_of_plain_turns_is_one_record(tmp_path):
    """A file with one line is a document, which may hold a table by columns."""
    record = {"conversations": ["ask", "reply"], "source": "s"}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    assert [*sources.read_records(str(tmp_path / "d.jsonl"))] == [record]
    table = {"conversations": [json.dumps([{"role": "user", "content": c}]) for c in "ab"]}
    (tmp_path / "d.jsonl").write_text(json.dumps(table))
    assert len([*sources.read_records(str(tmp_path / "d.jsonl"))]) == 2


@pytest.mark.parametrize("rule", ["|---|:---:|", "| --- | ---: |"])
def test_the_rule_of_a_markdown_table_is_no_record(tmp_path, rule):
    (tmp_path / "d.csv").write_text(f"| prompt | reply |\n{rule}\n| ask | say |\n| --- | - |\n")
    records = [*sources.read_records(str(tmp_path / "d.csv"))]
    assert [(r["prompt"], r["reply"]) for r in records] == [("ask", "say"), ("---", "-")]
    (tmp_path / "d.csv").write_text(f"prompt|reply\n{rule.strip('| ')}\n")
    assert [*sources.read_records(str(tmp_path / "d.csv"))] == []


def test_a_quote_that_never_ends_costs_its_row_and_a_bounded_memory(tmp_path, monkeypatch):
    lines = ["instruction,response", '"a,b', *(f"q{i},r{i}" for i in range(300))]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    for limit in (10**6, 200):
        monkeypatch.setattr(parsers, "LARGEST_ROW", limit)
        bad, *good = sources.read_records(str(tmp_path / "d.csv"))
        assert bad.startswith("row with a wrong quote")
        assert good == [{"instruction": f"q{i}", "response": f"r{i}"} for i in range(300)]


def test_a_space_after_a_delimiter_is_text_unless_the_header_has_it(tmp_path):
    for content, record in (
        ("text\n  a\n", {"text": "  a"}),
        ("question,answer\na, b\n", {"question": "a", "answer": " b"}),
        ("question, answer\na, b\n", {"question": "a", "answer": "b"}),
    ):
        (tmp_path / "d.csv").write_text(content)
        assert [*sources.read_records(str(tmp_path / "d.csv"))] == [record]


def test_a_column_without_a_name_is_named_by_its_place(tmp_path):
    lines = [",instruction,response", *(f"{i},ask {i},reply {i}" for i in range(N))]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    report, text = prepared(tmp_path / "d.csv", tmp_path / "cache")
    assert [*report["unused"]] == ["column 1"] and excerpt(3) in text


def test_a_table_without_names_of_columns_is_asked_for_them(tmp_path):
    (tmp_path / "d.csv").write_text("".join(f"ask {i},reply {i}\n" for i in range(N)))
    with pytest.raises(UserError, match="first line is a record, put the names of the columns bef"):
        prepared(tmp_path / "d.csv", tmp_path / "cache")


def test_a_header_is_read_as_the_rows_are(tmp_path):
    (tmp_path / "d.csv").write_text('question,"ans\nwer",answer,answer\nq,x,a,b\n')
    assert [*sources.read_records(str(tmp_path / "d.csv"))] == [
        {"question": "q", "ans\nwer": "x", "answer": "a", "answer (2)": "b"}
    ]
    (tmp_path / "d.csv").write_text('question,"answer"x\nq,x\n')
    with pytest.raises(UserError, match=r"as \.csv: its header: row with a wrong quote"):
        [*sources.read_records(str(tmp_path / "d.csv"))]


def test_turns_that_a_mode_cannot_place_are_counted(tmp_path):
    early = [talk(("user", f"early {i}"), ("system", "S"), ("user", f"late {i}")) for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*early))
    report, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache", "both")
    assert report["left_out"] == {formats.NO_SYSTEM: N} and "early" not in text
    tail = [talk(("user", f"q{i}"), ("assistant", "a"), ("system", "T")) for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*tail))
    report, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache")
    assert report["left_out"] == {formats.NO_REPLY_TO_SYSTEM: N}
    assert report["without_system"] == N and report["several_turns"] == 0


def test_the_trainer_and_the_generator_take_the_flag(tmp_path):
    records = [{"ask": f"ask {i}", "say": f"reply {i}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    columns = ["--columns", "instruction=ask,response=say"]
    run = [sys.executable, ROOT / "train_mlx.py", "--preset", "tiny", "--max-iters", "1", *columns]
    run += ["--dataset", tmp_path / "d.jsonl", "--checkpoint-dir", tmp_path, "--block-size", "64"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ask = [sys.executable, ROOT / "generate.py", tmp_path / "full", *columns]
    table = subprocess.run(
        [*ask, "--evaluate", tmp_path / "d.jsonl"], capture_output=True, text=True
    )
    assert table.returncode == 0 and "instruction" in table.stdout, table.stderr
    (tmp_path / "p.jsonl").write_text(jsonl({"ask": "ask 3"}))
    ask += ["--prompts", tmp_path / "p.jsonl", "--max-new-tokens", "3"]
    written = subprocess.run(ask, capture_output=True, text=True)
    assert json.loads(written.stdout)["prompt"] == excerpt(3).partition("reply")[0], written.stderr


# ---------------------------------------------------------------------------------------- splits


def split_folder(folder, *names):
    for name in names:
        (file := folder / name).parent.mkdir(parents=True, exist_ok=True)
        side = sources.split_of(Path(name)) or "extra"
        file.write_text(jsonl(*({"prompt": f"{side} q{i}", "completion": f"{side} a{i}"}
                                for i in range(20 if side == "train" else 5))))  # fmt: skip
    return folder


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
    told = describe(report)
    assert "validation, as given: 5 records" in told and "say little of the loss" in told
    report["val"]["bytes"] = 1000
    assert "say little of the loss" not in describe(report)
    assert f"not read: the test split, {Path(names.format('test')).name}" in told
    assert f"--evaluate {folder}#test" in told
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


# ------------------------------------------------------------------------------------------- hub


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
