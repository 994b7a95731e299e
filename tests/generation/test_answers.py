"""Answers to held-out records: which are asked, what is answered, and how it is judged."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import metrics, random_model, train

import generate
from bdh_lib.data import sources
from bdh_lib.data.questions import (
    Question,
    choose_questions,
    cut_question,
    load_questions,
    question_numbers,
)
from bdh_lib.generation import jobs
from bdh_lib.generation.answers import QuestionJob, answer_questions, answers_table, chrf
from bdh_mlx import UserError

SCORES = [  # answer, truth, chrF
    # from sacrebleu's own tests (test/test_chrf.py, effective order), where any beta gives the same
    *(("a", "a", 100), ("", "reference", 0), ("a b c", "a b c", 100), ("a b c", "abc", 100)),
    ("aa", "ab", 25),
    # computed with sacrebleu 2.6.0: CHRF().sentence_score(answer, [truth]).score
    ("The cat sat.", "the cat sat on the mat", 41.02020534508246),
    ("ab", "abcdefgh", 23.404255319148938),
    ("Paris", "Paris, the capital of France.", 15.401264717873788),
    ("naïve café ☕ 北京", "naive cafe ☕ 北京市", 34.376554624841226),
    ("It is forty-two.", "42", 0),
    ("abc", "", 0),
]


@pytest.mark.parametrize(("answer", "truth", "score"), SCORES)
def test_chrf_is_that_of_sacrebleu(answer, truth, score):
    assert abs(chrf(answer, truth) - score) < 1e-9


def test_a_table_has_a_row_for_each_structure_and_the_whole():
    pairs = [("4", " 4\n"), ("It is 4.", "4"), ("five", "4"), ("yes", "yes")]
    rows = [
        QuestionJob(i, Question(b"", truth, "chat" if i == 3 else "plain")).result(answer, True, "")
        for i, (answer, truth) in enumerate(pairs)
    ]
    cells = [line.split() for line in answers_table(rows).splitlines()]
    assert cells[1:] == [
        ["plain", "3", "33.3%", "66.7%", f"{(100 + chrf('It is 4.', '4')) / 3:.1f}"],
        ["chat", "1", "100.0%", "100.0%", "100.0"],
        ["whole", "4", "50.0%", "75.0%", f"{(200 + chrf('It is 4.', '4')) / 4:.1f}"],
    ]


RECORDS = [
    {"system": "Be brief.", "instruction": "One?", "response": "1"},
    {"instruction": "Two, with marks?\n---\nagain", "response": "line\n\nline ☕"},
    {"text": "plain text, which asks nothing"},
    {
        "messages": [
            *({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}),
            *({"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}),
        ]
    },
    {"instruction": "Long? " * 20, "response": "long"},
]
STRUCTURES = [
    *("system/instruction/response", "instruction/response"),
    *("instruction/response, several turns", "instruction/response"),
]


@pytest.fixture
def mixed(tmp_path):
    """A file of records of all structures."""
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return tmp_path / "mixed.jsonl"


def test_questions_are_what_a_record_becomes_and_its_response(mixed, tmp_path):
    line, records = load_questions(str(mixed), None, {}, tmp_path)
    found = [cut_question(records, i) for i in question_numbers(records)]
    asking = [record for record in RECORDS if "text" not in record]
    assert [q.prompt for q in found] == [jobs.prompt_of_record(r, "full") for r in asking]
    assert [q.truth for q in found] == ["1", "line\n\nline ☕", "Bye", "long"]
    assert [q.structure for q in found] == STRUCTURES
    assert "all its records" in line


def test_the_questions_of_a_run_are_short_and_of_each_structure(mixed, tmp_path):
    records = load_questions(str(mixed), None, {}, tmp_path)[1]
    chosen = choose_questions(records, 3, 120, 20)
    assert [q.structure for q in chosen] == STRUCTURES[:3]
    assert [q.truth for q in choose_questions(records, 4, 120, 20)][3] == "long"  # over 120 bytes
    truths = [q.truth for q in choose_questions(records, 3, 1000, 5)]
    assert truths == ["1", "Bye", "long"]  # of two of one structure that of up to 5 bytes
    assert choose_questions(replace(records, record_ends=None), 3, 120, 20) == []


def test_a_signal_ends_the_answers(mixed, tmp_path):
    records = load_questions(str(mixed), None, {}, tmp_path)[1]
    questions = [cut_question(records, i) for i in question_numbers(records)]
    model = random_model()
    for requested, n in ((False, 4), (True, 0)):
        stop = SimpleNamespace(requested=requested)
        assert len(answer_questions(model, questions, 5, stop)) == n
    assert model.decode_step is None


# ------------------------------------------------------------------------------------ in training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of runs after ten updates with two evaluations that write answers."""
    folder = tmp_path_factory.mktemp("answers")
    assert train(folder, "--max-iters", 10, "--sample-bytes", 20, "--eval-bytes", 3500) == 0
    return folder


def test_each_evaluation_asks_the_same_and_answers_as_generating_does(run, capsysbinary):
    lines = [m["answers"] for m in metrics(run) if "answers" in m]
    assert len(lines) == 2
    before, after = ([(a["prompt"], a["truth"]) for a in line] for line in lines)
    assert before == after and len(before) == 3
    val = next((run / ".data").glob("*/val.bin")).read_bytes()
    for answer in lines[-1]:
        assert f"{answer['prompt']}{answer['truth']}\n---".encode() in val
        prompt = answer["prompt"].replace("\n", "\\n")
        flags = ["--temperature", "0", "--max-new-tokens", "20", "--prompt", prompt]
        flags += ["--window", "64"]  # the block, which a prompt exceeds
        capsysbinary.readouterr()
        assert generate.main([str(run / "full" / "step-000010"), *flags]) == 0
        written = capsysbinary.readouterr().out.decode()
        assert written == f"{answer['prompt']}{answer['answer']}\n"


@pytest.mark.parametrize(
    "flags", ["", "--training-mode both --sample-bytes 1", "--dataset d.txt --sample-bytes 1"]
)
def test_there_are_no_answers_without_a_response_or_without_samples(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("\n\n".join(f"{i} paragraph of plain text" for i in range(30)))
    train(tmp_path, "--max-iters", 1, "--run-name", "full", *flags.split())
    lines = metrics(tmp_path)
    assert not any("answers" in m for m in lines)
    assert any("samples" in m for m in lines) == ("--sample-bytes" in flags)


# ------------------------------------------------------------------------------------ of a data set


def test_answers_are_to_what_the_run_held_out_and_go_on_where_they_stopped(run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = "--answers 6 --max-new-tokens 9 --batch-size 4"
    copy = tmp_path / "copy.jsonl"  # the same data by another name
    copy.write_bytes(sources.SAMPLE.read_bytes())

    def answered(data, *more):
        capsys.readouterr()
        assert (
            generate.main([str(run / "full"), "--evaluate", str(data), *flags.split(), *more]) == 0
        )
        return capsys.readouterr().out

    table = answered("sample", "--out", str(out))
    about, longer, head, *_, whole = table.splitlines()
    assert about == "sample: the records that the run held out; 6 of 51 answered"
    assert longer == "true responses longer than --max-new-tokens 9: 6"
    assert head.split()[0] == "structure" and whole.split()[:2] == ["whole", "6"]
    content = out.read_bytes()
    val = next((run / ".data").glob("*/val.bin")).read_bytes()
    for line in map(json.loads, content.splitlines()):
        assert f"{line['prompt']}{line['truth']}\n---".encode() in val
        assert line["chrf"] == round(chrf(line["answer"], line["truth"]), 2)
    assert answered(copy) == table.replace("sample", str(copy))
    copy.write_bytes(copy.read_bytes().replace(b"CSV", b"TSV", 1))  # as many bytes, other ones
    assert f"{copy}: all its records, also any that the model was trained on" in answered(copy)
    for kept in (0, 1, len(content) // 2, len(content)):
        out.write_bytes(content[:kept])
        assert answered("sample", "--out", str(out)) == table
        assert sorted(out.read_bytes().splitlines()) == sorted(content.splitlines())
    out.write_text("mine\n")
    with pytest.raises(UserError, match="line 1 is not an answer of this command"):
        answered("sample", "--out", str(out))
    part = tmp_path / "part.jsonl"
    part.write_text("".join(sources.SAMPLE.read_text().splitlines(keepends=True)[:9]))
    assert answered(part).startswith(
        f"{part}: all its records, also any that the model was trained"
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--answers 3", "--answers is for the questions of --evaluate DATA; give both"),
        ("--answers 3 --trace x", "--answers is for the questions of --evaluate DATA"),
        ("--evaluate sample --answers 0", "--answers is 0; it must be a whole number from 1"),
        ("--evaluate sample --answers 3 --seed 1", "--seed: no effect beside --evaluate"),
        ("--evaluate sample --answers 3 --temperature 0", "--temperature: no effect beside"),
        ("--evaluate sample --out x", "--out: no effect beside --evaluate"),
        ("--evaluate sample --answers 3 --mode both", "models of mode full.* the mode is both"),
        ("--evaluate d.txt --answers 3", "d.txt has no response to compare an answer with"),
        ("--evaluate split --answers 3", "does not say where its records end"),
    ],
)
def test_answers_that_cannot_be_are_one_line(flags, complaint, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")
    (tmp_path / "split").mkdir()
    for side in ("train", "val"):
        (tmp_path / "split" / f"{side}.bin").write_bytes(b"bytes of a split")
    with pytest.raises(UserError, match=complaint) as error:
        generate.main([str(run / "full"), *flags.split()])
    assert "\n" not in str(error.value)
