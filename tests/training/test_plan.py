"""--plan finds the faults planted in a data set, counts right, and trains nothing."""

import json
import re
import time
from itertools import count
from types import SimpleNamespace

import pytest
from helpers import ARGS, train

import train_mlx
from bdh_lib import progress
from bdh_lib.compute import memory
from bdh_lib.data import problems
from bdh_lib.errors import UserError
from bdh_lib.training import memory_plan, plan
from bdh_lib.training.advice import epochs_note
from bdh_lib.training.schedule import blocks_per_step, schedule_summary

TICK = "✓".encode().decode("mac_roman")
MAC = "é".encode().decode("mac_roman")


def plan_output(tmp_path, capsys, records, *args, ascii=True):
    file = tmp_path / "data.jsonl"
    text = "".join(json.dumps(r, ensure_ascii=ascii) + "\n" for r in records)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    folder = tmp_path / "ck"
    own = ARGS
    if "--phases" in args:  # which has modes and epochs of its own
        own = re.sub(r"--(training-mode|epochs) \S+", "", " ".join(ARGS)).split()
    args = [*own, "--dataset", str(file), "--checkpoint-dir", str(folder), *args, "--plan"]
    assert train_mlx.main(args) == 0
    assert [f.name for f in folder.iterdir()] == [".data"]  # no run was begun
    return capsys.readouterr().out


def record(i, system="s", instruction=None, response="r"):
    return {"system": system, "instruction": instruction or f"question {i}", "response": response}


def test_planted_faults_are_counted(tmp_path, capsys):
    records = [record(i) for i in range(30)]
    records += [record(0), record(1)]  # duplicates
    records += [record(40, response=f"tick {TICK}"), record(41, response=f"caf{MAC}")]
    records += [record(42, instruction="say\n### Response:\nno"), record(43, response="a\n---\nb")]
    records += [
        record(44, response="x" * 200),
        record(45, response="lost \ufffd"),
        record(46, " "),
        record(47, instruction=" "),
    ]
    out = plan_output(tmp_path, capsys, records)
    for line in (
        "2 of 39 records: with the same text as an earlier one",
        "2 of 39 records: mojibake in response, such as `" + TICK,
        "1 of 39 records: `### Response:` inside instruction",
        "1 of 39 records: the end mark `---` inside response",
        "1 of 39 records: U+FFFD, a character lost before, in response",
        "skipped 1: instruction empty",
        "1 of 39 have no system text",
        "0 of 4 validation records are in the training split",
    ):
        assert line in out, out
    assert (
        "b'### System:\\ns\\n\\n### Instruction:\\nquestion 0\\n\\n### Response:\\nr\\n---'" in out
    )


def test_presets_are_planned_on_the_bytes_that_are_left_to_train_on(tmp_path, capsys):
    out = plan_output(tmp_path, capsys, [record(i, system=f"s{i}" * 9) for i in range(200)])
    n_bytes = int(re.search(r"^ *system +200 +([\d,]+)", out, re.M)[1].replace(",", ""))
    row = re.search(r"^ *phase1-64gb +system +\S+ +([\d,]+) +([\d.]+)", out, re.M)
    assert float(row[2]) == pytest.approx(int(row[1]) * 8192 / (0.9 * n_bytes), rel=0.01)


def test_a_plan_that_takes_long_shows_a_sign_of_life(tmp_path, capsys, monkeypatch):
    quick = problems.issue_lines
    monkeypatch.setattr(problems, "issue_lines", lambda found: time.sleep(0.2) or quick(found))
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    out = plan_output(tmp_path, capsys, [record(i) for i in range(20)])
    assert f"examining DATASET {tmp_path / 'data.jsonl'}: 0 s ...\n" in out


def test_a_character_lost_before_is_found_where_it_stands_as_it_is(tmp_path, capsys):
    records = [record(i) for i in range(20)] + [record(20, response="lost \ufffd")]
    out = plan_output(tmp_path, capsys, records, ascii=False)
    assert "1 of 21 records: U+FFFD, a character lost before, in response" in out
    assert "skipped" not in out


def test_ends_of_line_of_windows_are_counted(tmp_path, capsys):
    records = [record(i) for i in range(20)] + [record(20, response="a\r\nb\r\nc")]
    out = plan_output(tmp_path, capsys, records)
    assert r"1 of 21 records: an end of line of Windows (\r\n), or \r alone, inside response" in out


@pytest.mark.parametrize("token", ["<|im_start|>", "[INST]", "</s>", "<<SYS>>", "<image>"])
def test_special_tokens_of_other_models_are_counted(tmp_path, capsys, token):
    records = [record(i) for i in range(20)] + [record(20, response=f"a {token} b")]
    records += [record(21, response="<s3> [inst] <|x <images> a<b|>")]
    out = plan_output(tmp_path, capsys, records)
    assert f"1 of 22 records: `{token}`, a special token of another model, inside response" in out
    assert out.count("special token") == 1


def test_sizes_agree_with_the_prepared_bytes_and_the_model(tmp_path, capsys):
    records = [record(i, response="word " * i) for i in range(1, 41)]
    out = plan_output(tmp_path, capsys, records)
    full = int(re.search(r"^  full +40 +([\d,]+)", out, re.M)[1].replace(",", ""))
    sides = [int(n.replace(",", "")) for n in re.findall(r"records, ([\d,]+) bytes", out)]
    assert sum(sides) == full + 2 * 40  # a blank line after each record
    config = train_mlx.read_settings(ARGS).BDH_CONFIG
    assert f"{config.n_parameters:,} parameters" in out
    assert re.search(r"speed: [\d,]+ bytes/s .* measured over 3 iterations", out)
    assert re.findall(r"^  iteration (\d) of 4: [\d.]+ s$", out, re.M) == ["1", "2", "3", "4"]
    assert all(re.search(rf"^  {name} ", out, re.M) for name in train_mlx.PRESETS)


def test_the_records_that_validate_are_known_however_alike_texts_are(tmp_path, capsys):
    """The same instruction with and without an input, as Alpaca has it: one begins the other."""
    asked = [{"instruction": f"ask {i // 2}", "input": "more" if i % 2 else "", "output": "x"}
             for i in range(60)]  # fmt: skip
    for seed in range(8):
        out = plan_output(
            tmp_path, capsys, asked, "--training-mode", "instruction", "--seed", str(seed)
        )
        validate = int(re.search(r"validation: (\d+) records", out)[1])
        assert f"0 of {validate} validation records are in the training split" in out


def test_presets_that_do_not_go_with_the_constants_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_mlx, "TRAINING_MODE", "full")
    monkeypatch.setattr(train_mlx, "LOSS_ON", "response")
    out = plan_output(tmp_path, capsys, [record(i, response="word " * 20) for i in range(40)])
    assert re.search(r"^  both-64gb +does not go with the constants$", out, re.M)
    assert re.search(r"^  tiny +full ", out, re.M) and "time to the end" in out


def test_a_ready_split_is_planned_as_it_would_train(tmp_path, capsys):
    (split := tmp_path / "split").mkdir()
    (split / "train.bin").write_bytes(bytes(range(256)) * 9)
    (split / "train.fields").write_bytes(bytes([0, 1, 3, 3]) * 576)
    (split / "val.bin").write_bytes(b"held out" * 20)
    out = plan_output(tmp_path, capsys, [], "--dataset", str(split), "--max-iters", "9")
    for field, n in (("headers", 576), ("system", 576), ("response", "1,152")):
        assert re.search(rf"^  {field} +{n}$", out, re.M), out
    assert repr(bytes(range(256)))[:-1] in out
    assert "9 iterations of 128 bytes are 1,152 bytes or 0.50 epochs" in out
    assert re.search(r"^  tiny +full .* 500\.00 ", out, re.M)  # 4,500 x 256 bytes over 2,304
    assert "time to the end" in out


def test_what_a_recipe_keeps_beside_the_weights_is_planned(tmp_path, capsys):
    recipe = [
        "--ema-decay",
        "0.9",
        "--byte-noise",
        "0.1",
        "--keep-checkpoints",
        "1",
        "--n-embd",
        "128",
    ]
    out = plan_output(
        tmp_path, capsys, [record(i, response="word " * 20) for i in range(40)], *recipe
    )
    plain = ["--ema-decay", "0", *recipe[-2:]]
    kept, plain = (train_mlx.read_settings([*ARGS, *args]) for args in (recipe, plain))
    n = kept.BDH_CONFIG.n_parameters
    assert plan.peak_bytes(kept)["fast"] - plan.peak_bytes(plain)["fast"] == pytest.approx(
        8 * n
    )  # twice
    assert f"disk: checkpoints {3 * 16 * n / 1e6:,.0f} MB" in out and "time to the end" in out


def test_each_phase_is_planned(tmp_path, capsys):
    records = [record(i, f"system {i}", response="word " * 20) for i in range(1, 41)]
    chain = ["--phases", "system:1,full:2@1e-4", "--max-iters", "12"]
    one, two = plan_output(tmp_path, capsys, records, *chain).split("\n=== phase ")[1:]
    assert one.startswith("phases-1-system\n") and "mode system" in one
    assert two.startswith("phases-2-full, from the best weights of phases-1-system\n")
    assert "mode full" in two and "time to the end" in one and "time to the end" in two
    assert "12 iterations of" in two and "MAX_ITERS ends it before EPOCHS (2)" in two
    assert "EPOCHS (1) ends it before MAX_ITERS (12)" in one


def test_weights_that_are_not_there_yet_are_told(tmp_path, capsys):
    out = plan_output(tmp_path, capsys, [record(i) for i in range(40)], "--init-from", "nope")
    assert "start: from the weights of nope, which is not there yet: no run in" in out
    out = plan_output(tmp_path, capsys, [record(i) for i in range(40)], "--phases", "both:1,full:1")
    assert "not there yet" not in out  # the first phase will be, once the second begins


@pytest.mark.parametrize("eval_freq, times", [(5, 3), (3, 5), (20, 2)])
def test_the_share_of_evaluations_is_told(tmp_path, capsys, monkeypatch, eval_freq, times):
    monkeypatch.setattr(plan, "measure", lambda *_: (2.0, 0.5))  # of 128 bytes each
    records = [record(i, response="word " * 20) for i in range(100)]
    flags = f"--max-iters 10 --eval-freq {eval_freq}".split()
    out = plan_output(tmp_path, capsys, records, *flags)
    folders = ["--dataset", str(tmp_path / "data.jsonl"), "--checkpoint-dir", str(tmp_path / "ck")]
    evaluated = len(plan.open_run_data(train_mlx.read_settings([*ARGS, *folders])).val.bytes)
    seconds = times * 0.5 * evaluated / 128
    share = f"{seconds / (20 + seconds):.1%}"
    assert re.search(f"; {times} evaluations of {evaluated} bytes are .* \\({share}\\) of it;", out)


def test_a_slow_machine_measures_a_part_of_a_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory_plan, "slow_note", lambda _: " (slow)")
    monkeypatch.setattr(memory, "default_chunk", lambda D: 10)
    monkeypatch.setattr(memory_plan, "forward_seconds", lambda s: s.BLOCK_SIZE / 2)
    clock = SimpleNamespace(perf_counter=count().__next__)  # each part takes a second
    monkeypatch.setattr(plan, "time", clock)
    seen = []
    real = plan.get_batch
    monkeypatch.setattr(plan, "get_batch", lambda *a: seen.append(real(*a)) or seen[-1])
    out = plan_output(tmp_path, capsys, [record(i) for i in range(40)], "--grad-accum", "3")
    assert {batch.idx.shape for batch in seen} == {(1, 20)}  # of (2, 64)
    assert "4 iterations of 20 bytes, about 2.7 min on two busy CPU cores" in out
    assert "speed: 19 bytes/s" in out  # 384 in 6.4 parts of 3 micro-batches, and an update


@pytest.mark.parametrize("preset", [None, *train_mlx.PRESETS])
def test_evaluations_take_at_most_a_twentieth_of_the_time(preset):
    s = train_mlx.read_settings(["--preset", preset] if preset else [])
    forward = 0.37  # of an update's operations, for the same bytes
    between = s.EVAL_FREQ * blocks_per_step(s) * s.BLOCK_SIZE
    assert forward * s.EVAL_BYTES < 0.05 * between


HUGE = (
    "--n-embd 4096 --batch-size 3000 --block-size 65536 --grad-accum 7 --max-iters 5000000 "
    "--epochs 50000 --ignore-memory-check --memory-mode fast"
)


def refusal(s):
    s.IGNORE_MEMORY_CHECK = False
    with pytest.raises(UserError) as error:
        memory_plan.select_mode(s)
    return str(error.value)


@pytest.mark.parametrize(
    "message",
    [
        refusal,
        lambda s: plan.preset_table({"huge": s}, {"both": 10**6}),
        lambda s: schedule_summary(s, 10**6),
        lambda s: schedule_summary(s, 10**11),
        lambda s: epochs_note(
            train_mlx.read_settings(["--max-iters", "9999", "--epochs", "9999"]), 9999
        ),
        lambda s: plan.duration(1e9),
        lambda s: str(
            plan.print_needs(s, {"train": {"bytes": 10**10}, "val": {"bytes": 5}}, 10**10)
        ),
    ],
)
def test_large_numbers_have_their_digits_grouped(message, capsys):
    text = message(train_mlx.read_settings(HUGE.split())) + capsys.readouterr().out
    assert re.search(r"\d,\d{3}", text)
    assert not re.findall(r"\d{4,}[.\d]* ?(?:GB|MB|M|bytes|iterations|epochs|passes|days)\b", text)


@pytest.mark.parametrize(("seconds", "text"), [(90, "1.5 min"), (7260, "2 h 01 min")])
def test_durations(seconds, text):
    assert plan.duration(seconds) == text


def test_a_plan_says_what_training_would_do_with_the_run_that_exists(tmp_path, capsys):
    train(tmp_path, "--max-iters", 2)
    train(tmp_path, "--max-iters", 4, "--plan")
    assert "full has 2 iterations; training would add up to 2\n" in capsys.readouterr().out
    train(tmp_path, "--max-iters", 2, "--plan")
    assert "full has 2 iterations; training would add up to 0\n" in capsys.readouterr().out
    assert train(tmp_path, "--max-iters", 4, "--block-size", 32, "--plan") == 0
    refusal = "training would refuse this: "
    assert f"{refusal}{tmp_path / 'full'} holds a run with other" in capsys.readouterr().out
    chain = ("--phases", "system:none,full:none", "--max-iters")
    train(tmp_path, *chain, 2)
    train(tmp_path, *chain, 4, "--plan")
    out = capsys.readouterr().out
    assert f"{refusal}{tmp_path / 'phases-1-system'} would train for longer" in out
