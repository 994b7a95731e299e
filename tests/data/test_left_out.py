"""What is not trained on is printed; columns of other names are asked for and taken."""

import csv
import json

import datasets
import pytest
from helpers import train
from records import N, asked, excerpt, jsonl, prepared, rows, talk

from bdh_lib.data import formats
from bdh_lib.data.describe import describe
from bdh_lib.generation.jobs import parse_line
from bdh_mlx import UserError


def test_all_that_is_not_trained_on_is_told(tmp_path):
    records = [asked(i) | {"source": "x" * 50, "note": ""} for i in range(N)]
    records += [{"instruction": "alone"}, talk(("user", "q"), ("assistant", "a"), ("user", "open"))]
    (folder := tmp_path / "data").mkdir()
    (folder / "d.jsonl").write_text(jsonl(*records))
    for name in ("README.md", "LICENSE.txt", "picture.png"):
        (folder / name).write_text("About the data.\n\nNo record.")
    report, text = prepared(folder, tmp_path / "cache")
    shown = describe(report)
    assert "skipped 1: response missing (first: record 21)" in shown
    assert "left out 1: question without a reply after it" in shown
    assert f"source {1000 / report['bytes_read']:.1%}" in shown and "note" not in report["unused"]
    assert "not read: 3 other files: LICENSE.txt, README.md, picture.png" in shown
    assert "About the data" not in text and "open" not in text
    assert "field system" not in shown and "no record has a system text" in shown
    instruction = prepared(folder, tmp_path / "cache", "instruction")
    assert "field response: in 95.5% of records" in describe(instruction[0])
    assert "not part of this mode" in describe(instruction[0]) and "open" in instruction[1]


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


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("messages=System", "holds no chat: messages=COLUMN takes turns"),
        ("messages=response", "holds no chat"),
        ("history=system", "holds no chat: history=COLUMN takes pairs"),
        ("text=extra", "is not read beside"),
    ],
)
def test_a_named_column_that_is_never_read_is_refused(tmp_path, chosen, reason):
    records = [asked(i) | {"system": f"W {i}", "extra": f"x {i}"} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    with pytest.raises(UserError, match=f"COLUMNS is '{chosen}', and .* {reason}"):
        prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns=chosen)
    with pytest.raises(UserError, match=reason):
        parse_line(json.dumps(records[0]), "full", chosen)
    if chosen == "text=extra":  # one record that is read so is enough
        (tmp_path / "d.jsonl").write_text(jsonl(*records, {"extra": "plain"}))
        assert "plain" in prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns=chosen)[1]


def test_values_of_objects_are_asked_for_and_taken(tmp_path):
    records = [{"translation": {"en": f"ask {i}", "fr": f"reply {i}"}} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "d.parquet")
    chosen = "instruction=translation.en,response=translation.fr"
    for kind in ("jsonl", "parquet"):
        with pytest.raises(UserError) as refused:
            prepared(tmp_path / f"d.{kind}", tmp_path / "cache")
        shown = str(refused.value)
        assert "columns translation.fr, translation.en holds it: --columns instruction=COL" in shown
        assert "or messages=COLUMN for turns, text=COLUMN for plain text" in shown
        assert excerpt(3) in prepared(tmp_path / f"d.{kind}", tmp_path / "cache", columns=chosen)[1]


def test_columns_that_may_be_the_same_field_are_asked_for(tmp_path):
    records = [
        {"problem": f"ask {i}", "answer": str(i), "solution": f"reply {i}"} for i in range(N)
    ]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    shown = describe(prepared(tmp_path / "d.jsonl", tmp_path / "cache")[0])
    flag = "response=solution"
    assert f"column solution may be the response, too: --columns {flag} takes it" in shown
    report, text = prepared(tmp_path / "d.jsonl", tmp_path / "cache", columns=flag)
    assert excerpt(3) in text and "column answer may be the response, too" in describe(report)
    records = [asked(i) | {"input": "i", "context": "c", "Response": "x"} for i in range(N)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    shown = describe(prepared(tmp_path / "d.jsonl", tmp_path / "cache")[0])
    assert "column input may be the context, too" in shown and "input may be the ins" not in shown
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


def test_the_trainer_and_the_generator_take_the_flag(tmp_path, output):
    records = [{"ask": f"ask {i}", "say": f"reply {i}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text(jsonl(*records))
    columns = ["--columns", "instruction=ask,response=say"]
    data = tmp_path / "d.jsonl"
    assert train(tmp_path, "--max-iters", 1, "--dataset", data, *columns) == 0
    ask = [tmp_path / "full", *columns]
    assert b"instruction" in output(*ask, "--evaluate", data)
    (tmp_path / "p.jsonl").write_text(jsonl({"ask": "ask 3"}))
    written = output(*ask, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 3)
    assert json.loads(written)["prompt"] == excerpt(3).partition("reply")[0]
