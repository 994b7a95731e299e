"""A run that was stopped, killed or damaged goes on in the same bits, or says why it does not."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers import ARGS, IMPORT_TRAINER, ROOT, arrays, equal_arrays, metrics, train, write_best

import train_mlx
from bdh_lib import files, runs
from bdh_lib.compute import memory
from bdh_lib.training import batches, checkpoints, resume, schedule
from bdh_lib.training.batches import get_batch
from bdh_lib.training.train_state import init_train_state
from bdh_mlx import UserError


@pytest.mark.parametrize("stops", [[5], [4, 5, 8], [1, 11]])
def test_a_stopped_run_ends_in_the_same_bits(tmp_path, uninterrupted_run, stops):
    for stop in (*stops, 12):
        assert train(tmp_path, "--max-iters", stop) == 0
    assert equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))


def test_accumulating_runs_resume_exactly_too(tmp_path):
    for folder, stops in (("a", [6]), ("b", [3, 6])):
        for stop in stops:
            train(tmp_path / folder, "--grad-accum", 3, "--max-iters", stop)
    assert equal_arrays(arrays(tmp_path / "a", 6), arrays(tmp_path / "b", 6))


def test_a_signal_during_an_update_saves_it_as_done(tmp_path, uninterrupted_run, monkeypatch):
    real = train_mlx.compile_steps

    def compile_steps(*args):
        micro_step, apply_update = real(*args)

        def signalled(*gradients):
            if steps.pop():
                os.kill(os.getpid(), signal.SIGTERM)  # the handler runs once the update is whole
            return apply_update(*gradients)

        return micro_step, signalled

    monkeypatch.setattr(train_mlx, "compile_steps", compile_steps)
    steps = [True, False, False]  # the last one first
    assert train(tmp_path, "--max-iters", 12) == 128 + signal.SIGTERM
    assert runs.steps(tmp_path / "full")[-1] == 3
    steps = [False] * 9
    assert train(tmp_path, "--max-iters", 12) == 0
    assert equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))


@pytest.mark.parametrize("lost", ["optimizer", "data position", "dropout"])
def test_a_resume_that_loses_something_ends_elsewhere(
    tmp_path, uninterrupted_run, monkeypatch, lost
):
    """Negative controls: the comparison above can fail."""
    train(tmp_path, "--max-iters", 5)
    if lost == "optimizer":
        load = checkpoints.load

        def without_optimizer(run, step, state):
            before = state.optimizer.state
            load(run, step, state)
            state.optimizer.state = before

        monkeypatch.setattr(checkpoints, "load", without_optimizer)
    if lost == "data position":
        monkeypatch.setattr(
            batches, "get_batch", lambda split, i, *rest: get_batch(split, i - 5, *rest)
        )
    if lost == "dropout":
        key = mx.random.key
        monkeypatch.setattr(mx.random, "key", lambda seed: key(seed + 1))
    train(tmp_path, "--max-iters", 12)
    assert not equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))


HELD = """
from bdh_lib.training import batches
get_batch, calls = batches.get_batch, []

def held(*args):
    calls.append(args)
    if len(calls) == {after} + 1:
        print("held", flush=True)
        sys.stdin.read()
    return get_batch(*args)

batches.get_batch = held
sys.exit(train_mlx.main())
"""


def start_held(folder, after):
    """The trainer of 12 iterations, which waits after so many of them until its stdin is closed."""
    code = IMPORT_TRAINER + HELD.format(after=after)
    command = [sys.executable, "-c", code, *ARGS, "--checkpoint-dir", folder, "--max-iters", 12]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(list(map(str, command)), text=True, **pipes)
    for line in process.stdout:
        if line == "held\n":
            return process
    pytest.fail(process.stderr.read())


def test_a_run_interrupted_before_it_has_work_says_so(tmp_path):
    process = start_held(tmp_path, 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped before there was new work to save" in err


DEAF = """
import itertools, sys
sys.path.insert(0, {root!r})
import {owner} as owner

def deaf(*args):
    print("held", flush=True)
    sum(itertools.repeat(0, 10**11))  # in C, and with the interpreter's lock: nothing else runs

owner.{name} = deaf
import {script} as script
sys.exit(script.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "name", "script", "args"),
    [
        ("bdh_mlx", "layer", "train_mlx", ARGS),  # traced for the gradient, or an evaluation
        ("bdh_mlx", "layer", "train_mlx", [*ARGS, "--plan"]),
        ("bdh_mlx", "layer", "generate", ["{run}", "--evaluate", "sample"]),
    ],
    ids=["train", "plan", "evaluate"],
)
def test_a_signal_ends_what_the_interpreter_cannot_hear(
    tmp_path, uninterrupted_run, number, owner, name, script, args
):
    code = DEAF.format(root=str(ROOT), owner=owner, name=name, script=script)
    args = [a.format(run=uninterrupted_run / "full") for a in args]
    args += [] if script == "generate" else ["--checkpoint-dir", str(tmp_path)]
    command = [sys.executable, "-c", code, *args]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, **pipes)
    assert any(line == "held\n" for line in process.stdout)
    process.send_signal(number)
    process.communicate(timeout=20)  # which the call would take for minutes
    assert process.returncode == -number


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_run_ends_in_the_same_bits(tmp_path, uninterrupted_run, blow):
    process = start_held(tmp_path, 6)
    process.send_signal(blow)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL), err
    if blow == signal.SIGINT:
        assert "the same command continues it" in out
        assert err == "stopping, once the last finished iteration is saved\n"
    assert train(tmp_path, "--max-iters", 12) == 0
    assert equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))
    steps = [m["step"] for m in metrics(tmp_path) if "loss" in m]
    assert steps == list(range(1, 13))  # each iteration is logged once


def test_a_finished_run_says_so_and_what_to_change(uninterrupted_run, capsys):
    assert train(uninterrupted_run, "--max-iters", 12) == 0
    assert "to continue, raise MAX_ITERS" in capsys.readouterr().out


def test_other_bytes_before_the_first_checkpoint_are_evaluated_too(tmp_path, monkeypatch):
    records = (ROOT / "bdh_lib/data/sample.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(records[:100]))
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(batches, "get_batch", lambda *_: 1 / 0)
        train(tmp_path, "--dataset", tmp_path / "d.jsonl", "--max-iters", 1)
    (tmp_path / "d.jsonl").write_text("".join(records[100:200]))
    train(tmp_path, "--dataset", tmp_path / "d.jsonl", "--max-iters", 1)
    first = metrics(tmp_path)[0]["val_loss"]
    train(tmp_path / "alone", "--dataset", tmp_path / "d.jsonl", "--max-iters", 1)
    assert [m["step"] for m in metrics(tmp_path) if "val_loss" in m] == [0, 1]
    assert first == metrics(tmp_path / "alone")[0]["val_loss"]


@pytest.mark.parametrize("also", [(), ("best.json",), ("best.json", "config.json"), (".saved",)])
def test_a_run_whose_checkpoints_are_gone_keeps_its_log(tmp_path, also):
    train(tmp_path, "--max-iters", 4)
    run = tmp_path / "full"
    log = (run / "metrics.jsonl").read_bytes()
    for name in ("step-000004", *also):
        (run / name).rename(tmp_path / name)
    with pytest.raises(checkpoints.NoValidCheckpoint, match=r"are gone.*RUN_NAME.*metrics\.jsonl"):
        train(tmp_path, "--max-iters", 8)
    assert (run / "metrics.jsonl").read_bytes() == log
    (run / "metrics.jsonl").rename(run / "earlier.jsonl")  # as the line says
    assert train(tmp_path, "--max-iters", 4) == 0
    assert (run / "earlier.jsonl").read_bytes() == log


@pytest.mark.parametrize("name", checkpoints.WRITTEN)
def test_what_a_killed_process_left_unfinished_is_removed(tmp_path, name):
    train(tmp_path, "--max-iters", 1)
    unfinished = tmp_path / "full" / files.temporary_name(name, 12345)
    unfinished.touch()
    mine = tmp_path / "full" / ".mine.tmp"
    mine.touch()
    train(tmp_path, "--max-iters", 2)
    assert mine.exists() and not unfinished.exists()


@pytest.mark.parametrize("name", checkpoints.WRITTEN)
def test_a_folder_of_other_files_does_not_become_a_run(tmp_path, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / name).write_text("my own")
    with pytest.raises(UserError, match=f"full is not a run, .* replace its {name}; set RUN_NAME"):
        train(tmp_path, "--max-iters", 1)
    assert [f.read_text() for f in (tmp_path / "full").iterdir()] == ["my own"]


def test_a_folder_of_other_checkpoints_does_not_become_a_run(tmp_path):
    (tmp_path / "full" / "step-000005").mkdir(parents=True)
    with pytest.raises(UserError, match=r"full is not a run, .* replace its step-000005; set"):
        train(tmp_path, "--max-iters", 1)
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["step-000005"]


def test_a_run_may_lie_in_a_folder_whose_files_it_does_not_replace(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("my own")
    assert train(tmp_path, "--max-iters", 1) == 0
    assert (tmp_path / "full" / "notes.txt").read_text() == "my own"


@pytest.mark.parametrize(
    "flags, n_steps, expected",
    [
        ("--keep-checkpoints 3 --save-freq 500", 10_000, 5),
        ("--keep-checkpoints 100000 --save-freq 10", 20, 3),
        ("--keep-checkpoints 100000 --save-freq 10 --eval-freq 5", 20, 7),
        ("--keep-checkpoints 1", 1, 1),
    ],
)
def test_disk_is_needed_for_the_checkpoints_that_a_run_can_save(flags, n_steps, expected):
    s = train_mlx.read_settings(flags.split())
    assert checkpoints.max_checkpoints(s, n_steps) == expected


@pytest.mark.parametrize("damage", ["foreign", "flipped", "binary", "deep"])
def test_a_log_that_is_damaged_is_set_aside_and_told(tmp_path, capsys, damage):
    train(tmp_path, "--max-iters", 4)
    log = tmp_path / "full" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2:3] = {
        "foreign": [b"my own notes\n", lines[2]],
        "deep": [b"[" * 100_000 + b"\n", lines[2]],
        "flipped": [lines[2].replace(b'"step": 2', b'"step": 3')],
        "binary": [b"\xff\0\xfe\n", lines[2]],
    }[damage]
    log.write_bytes(b"".join(lines))
    before = log.read_bytes()
    capsys.readouterr()
    assert train(tmp_path, "--max-iters", 6) == 0
    assert "kept as damaged-metrics.jsonl-0" in capsys.readouterr().err
    assert (tmp_path / "full" / "damaged-metrics.jsonl-0").read_bytes() == before
    steps = [m["step"] for m in metrics(tmp_path) if "loss" in m]
    assert steps == [n for n in range(1, 7) if damage != "flipped" or n != 2]


def test_a_log_cut_by_a_kill_is_no_damage_and_one_that_is_gone_is_told(tmp_path, capsys):
    train(tmp_path, "--max-iters", 4)
    log = tmp_path / "full" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 5, "lo')
    capsys.readouterr()
    train(tmp_path, "--max-iters", 5)
    assert "warning" not in capsys.readouterr().err
    log.unlink()
    train(tmp_path, "--max-iters", 6)
    assert "is gone; its lines up to iteration 5 are lost" in capsys.readouterr().err
    assert not list((tmp_path / "full").glob("damaged-*"))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(train_mlx, "learning_rate", lambda step, *_: 1 / (2 - step))
        train(tmp_path, "--max-iters", 4)
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1, 2]
    assert train(tmp_path, "--max-iters", 4) == 0


def test_a_run_past_a_lowered_end_is_finished(tmp_path, capsys):
    """It was stopped between evaluations: there is nothing to train, and nothing to print."""
    train(tmp_path, "--max-iters", 5, "--eval-freq", 100)
    log = tmp_path / "full" / "metrics.jsonl"  # as if it had not been evaluated at its end
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"step": 5' not in line))
    assert train(tmp_path, "--max-iters", 3, "--eval-freq", 100) == 0
    assert "has 5 iterations of 3; to continue, raise MAX_ITERS" in capsys.readouterr().out


def test_a_run_goes_on_with_a_setting_that_was_added_since(tmp_path, monkeypatch):
    train(tmp_path, "--max-iters", 2)
    read_settings = train_mlx.read_settings

    def with_another(argv):
        s = read_settings(argv)
        s.COOLDOWN = 0.5
        return s

    monkeypatch.setattr(train_mlx, "read_settings", with_another)
    for module in (train_mlx, resume):
        monkeypatch.setattr(module, "learning_rate", lambda step, total, s: 1e-3 * s.COOLDOWN)
    assert train(tmp_path, "--max-iters", 4) == 0


def test_a_resumed_run_tells_a_rate_that_jumps(tmp_path, capsys):
    decay = ["--lr-decay-iters", "none", "--learning-rate", 1e-3, "--min-lr-ratio", 0.1]
    train(tmp_path, "--max-iters", 10, *decay)
    capsys.readouterr()
    train(tmp_path, "--max-iters", 20, *decay)
    out = capsys.readouterr().out
    s = [train_mlx.read_settings([*ARGS, *map(str, decay), "--max-iters", n]) for n in ("10", "20")]
    last, new = schedule.learning_rate(9, 10, s[0]), schedule.learning_rate(10, 20, s[1])
    assert new > 4 * last
    assert f"learning rate: {last:.2e} at iteration 10, {new:.2e} from here on\n" in out
    train(tmp_path, "--max-iters", 20, *decay)
    assert "learning rate:" not in capsys.readouterr().out  # nothing has changed


def test_a_run_keeps_the_order_of_its_records(tmp_path):
    train(tmp_path, "--max-iters", 2)
    with pytest.raises(UserError, match="SHUFFLE_RECORDS: there True, here False"):
        train(tmp_path, "--max-iters", 4, "--no-shuffle-records")
    for file in (tmp_path / "full").glob("step-*/config.json"):
        info = json.loads(file.read_text())
        del info["settings"]["SHUFFLE_RECORDS"]
        file.write_text(json.dumps(info))
        manifest = file.with_name("manifest.json")
        written = json.loads(manifest.read_text())
        written["config.json"]["sha256"] = files.sha256_file(file)
        written["config.json"]["bytes"] = file.stat().st_size
        manifest.write_text(json.dumps(written))
    with pytest.raises(UserError, match="of another format: it has no SHUFFLE_RECORDS"):
        train(tmp_path, "--max-iters", 4)


def test_a_run_resumes_across_epochs_with_the_whole_recipe(tmp_path):
    """Average, decay and shuffled records as the trainer has them by default, bit for bit."""
    rows = [{"instruction": f"q{i}?", "response": f"a{i}."} for i in range(30)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = train_mlx.read_settings([])
    recipe = ["--ema-decay", s.EMA_DECAY, "--weight-decay", s.WEIGHT_DECAY, "--beta2", s.BETA2]
    args = [*recipe, "--dataset", tmp_path / "few.jsonl", "--eval-bytes", "none"]
    train(tmp_path / "whole", "--max-iters", 24, *args)
    for n in (5, 13, 24):
        train(tmp_path / "parts", "--max-iters", n, *args)
    n_bytes = json.loads((tmp_path / "whole/full/config.json").read_text())["data"]["train"][
        "bytes"
    ]
    assert 2 * n_bytes < 24 * 2 * 64  # over two epochs
    assert equal_arrays(arrays(tmp_path / "whole", 24), arrays(tmp_path / "parts", 24))


def test_a_resumed_run_trains_at_its_new_rate(tmp_path):
    """The optimizer's state, which is restored, holds the old rate; it must not come back."""
    rates = {"same": 1e-3, "other": 1e-5}
    for name, rate in rates.items():
        train(tmp_path / name, "--max-iters", 4)
        train(tmp_path / name, "--max-iters", 8, "--learning-rate", rate)
    logged = {n: [m["lr"] for m in metrics(tmp_path / n) if m.get("step", 0) > 4 and "lr" in m]
              for n in rates}  # fmt: skip
    assert logged["other"] == pytest.approx([lr / 100 for lr in logged["same"]])
    moved = {n: np.abs(arrays(tmp_path / n, 8)["0.encoder"] - arrays(tmp_path / n, 4)["0.encoder"])
             for n in rates}  # fmt: skip
    assert moved["other"].mean() < 0.05 * moved["same"].mean()


def test_a_resumed_run_tells_of_a_damaged_config(tmp_path, capsys):
    train(tmp_path, "--max-iters", 1)
    config = tmp_path / "full" / "config.json"
    config.write_text("5")
    capsys.readouterr()
    assert train(tmp_path, "--max-iters", 2) == 0
    assert f"warning: {config} is damaged: it holds no JSON object\n" in capsys.readouterr().err
    assert train(tmp_path, "--max-iters", 3) == 0
    assert "damaged" not in capsys.readouterr().err  # it was written anew


def test_other_settings_in_the_same_run_are_refused_by_name(uninterrupted_run):
    changes = r"BLOCK_SIZE: there 64, here 32; n_embd: there 16, here 8\)"
    with pytest.raises(UserError, match=rf"{changes}.* another run: set RUN_NAME \(--run-name\)$"):
        train(uninterrupted_run, "--max-iters", 20, "--block-size", 32, "--n-embd", 8)
    with pytest.raises(UserError, match=r"\(TRAINING_MODE: there full, here both\)"):
        # not: other bytes
        train(uninterrupted_run, "--training-mode", "both", "--run-name", "full")
    shape = ("--n-layer", 1, "--n-embd", 8, "--n-head", 1, "--mlp-internal-dim-multiplier", 2)
    with pytest.raises(UserError, match=r"n_head: there 2, here 1; and others\)"):
        train(uninterrupted_run, "--seed", 1, "--block-size", 32, *shape)


def test_changed_data_are_told_by_size_and_name_not_by_digest(tmp_path):
    texts = [f"{i} paragraph of plain text" for i in range(30)]
    for name, change in (("d", str), ("longer", lambda t: t + "."), ("upper", str.upper)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(map(change, texts)))
    train(tmp_path, "--max-iters", 1, "--dataset", tmp_path / "d.txt")
    for name, output in (
        (
            "longer",
            r"train data: there 27 records, \d{3} bytes, \S+d.txt, here 27 records, \d{3} bytes",
        ),
        ("upper", r"val data: there 3 records, 8\d bytes, \S+d.txt, here 3 records, 8\d bytes"),
    ):
        with pytest.raises(UserError, match=output) as error:
            train(tmp_path, "--max-iters", 2, "--dataset", tmp_path / f"{name}.txt")
        assert str(error.value).endswith("; INIT_FROM full begins it with these weights")
        assert not re.search("[0-9a-f]{9}", str(error.value).replace(str(tmp_path), ""))
    (tmp_path / "d.txt").write_text("\n\n".join(map(str.upper, texts)))
    with pytest.raises(UserError, match="train data: other bytes, as many: "):
        train(tmp_path, "--max-iters", 2, "--dataset", tmp_path / "d.txt")


def test_a_signal_after_the_last_evaluation_finds_a_complete_run(tmp_path, monkeypatch, capsys):
    def draw(log):
        if log.last_eval_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_mlx, "redraw_report", draw)
    assert train(tmp_path, "--max-iters", 4) == 0
    out = capsys.readouterr().out
    assert "ended: by MAX_ITERS" in out and "stopped" not in out


def test_files_that_may_not_be_read_are_left_as_they_are(uninterrupted_run, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted_run / "full", tmp_path / "full")
    names = sorted(p.name for p in (tmp_path / "full").iterdir())

    def denied(file, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    message = "safetensors cannot be read: Permission denied; allow it"
    for check in (checkpoints.newest_valid, checkpoints.valid_best):
        with monkeypatch.context() as unreadable, pytest.raises(UserError, match=message):
            unreadable.setattr(runs, "find_change", denied)
            check(tmp_path / "full")
    with monkeypatch.context() as unreadable, pytest.raises(UserError, match=r"best\.json cannot"):
        unreadable.setattr(type(tmp_path), "open", denied)
        checkpoints.valid_best(tmp_path / "full")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == names


def test_a_best_json_of_a_checkpoint_that_is_gone_is_dropped(tmp_path, capsys):
    train(tmp_path, "--max-iters", 4)
    write_best(tmp_path / "full", checkpoint="step-000006", step=6, monitored_loss=1.0)
    assert checkpoints.valid_best(tmp_path / "full") == {}
    assert "the best until the next validation: step-000006 is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind",
    ["--ema-decay 0.9 --grad-accum 2", "--byte-noise 0.2 --dropout-v 0.1"],
)
def test_a_recipe_resumes_in_the_same_bits(tmp_path, kind):
    for folder, ends in (("once", [6]), ("twice", [4, 6])):
        for end in ends:
            assert train(tmp_path / folder, *kind.split(), "--max-iters", end) == 0
    assert equal_arrays(arrays(tmp_path / "twice", 6), arrays(tmp_path / "once", 6))


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_way_of_a_checkpoint_is_told_before_training(tmp_path, kind):
    train(tmp_path, "--max-iters", 1)
    obstacle = tmp_path / "full" / "step-000030"
    obstacle.symlink_to(tmp_path) if kind == "link" else obstacle.write_text("mine")
    with pytest.raises(UserError, match=r"step-000030 is in the way .* remove or rename it"):
        train(tmp_path, "--max-iters", 2)
    assert runs.steps(tmp_path / "full") == [1]
    obstacle.rename(obstacle.with_name("step-000001-old"))
    assert train(tmp_path, "--max-iters", 2) == 0


@pytest.mark.parametrize("name", ["full/config.json/", "full/.lock/", "full", ".data"])
def test_a_folder_for_a_file_or_a_file_for_a_folder_is_told_with_the_cure(tmp_path, name):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.write_text("mine")
    with pytest.raises(UserError, match=rf"{path} cannot be written: .*; remove or rename it"):
        train(tmp_path, "--max-iters", 1)


@pytest.mark.parametrize("kind", ["folder", "loop", "text", "deep"])
def test_a_best_json_that_is_none_is_set_aside(tmp_path, capsys, kind):
    train(tmp_path, "--max-iters", 2)
    best = tmp_path / "full" / "best.json"
    best.unlink()
    if kind == "folder":
        (best / "mine").mkdir(parents=True)
    elif kind == "loop":
        best.symlink_to(best)
    else:
        best.write_text("mine" if kind == "text" else "[" * 100_000)
    assert train(tmp_path, "--max-iters", 4) == 0
    assert "best.json is not what was written" in capsys.readouterr().err
    assert json.loads(best.read_text())["step"] == 4
    aside = tmp_path / "full" / "damaged-best.json-0"
    if kind == "folder":
        assert (aside / "mine").is_dir()
    elif kind == "loop":
        assert aside.is_symlink()
    else:
        assert aside.read_text()[:4] == ("mine" if kind == "text" else "[[[[")


def test_a_disk_that_fills_during_a_save_is_told_without_an_error_number(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.files, "fsync", full)
    monkeypatch.setattr(checkpoints, "check_space", lambda *_: None)
    s = train_mlx.read_settings(["--n-layer", "1", "--n-embd", "8"])
    state = init_train_state(s, memory.compute_for(s.BDH_CONFIG, "fast", "auto"))
    with pytest.raises(UserError, match=r"step-000003 not saved: No space left on device; earlier"):
        checkpoints.save(tmp_path, 3, state, {})
    assert not [*tmp_path.iterdir()]
