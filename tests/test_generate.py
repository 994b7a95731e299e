"""The command line of generate.py: prompts, flags, damaged models, evaluation, states."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from threading import Timer
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT, random_model, saved, train, write_best

import bdh_mlx
import generate
import train_mlx
from bdh_lib import files, progress, runs
from bdh_lib.compute import memory
from bdh_lib.data import formats, sources
from bdh_lib.errors import escape_controls
from bdh_lib.generation import arguments, state_files
from bdh_lib.generation.decoding import (
    StopMatcher,
    parse_escapes,
)
from bdh_mlx import BDH, BDHConfig, UserError


@pytest.mark.parametrize("on_metal", [False, True])
def test_the_cache_of_freed_buffers_is_limited_on_metal(
    on_metal, counting_run, output, monkeypatch
):
    limits = []
    monkeypatch.setattr(memory, "on_metal", lambda: on_metal)
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    assert output(counting_run, "--prompt", "a", "--max-new-tokens", 2) == b"abc\n"
    assert limits == [2 * 10**9] * on_metal


def test_an_empty_prompt_begins_a_record(counting_run, output):
    # after a blank line comes \x0b
    assert output(counting_run, "--prompt", "", "--max-new-tokens", 2, "--raw") == b"\x0b\x0c"


def test_an_empty_prompt_file_is_refused_and_an_empty_stdin_noted(
    counting_run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match='empty is empty; --prompt "" begins a record'):
        generate.main([str(counting_run), "--prompt-file", str(tmp_path / "empty")])
    with (tmp_path / "empty").open("rb") as empty:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=empty, isatty=lambda: False))
        generate.main([str(counting_run), "--max-new-tokens", "2", "--raw"])
    assert "stdin is empty, so there is no prompt" in capsys.readouterr().err


def test_a_prompt_that_is_no_utf8_is_read_as_it_is_and_shown_escaped(
    counting_run, output, tmp_path
):
    (tmp_path / "p").write_bytes(b"a\xff\x1b")
    ask = (counting_run, "--prompt-file", tmp_path / "p", "--max-new-tokens", 1)
    assert output(*ask) == b"a\\xff\\x1b\\x1c\n"
    assert output(*ask, "--raw") == b"a\xff\x1b\x1c"
    assert parse_escapes("a\udcff\\n") == b"a\xff\n"
    assert escape_controls("a\udcff\ud800\x1b") == r"a\xff\xd800\x1b"


def test_a_megabyte_of_prompt(tmp_path, output):
    mx.random.seed(0)
    run = saved(BDH(BDHConfig(1, 64, 0, 1, 1)), tmp_path)
    text = np.random.default_rng(1).integers(97, 123, 1_000_000, np.uint8).tobytes()
    (tmp_path / "p").write_bytes(text)
    flags = ("--max-new-tokens", 5, "--raw", "--seed", 1)
    assert output(run, "--prompt-file", tmp_path / "p", *flags)[:-5] == text


def test_a_pipe_is_read_to_its_end(counting_run):
    command = [sys.executable, ROOT / "generate.py", counting_run, "--max-new-tokens", "3"]
    ran = subprocess.run(command, input=b"line\nx", capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"line\nxyz{\n", b"")


def test_the_same_seed_writes_the_same_bytes(random_run, output):
    one, again, other = (
        output(random_run, "--prompt", "a", "--seed", s, "--raw") for s in (1, 1, 2)
    )
    assert one == again != other
    assert len(one) == 501


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--top-k", "0"], "--top-k is 0; it must be a whole number from 1"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "x"], "--out is for the texts of --prompts"),
        (["--batch-size", "8"], "--batch-size: no effect on one text"),  # the default
        *(
            ([flag, "9" * 25], f"{flag} is 9999")
            for flag in ("--samples", "--max-new-tokens", "--batch-size", "--window", "--seed")
        ),
        *(([flag, "nan"], f"{flag} is nan") for flag in ("--temperature", "--top-p", "--min-p")),
        (["--top-k", "9" * 25], "--top-k is 9999"),
        (["--window", "3"], "--window is 3; it must be .* from 4 to 1,099,511,627,776 or none"),
        (["--repetition-penalty", "inf"], "--repetition-penalty is inf"),
        (["--raw", "--samples", "2"], "--raw writes one text"),
        (["--batch-size", "2"], "--batch-size: no effect on one text"),
        (["--top-k", "x"], "--top-k is 'x'; it must be a whole number from 1 to 65,536$"),
        (["--top-p", "1e"], "--top-p is '1e'; it must be a number .*1$"),
        (["--prompt", "b"], "--prompt is given twice, as 'a' and as 'b'; .* by --prompts FILE$"),
        (
            ["--seed", "1", "--seed=2"],
            "--seed is given twice, as '1' and as '2'; give one of them$",
        ),
    ],
)
def test_impossible_flags_are_one_line(flags, complaint, counting_run):
    with pytest.raises(UserError, match=complaint) as error:
        generate.main([str(counting_run), "--prompt", "a", *flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--promt", "x"], "--promt; did you mean --prompt?"),
        (["--trace", "x"], "--trace: not allowed with argument --prompt"),
        (["--stop", "a", "--no-stop"], "--no-stop: not allowed with argument --stop"),
    ],
)
def test_mistyped_flags_are_one_line(flags, complaint, counting_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.main([str(counting_run), "--prompt", "a", *flags])
    output = capsys.readouterr().err
    assert complaint in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--evaluate x --top-k 3 --dtype float32 --temperature 0.8", "--temperature, --top-k"),
        *(("--trace x --trace y --mode full", "--mode"), ("--export x --raw", "--raw")),
        ("--evaluate x --save-state s", "--save-state"),
    ],
)
def test_a_flag_without_an_effect_is_told(flags, idle, counting_run):
    with pytest.raises(UserError, match=f"^{idle}: no effect beside {flags.split()[0]}"):
        generate.main([str(counting_run), *flags.split()])


def test_files_that_cannot_be_read_or_would_be_lost_are_named(counting_run, tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff")
    (tmp_path / "in").write_text('{"prompt": "a"}')
    (tmp_path / "loop").symlink_to("loop")
    for asked, out, complaint in (
        ("none", "out", "none: No such file or directory"),
        (".", "out", "Is a directory"),
        ("bad", "out", "bad is not UTF-8"),
        ("in", "in", "in exists; name another file"),
        ("loop", "out", "loop: Too many levels of symbolic links"),
        ("in", "loop", "loop cannot be written: Too many levels"),
        ("in", ".", "cannot be written: Is a directory"),
    ):
        names = ("--prompts", str(tmp_path / asked), "--out", str(tmp_path / out))
        with pytest.raises(UserError, match=complaint):
            generate.main([str(counting_run), *names])
    assert (tmp_path / "in").read_text() == '{"prompt": "a"}'


PATH_FLAGS = ["--prompt-file", "--prompts", "--export", "--load-state", "--save-state", "--out"]


@pytest.mark.parametrize("flag", [*PATH_FLAGS, "--evaluate", "--trace", "--stop"])
def test_an_empty_string_is_no_value(flag, counting_run):
    with pytest.raises(UserError, match=f"^{flag} is empty"):
        generate.parse_args([str(counting_run), flag, ""])
    with pytest.raises(UserError, match=r"^model is empty"):
        generate.parse_args(["", "--prompt", "a"])


@pytest.mark.parametrize("flag", PATH_FLAGS)
def test_each_flag_that_takes_a_path_reads_it_alike(flag, counting_run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of mine")
    beside = {"--out": ["--prompts", "p"]}.get(flag, [])
    args = generate.parse_args([str(counting_run), *beside, flag, "~/x.safetensors"])
    path = vars(args)[flag[2:].replace("-", "_")]
    assert str(path) == "/home/of mine/x.safetensors"
    for wrong, complaint in (("w/\udcff", r"w/\\xff: not UTF-8"), ("a\0b", "NUL")):
        with pytest.raises(UserError, match=f"^{flag} is .*{complaint}"):
            generate.parse_args([str(counting_run), flag, wrong])
    with pytest.raises(UserError, match=r"^model is .*not UTF-8"):
        generate.parse_args(["\udcff"])


@pytest.mark.parametrize("script", [generate, train_mlx])
def test_the_version_is_a_line(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--version"])
    assert re.fullmatch(r"BDH-MLX, mlx [\d.]+, python [\d.]+\n", capsys.readouterr().out)


def test_what_is_no_file_is_not_evaluated(random_run, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(UserError, match="is not a regular file; write what it gives to a file"):
            generate.main([str(random_run), "--evaluate", str(name)])


@pytest.mark.parametrize(
    "args", ["--prompt-file /dev/zero", "--prompts /dev/zero", "--trace @/dev/zero"]
)
def test_a_device_that_never_ends_is_refused(counting_run, args):
    with pytest.raises(UserError, match="/dev/zero is a device; name a file or a pipe"):
        generate.main([str(counting_run), *args.split()])


@pytest.mark.parametrize("args", ["", "--prompt-file PIPE", "--prompts PIPE", "--trace @PIPE"])
def test_a_pipe_that_does_not_end_is_refused(counting_run, args, monkeypatch):
    read, write = os.pipe()
    os.write(write, b"1234567")  # and it stays open
    with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb"):
        monkeypatch.setattr(files, "MAX_STREAM", 5)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, isatty=lambda: False))
        with pytest.raises(UserError, match=r"gives more than 5 bytes .*; write them to a file"):
            generate.main([str(counting_run), *args.replace("PIPE", f"/dev/fd/{read}").split()])


@pytest.mark.parametrize(
    "shell", ["cat p | $run --prompt-file /dev/stdin", "$run --prompt-file <(cat p)"]
)
def test_a_pipe_is_a_prompt_file(counting_run, tmp_path, shell):
    (tmp_path / "p").write_bytes(b"x")
    run = f"{sys.executable} {ROOT / 'generate.py'} {counting_run} --max-new-tokens 3"
    ran = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=os.environ | {"run": run}, capture_output=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"xyz{\n", b"")


def damaged_run(run, folder, config):
    copied = folder / "copied"
    shutil.copytree(run, copied)
    (copied / "step-000001" / "config.json").write_bytes(config)
    return copied


@pytest.mark.parametrize(
    "config",
    [b"", b"\xff", b"[]", b"null", b"[" * 10**5, b'{"settings": 5}', b'{"settings": null}'],
)
def test_a_damaged_config_is_a_warning(config, random_run, tmp_path, capsys):
    run = damaged_run(random_run, tmp_path, config)
    assert generate.main([str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "config.json is damaged" in output
    assert bdh_mlx.load_model(run).trained_length is None and capsys.readouterr().err == output


def test_a_config_that_was_not_written_with_its_checkpoint_is_a_warning(tmp_path, capsys):
    assert train(tmp_path, "--max-iters", "1") == 0
    capsys.readouterr()
    ask = [str(tmp_path / "full"), "--prompt", "a", "--max-new-tokens", "1"]
    assert generate.main(ask) == 0 and capsys.readouterr().err == ""
    (tmp_path / "full" / "step-000001" / "config.json").write_text("{}")
    assert generate.main(ask) == 0
    assert re.fullmatch("warning: .*config.json has changed .*unknown\n", capsys.readouterr().err)


@pytest.mark.parametrize("wrong", ["2", None, True, 1.5, -1, [2], {"a": 1}, 10**30])
def test_settings_of_a_wrong_type_are_unknown_to_evaluation(wrong, random_run, tmp_path, output):
    names = ("BLOCK_SIZE", "BATCH_SIZE", "TRAINING_MODE")
    config = json.dumps({"settings": dict.fromkeys(names, wrong)})
    run = damaged_run(random_run, tmp_path, config.encode())
    (tmp_path / "a.txt").write_text("one paragraph\n\nanother\n")
    table = output(run, "--evaluate", tmp_path / "a.txt", "--mode", "full").decode()
    assert "in blocks of 4,096" in table
    assert output(run, "--prompt", "a", "--max-new-tokens", 1)


def of_steps(model, folder, *steps):
    run = folder / "steps"
    for step in steps:
        at = run / f"step-{step:06d}"
        at.mkdir(parents=True)
        bdh_mlx.save_model(model, at / "model.safetensors")
        content = (at / "model.safetensors").read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"model.safetensors": entry}
        (at / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: "null", "is not what was written"),
        (lambda text: "{", "is not what was written"),
        (lambda text: '{"checkpoint": "step-000001"}', "is not what was written"),
        (lambda text: text.replace("000009", "000001"), "is not what was written"),
        (lambda text: text, "names no checkpoint of the run"),
    ],
)
def test_a_best_json_that_is_not_the_trainers_is_told(edit, reason, tmp_path, capsys):
    run = of_steps(random_model(), tmp_path, 1, 2)
    write_best(run, checkpoint="step-000009", step=9, monitored_loss=1.0)
    (run / "best.json").write_text(edit((run / "best.json").read_text()))
    assert runs.find_weights(run).parent.name == "step-000002"
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and f"best.json {reason}" in err and "the last" in err


def test_a_prompt_that_does_not_come_shows_a_sign_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.02)
    monkeypatch.setattr(progress, "POLL", 0.01)
    os.mkfifo(tmp_path / "pipe")
    args = generate.parse_args(["run", "--prompt-file", str(tmp_path / "pipe")])
    Timer(0.2, (tmp_path / "pipe").write_bytes, (b"late",)).start()
    assert generate.load_prompt(args) == b"late"
    out, err = capsys.readouterr()
    assert not out and f"reading {tmp_path}" in err


def test_a_checkpoint_that_cannot_be_taken_is_told(tmp_path, capsys):
    run = of_steps(random_model(), tmp_path, 1, 2, 3)
    write_best(run, checkpoint="step-000002", step=2, monitored_loss=1.0)
    assert runs.find_weights(run).parent.name == "step-000002"
    assert capsys.readouterr().err == ""
    (run / "step-000002" / "model.safetensors").unlink()
    assert runs.find_weights(run).parent.name == "step-000003"
    output = capsys.readouterr().err
    assert "step-000002 lacks its model.safetensors; taking step-000003" in output
    with pytest.raises(UserError, match=r"step-000002 lacks its model.safetensors"):
        runs.find_weights(run / "step-000002")
    for step in (1, 3):
        (run / f"step-{step:06d}" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="has no valid checkpoint: step-000002 lacks"):
        runs.find_weights(run)
    assert capsys.readouterr().err == ""
    for name in ("manifest.json", "../best.json"):
        with pytest.raises(UserError, match=r"it is not a .safetensors file"):
            bdh_mlx.load_model(run / "step-000001" / name)


@pytest.mark.parametrize("best", [b"[" * 10**5, b"[]", b'{"checkpoint": ["x"]}', b"\xff", b""])
def test_a_damaged_best_means_the_last(best, tmp_path):
    run = of_steps(random_model(), tmp_path, 1, 2)
    (run / "best.json").write_bytes(best)
    assert runs.find_weights(run).parent.name == "step-000002"
    (run / "best.json").unlink()
    (run / "best.json").mkdir()
    assert runs.find_weights(run).parent.name == "step-000002"


def test_other_vocabularies_are_refused(tmp_path):
    mx.random.seed(0)
    run = saved(BDH(BDHConfig(1, 16, 0, 2, 8, vocab_size=300)), tmp_path)
    with pytest.raises(UserError, match="vocabulary of 300"):
        generate.main([str(run), "--prompt", "a"])


def test_evaluate_takes_the_columns_of_the_training_where_the_data_have_them(tmp_path, capfdbinary):
    records = [{"ask": f"What is {i}?", "say": f"It is {i}."} for i in range(40)]
    renamed = [{"instruction": r["ask"], "response": r["say"]} for r in records]
    for name, rows in (("own", records), ("renamed", renamed)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    args = "--preset tiny --n-layer 1 --n-embd 16 --max-iters 1 --sample-bytes 0"
    columns = ["--columns", "instruction=ask,response=say"]
    where = ["--dataset", str(tmp_path / "own.jsonl"), "--checkpoint-dir", str(tmp_path)]
    assert train_mlx.main([*args.split(), *columns, *where]) == 0
    printed = []
    for name in ("own", "renamed"):
        capfdbinary.readouterr()
        run = str(tmp_path / "full")
        assert generate.main([run, "--evaluate", str(tmp_path / f"{name}.jsonl")]) == 0
        printed.append(capfdbinary.readouterr())
    assert all(b"40 records" in outputs.out for outputs in printed)
    line = b"columns as in the training: instruction=ask,response=say"
    assert [line in outputs.err for outputs in printed] == [True, False]
    tables = [outputs.out.splitlines() for outputs in printed]
    assert tables[0][-1] == tables[1][-1]  # the same text


def test_evaluate_gives_the_trainers_validation_and_its_parts(tmp_path, output):
    some = tmp_path / "some.jsonl"
    some.write_text("".join(sources.SAMPLE.read_text().splitlines(keepends=True)[:20]))
    args = f"--preset tiny --dataset {some} --n-layer 1 --n-embd 16 --max-iters 2 --sample-bytes 1"
    assert train_mlx.main([*args.split(), "--checkpoint-dir", str(tmp_path)]) == 0
    val = next((tmp_path / ".data").glob("*/val.bin")).read_bytes()
    held_out = tmp_path / "val.jsonl"
    with held_out.open("w") as file:
        for record in sources.read_records(str(some)):
            if formats.format_example(record, "full").encode() in val:
                file.write(json.dumps(record) + "\n")
    metrics = (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()
    trainers = [m["val_loss"] for m in map(json.loads, metrics) if "val_loss" in m][-1]
    table = output(tmp_path / "full", "--evaluate", held_out).decode()
    own = "of these the run trained on all but its validation"
    (tmp_path / "copy.jsonl").write_bytes(some.read_bytes())
    for data in (some, tmp_path / "copy.jsonl"):
        assert own in output(tmp_path / "full", "--evaluate", data).decode()
    assert own not in table
    some.write_bytes(held_out.read_bytes() * 2)  # other records under the same name
    assert own not in output(tmp_path / "full", "--evaluate", some).decode()
    rows = {row.split()[0]: row.split()[1:] for row in table.splitlines()[2:]}
    assert rows.keys() == {"headers", "system", "instruction", "response", "whole"}
    assert int(rows["whole"][0].replace(",", "")) == len(val) - 1
    assert abs(float(rows["whole"][2]) - trainers) < 1e-4
    assert abs(float(rows["whole"][3]) - trainers / np.log(2)) < 1e-4
    whole, *parts = ([float(n.replace(",", "")) for n in (rows[f][0], rows[f][2])]
                     for f in ("whole", *(rows.keys() - {"whole"})))  # fmt: skip
    assert sum(n for n, _ in parts) == whole[0]
    assert abs(sum(n * nats for n, nats in parts) / whole[0] - whole[1]) < 2e-4


def test_another_ready_split_is_not_said_to_be_the_runs(tmp_path, output):
    for name, text in (("a", b"first one. " * 60), ("b", b"another thing; " * 50)):
        (tmp_path / name).mkdir()
        for side in ("train", "val"):
            (tmp_path / name / f"{side}.bin").write_bytes(text)
    args = "--preset tiny --n-layer 1 --n-embd 16 --max-iters 1 --sample-bytes 1 --dataset"
    box = ["--checkpoint-dir", str(tmp_path / "runs")]
    assert train_mlx.main([*args.split(), str(tmp_path / "a"), *box]) == 0
    for name in "ab":  # of its own one the validation alone is read
        table = output(tmp_path / "runs" / "full", "--evaluate", tmp_path / name).decode()
        assert "bits/byte" in table and "the run trained on" not in table


def test_a_text_file_has_one_field_and_other_modes_need_their_fields(random_run, tmp_path, output):
    (tmp_path / "a.txt").write_text("one paragraph\n\nanother\n")
    table = output(random_run, "--evaluate", tmp_path / "a.txt").decode().splitlines()
    assert [row.split()[0] for row in table[2:]] == ["headers", "text", "whole"]
    (tmp_path / "a.jsonl").write_text('{"instruction": "x"}\n')
    with pytest.raises(UserError, match="no record for TRAINING_MODE 'full'"):
        generate.main([str(random_run), "--evaluate", str(tmp_path / "a.jsonl")])
    bare = random_run / "step-000001" / "model.safetensors"
    (tmp_path / "bare.safetensors").write_bytes(bare.read_bytes())
    with pytest.raises(UserError, match="--mode"):
        generate.main([str(tmp_path / "bare.safetensors"), "--evaluate", str(tmp_path / "a.txt")])


def test_a_saved_state_goes_on_as_the_whole_prompt_would(random_run, tmp_path, output):
    greedy = ("--temperature", "0", "--no-stop", "--max-new-tokens", "20", "--raw")
    file = tmp_path / "s.safetensors"
    kept = output(random_run, "--prompt", "abc def", *greedy, "--save-state", file)
    on = output(random_run, "--prompt", " and on", *greedy, "--load-state", file)
    (tmp_path / "all").write_bytes(kept + b" and on")
    assert output(random_run, "--prompt-file", tmp_path / "all", *greedy) == kept + on
    assert len(on) == len(b" and on") + 20
    with pytest.raises(UserError, match=r"--window is 64.* read with none"):
        generate.main([str(random_run), "--prompt", "a", "--load-state", str(file), "--window=64"])


def test_a_text_longer_than_the_trained_blocks_has_a_window_of_their_length(random_run, capsys):
    trained = bdh_mlx.load_model(random_run).trained_length

    def texts(n_bytes, *flags):
        prompt = ("--prompt", "a" * n_bytes, "--max-new-tokens", "20", "--temperature", "0")
        generate.main([str(random_run), *prompt, "--no-stop", *flags])
        return capsys.readouterr()

    long = texts(5 * trained)
    assert long == texts(5 * trained, "--window", str(trained)) and long.err == ""
    whole = texts(5 * trained, "--window", "none")
    assert whole.out != long.out and "was trained on blocks of" in whole.err
    assert texts(trained - 20) == texts(trained - 20, "--window", "none")


def test_a_window_is_for_texts_that_the_blocks_do_not_hold(random_run):
    model = bdh_mlx.load_model(random_run)
    for flags, length, window in (
        ([], 64, None),
        ([], 65, 64),
        ([], math.inf, 64),
        (["--window", "none"], 65, None),
        (["--window", "8"], 64, 8),
    ):
        args = arguments.parse_args([str(random_run), "--prompt", "a", *flags])
        decoding = generate.make_decoding(model, None, args)
        assert generate.fit_window(decoding, args, length).start.window == window


@pytest.mark.parametrize("file", ["absent/s.safetensors", "s.bin", "weights.safetensors"])
def test_a_state_that_cannot_be_saved_is_told_before_a_byte_is_written(
    random_run, tmp_path, file, capsys
):
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"encoder": mx.ones(3)})
    with pytest.raises(UserError, match="not saved"):
        generate.main([str(random_run), "--prompt", "abc", "--save-state", str(tmp_path / file)])
    assert capsys.readouterr().out == ""
    assert mx.load(str(tmp_path / "weights.safetensors"))["encoder"].tolist() == [1, 1, 1]


def test_an_interrupted_text_saves_its_state_too(random_run, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(StopMatcher, "end", interrupt)
    file = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        generate.main(
            [*f"{random_run} --prompt abc --max-new-tokens 5 --save-state {file}".split()]
        )
    assert state_files.load_state(file, bdh_mlx.load_model(random_run)).position == 8


def test_a_text_that_is_interrupted_before_its_first_byte_saves_what_was_read(
    random_run, tmp_path, monkeypatch
):
    def stopped(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(generate, "stream", stopped)
    file = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(random_run), "--prompt", "abcdef", "--save-state", str(file)])
    assert state_files.load_state(file, bdh_mlx.load_model(random_run)).position == 6
