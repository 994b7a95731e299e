"""Files of prompts, and results as JSON lines."""

import errno
import fcntl
import json
import re

import pytest
from helpers import greedy, random_model

import bdh_mlx
import generate
from bdh_lib import runs
from bdh_lib.data import formats
from bdh_lib.data.parsers import parse_exactly
from bdh_lib.generation import jobs
from bdh_lib.generation.decoding import (
    decode_text,
)
from bdh_mlx import UserError


def results(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_prompts_is_answered_line_by_line_as_one_by_one(random_run, tmp_path, output):
    asked = [
        {"prompt": "one", "id": 7},
        {"system": "S", "instruction": "I"},
        {"question": "Q", "answer": "gold"},
        {"prompt": ""},
        {"text": "plain\u2028\x85 and more"},
        {"prompt": "long " * 400},
    ]
    (tmp_path / "in").write_text(
        "\n".join(json.dumps(record, ensure_ascii=False) for record in asked)
    )
    ask = (random_run, "--prompts", tmp_path / "in", "--temperature", 0, "--max-new-tokens", 12)
    output(*ask, "--out", tmp_path / "out", "--batch-size", 4)
    found = sorted(results(tmp_path / "out"), key=lambda r: r["line"])
    read_as = [
        *("one", "### System:\nS\n\n### Instruction:\nI\n\n### Response:\n"),
        *("### Instruction:\nQ\n\n### Response:\n", "", "plain\u2028\x85 and more", "long " * 400),
    ]
    model = random_model()
    for record, result, prompt, number in zip(asked, found, read_as, range(1, 7), strict=True):
        written = greedy(model, prompt.encode() or b"\n\n", 12)
        expected = {"prompt": prompt, "completion": decode_text(written), "stopped": False}
        assert result == record | {"line": number, "by": result["by"]} | expected
    assert output(*ask).splitlines() != []  # without --out, to stdout


def test_several_samples_of_each_prompt_differ_and_repeat_with_the_seed(
    random_run, tmp_path, output
):
    (tmp_path / "in").write_text('{"prompt": "a"}\n{"prompt": "bb"}\n')
    ask = (random_run, "--prompts", tmp_path / "in", "--samples", 3, "--batch-size", 4, "--seed", 3)
    ask += ("--max-new-tokens", 30)
    out = output(*ask)
    assert out == output(*ask)
    found = [json.loads(line) for line in out.splitlines()]
    assert sorted((r["line"], r["sample"]) for r in found) == [
        (line, sample) for line in (1, 2) for sample in (1, 2, 3)
    ]
    assert len({r["completion"] for r in found}) == 6
    text = output(random_run, "--prompt", "a", "--samples", 2, "--seed", 3).decode()
    assert re.findall(r"--- sample (\d)\na", text) == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("3", "not a JSON object"),
        ('{"prompt": 5}', "prompt is int, not text"),
        ('{"prompt": "a", "n": NaN}', "it holds a number that JSON cannot"),
        ('{"prompt": "a", "n": [1e999]}', "it holds a number that JSON cannot"),
        ("[" * 10**5, "its brackets are nested too deep"),
        ("\0", "not JSON"),
        ('{"system": "s"}', "instruction missing"),
        ('{"instruction": null}', "instruction is null, not text"),
        ('{"instruction": "i", "system": {}}', "system is dict, not text"),
    ],
)
def test_a_bad_line_of_prompts_is_named(line, reason, random_run, tmp_path):
    (tmp_path / "in").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=f"line 2: {reason}"):
        generate.main([str(random_run), "--prompts", str(tmp_path / "in")])


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "i", "response": None},
        {"instruction": "i", "response": 3, "system": None},
        {"messages": [{"role": "user", "content": "i"}]},
    ],
)
def test_what_a_model_would_answer_need_not_be_there(record):
    asked = b"### Instruction:\ni\n\n### Response:\n"
    assert jobs.prompt_of_record(record, "full") == asked


def test_blank_lines_of_prompts_count_but_ask_nothing(random_run, tmp_path, output):
    (tmp_path / "in").write_text('\n{"prompt": "a", "line": 7, "completion": "mine"}\n  \n')
    (found,) = output(random_run, "--prompts", tmp_path / "in", "--max-new-tokens", 3).splitlines()
    found = json.loads(found)
    assert found["line"] == 2 and found["given"] == {"line": 7, "completion": "mine"}
    (tmp_path / "in").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        generate.main([str(random_run), "--prompts", str(tmp_path / "in")])


def test_batches_hold_prompts_of_similar_length_each_once():
    made = [jobs.Job(i, None, {}, b"x" * n) for i, n in enumerate([5, 900, 1, 6, 905, 7, 2])]
    found = [[len(job.prompt) for job in b] for b in jobs.batches(made, 3, spread=10)]
    assert found == [[1, 2, 5], [6, 7], [900, 905]]


@pytest.mark.parametrize("mode", formats.REQUIRED_FIELDS)
def test_an_opening_is_the_beginning_of_the_training_text(mode):
    record = {"system": "sys", "instruction": "ask", "response": "reply"}
    text = formats.format_example(record, mode)
    opening = formats.format_prompt(formats.to_turns(record), mode)
    assert text == opening + ("reply\n---" if mode == "full" else "")
    assert formats.format_prompt([("text", "plain")], mode) == "plain"


def test_prompts_are_read_as_training_reads_its_records():
    record = parse_exactly('{"text": 1.50, "n": 1e5}')
    assert jobs.prompt_of_record(record, "instruction", "instruction=text") == b"1.50"
    turns = {"text": [{"role": "user", "content": "q"}]}
    asked = b"### Instruction:\nq\n\n### Response:\n"
    assert jobs.prompt_of_record(turns, "full", "messages=text") == asked


def test_numbers_of_a_prompt_stand_as_in_its_line_and_in_its_record(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"instruction": 1.50, "id": 7}\n')
    (job,) = jobs.read_jobs(tmp_path / "p.jsonl", "instruction", 1)
    assert job.prompt == b"1.50" and job.record == {"instruction": 1.5, "id": 7}


def test_interrupted_prompts_tell_how_many_are_written_and_keep_them(
    random_run, tmp_path, monkeypatch, capsys
):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{p}"}}\n' for p in "abc"))
    of_model = jobs.generate_batch

    def interrupted(model, prompts, *rest):
        if prompts == [b"c"]:
            raise KeyboardInterrupt
        return of_model(model, prompts, *rest)

    monkeypatch.setattr(jobs, "generate_batch", interrupted)
    flags = f"--prompts {prompts} --out {out} --batch-size 1 --max-new-tokens 5"
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(random_run), *flags.split()])
    assert "stopped: 2 of 3 texts are written" in capsys.readouterr().err
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["a", "b"]


ASKED = ["one", "a longer one", "one", "four", "five"]


@pytest.fixture
def asked(tmp_path, random_run, output, capfdbinary):
    """A function that writes the texts of ASKED to `out`; what was said on stderr."""
    lines = ({"prompt": p, "line": i} for i, p in enumerate(ASKED))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    flags = f"--prompts {tmp_path / 'p.jsonl'} --batch-size 2 --max-new-tokens 9"

    def run(*args, out=tmp_path / "out.jsonl", seed=3):
        capfdbinary.readouterr()
        generate.main([str(random_run), *flags.split(), f"--seed={seed}", "--out", str(out), *args])
        return capfdbinary.readouterr().err.decode()

    return run


@pytest.mark.parametrize(("n", "error"), [(1000, False), (1001, True)])
def test_a_long_prompt_is_told_before_it_is_read(n, error, random_run, tmp_path, capfdbinary):
    (tmp_path / "long").write_bytes(b"a" * n)
    generate.main([str(random_run), "--prompt-file", str(tmp_path / "long"), "--max-new-tokens=1"])
    line = f"reading a prompt of {n:,} bytes".encode()
    assert (line in capfdbinary.readouterr().err) == error


def test_texts_of_the_default_window_are_those_of_none(asked, tmp_path):
    asked()
    before = (tmp_path / "out.jsonl").read_bytes()
    asked("--window", "none")
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("other", "seed"), [("--temperature 0.5", 3), ("", 4), ("--window 8", 3), ("--stop x", 3)]
)
def test_texts_of_another_command_do_not_count_as_done(other, seed, asked, tmp_path):
    asked()
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="its line 1 is not an answer of this command"):
        asked(*other.split(), seed=seed)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_texts_of_another_model_do_not_count_as_done(asked, random_run, tmp_path, monkeypatch):
    asked()
    real = runs.find_weights
    other = tmp_path / "other.safetensors"
    bdh_mlx.save_model(random_model(seed=5), other)
    monkeypatch.setattr(generate.runs, "find_weights", lambda path: real(other))
    with pytest.raises(UserError, match="its line 1 is not an answer of this command"):
        asked()


def test_a_file_that_another_process_writes_is_refused(asked, tmp_path):
    asked()
    out = tmp_path / "out.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0])
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            asked()
    assert out.read_bytes() == lines[0]


@pytest.mark.parametrize("samples", ["1", "3"])
def test_interrupted_prompts_go_on_with_what_is_missing_and_end_in_the_same_bytes(
    samples, asked, tmp_path
):
    out = tmp_path / "out.jsonl"
    asked("--samples", samples)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5 * int(samples)
    for kept in range(len(lines)):
        for half in (b"", lines[kept][:1], lines[kept][: len(lines[kept]) // 2], lines[kept][:-1]):
            out.write_bytes(b"".join(lines[:kept]) + half)
            error = asked("--samples", samples)
            assert out.read_bytes() == whole
            assert (f"holds {kept} of {len(lines)} texts; the others follow" in error) == (kept > 0)
    out.write_bytes(b"".join(lines[1::2]))  # in any order
    asked("--samples", samples)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    before = out.read_bytes()
    assert "none is left to write" in asked("--samples", samples)
    assert out.read_bytes() == before


def test_a_file_that_is_no_output_of_these_prompts_is_refused_and_kept(asked, tmp_path):
    asked()
    out, lines = tmp_path / "out.jsonl", (tmp_path / "out.jsonl").read_bytes().splitlines(True)
    other = json.dumps(json.loads(lines[0]) | {"prompt": "another"}).encode() + b"\n"
    moved = json.dumps(json.loads(lines[0]) | {"line": 9}).encode() + b"\n"
    for content in (
        *(b"mine", b"mine\n", b"{}\n", b"[1]\n", b"3\n", b"\xff\n", b"[" * 10**5 + b"\n", b"\n"),
        *(lines[0] * 2, lines[0] + other, moved, lines[0] + b"mine", lines[0] + b"\n" + lines[1]),
    ):
        out.write_bytes(content)
        with pytest.raises(UserError, match="exists"):
            asked()
        assert out.read_bytes() == content
    out.write_bytes(lines[0])
    with pytest.raises(
        UserError, match="its line 1 is not an answer of this command to these prompts"
    ):
        asked("--samples", "2")


def test_no_empty_file_is_left_and_a_full_disk_leaves_whole_lines(asked, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    write_of = jobs.write_line

    def full(file, line):
        if not file.tell() or "four" not in line:
            return write_of(file, line)
        file.write(line[:5].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "generate_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked()
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_line", full)
        with pytest.raises(UserError, match=r"out.jsonl cannot be written: No space left"):
            asked()
    assert len(out.read_bytes().splitlines()) == 1 + out.read_bytes().count(b"\n")
    asked()
    assert sorted(m["line"] for m in results(out)) == [1, 2, 3, 4, 5]


def test_a_million_texts_are_the_most(random_run, tmp_path):
    (tmp_path / "p").write_text('{"prompt": "a"}\n' * 3)
    with pytest.raises(UserError, match="asks for more than 1,000,000 texts"):
        jobs.read_jobs(tmp_path / "p", None, 400_000)


def test_prompts_of_another_editor_are_read(random_run, tmp_path, output):
    (tmp_path / "p").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r{"prompt": "b"}\r\n')
    out = output(random_run, "--prompts", tmp_path / "p", "--max-new-tokens", 2).splitlines()
    assert [json.loads(line)["line"] for line in out] == [1, 3]
