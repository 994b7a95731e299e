"""Files of the kinds that people bring: each is read whole, or refused in one line."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import numpy as np
import pyarrow
import pytest
from records import N, asked, excerpt, jsonl, prepared, rows, table, talk

from bdh_lib.data import parsers, sources
from bdh_lib.data import prepare as preparing
from bdh_lib.data.describe import describe
from bdh_lib.data.prepare import DataSettings
from bdh_mlx import UserError

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


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_a_row_of_a_table_that_cannot_be_read_costs_itself_alone(tmp_path, bad):
    import pyarrow as pa
    from pyarrow import parquet

    times = [10**6 * (10**12 if i == bad else i) for i in range(10)]  # past the year 9999
    columns = {"instruction": [f"ask {i}" for i in range(10)], "response": ["x"] * 10}
    columns["when"] = pa.array(times, pa.timestamp("us"))
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    report, text = prepared(tmp_path / "d.parquet", tmp_path / "cache")
    assert report["skipped"] == {"date value out of range": 1}
    assert f"ask {bad}" not in text and f"ask {(bad + 1) % 10}" in text


def test_single_precision_in_parquet_is_as_short_as_it_was_written(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"instruction": pa.array([str(i) for i in range(N)])}
    columns["response"] = pa.array([0.1] * (N - 1) + [None], pa.float32())
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    report, text = prepared(tmp_path / "d.parquet", tmp_path / "cache")
    assert ":\n0.1\n---" in text and report["skipped"] == {"response is null, not text": 1}


NO_MARK = "UTF-16 without its mark: iconv -f"
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
        f"noise.{kind}": (np.random.default_rng(0).bytes(5000), "is not text")
        for kind in ("jsonl", "json", "txt")
    },
    "unmarked.jsonl": (jsonl(*rows(asked)).encode("utf-16-le"), f"{NO_MARK} UTF-16LE -t"),
    "unmarked.csv": (table(",").encode("utf-16-be"), f"{NO_MARK} UTF-16BE -t"),
    "columns.jsonl": (jsonl(*[{"foo": "a", "bar": "b"}] * N), "--columns instruction=COLUMN,resp"),
    "python.jsonl": ("{'instruction': 'a'}\n" * N, "skipped 20: not JSON"),
    "deep.jsonl": (
        jsonl({"text": "a"}) + '{"text": ' + "[" * 10**5,
        r"skipped 1: its brackets are nested too deep \(first: record 2\)",
    ),
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
        file = tmp_path / f"d.{kind}"
        what = OTHER_THAN_NAMED[content]
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
