"""Each kind of file gives the same records, and odd ones say what is wrong."""

import json

import datasets
import pytest
from helpers import numbered, prepare, write_jsonl

from bdh_lib.data import sources
from bdh_mlx import UserError


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
    for start in (b"", b"\xef\xbb\xbf"):  # the mark at the start of a file is not part of its text
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
    '{"n": 1, "train": [{"text": "a"}], "test": [{"text": "b"}]}': (
        r"it holds 2 lists of records, train, test; write each .* train\.json, test\.json, and name"
    ),
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


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_a_file_without_a_byte_is_one_line(tmp_path, kind):
    (tmp_path / f"d.{kind}").touch()
    with pytest.raises(UserError, match=rf"d\.{kind} (is empty|cannot be read as)") as error:
        prepare(tmp_path / f"d.{kind}", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_csv_of_numbers_and_na_stays_text(tmp_path):
    (tmp_path / "d.csv").write_text("instruction,response\n1,NA\n2,None\n")
    assert [r["response"] for r in sources.read_records(str(tmp_path / "d.csv"))] == ["NA", "None"]


def test_a_text_file_is_split_at_blank_lines_and_keeps_its_bytes(tmp_path):
    text = "\n\n".join(f"Paragraph {i}\nwith two lines." for i in range(30))
    (tmp_path / "d.txt").write_text(text)
    report, train, val = prepare(tmp_path / "d.txt", tmp_path / "cache", mode="both")
    assert report["structures"] == {"text": 30} and report["val"]["records"] == 3
    assert train.endswith(b"\n\n") and val.endswith(b"\n\n")
    assert sorted((train + val).decode().split("\n\n")) == ["", *sorted(text.split("\n\n"))]
