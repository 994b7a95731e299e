"""The loop: batches, schedule, evaluation, exact resume, settings, and what a user meets."""

import errno
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT
from helpers import ARGS, arrays, metrics, same, train

import bdh_mlx
import generate
import train_mlx
from bdh_lib import files, flags, runs
from bdh_lib.generation import export
from bdh_lib.training import checkpoints, evaluation, macos, resume, runlog, schedule, summary
from bdh_lib.training.batches import epoch_order, get_batch
from bdh_lib.training.dataset import Split, load_prepared
from bdh_lib.training.ema import copy_tree
from bdh_lib.training.step import byte_losses, compile_steps, corrupt_bytes
from bdh_mlx import UserError


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 12 iterations without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder, "--max-iters", 12) == 0
    return folder


# ----------------------------------------------------------------------------- batches and schedule


def batches(split, first, count, *, B=1, T=10, shuffle=False):
    """The blocks of `count` batches of a run, (count * B, T) inputs and targets."""
    s = SimpleNamespace(BATCH_SIZE=B, BLOCK_SIZE=T, SEED=1, SHUFFLE_RECORDS=shuffle, LOSS_ON="all")
    both = [get_batch(split, i, s, B * T)[:2] for i in range(first, first + count)]
    return tuple(
        np.concatenate([np.array(side) for side in sides]) for sides in zip(*both, strict=True)
    )


def split_of(n, lengths=None):
    return Split(np.arange(n), np.zeros(n), None if lengths is None else np.cumsum(lengths))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "T"), [(1000, 10), (1003, 10), (11, 10)])
def test_an_epoch_has_every_byte_as_a_target_and_few_twice(n, T, shuffle):
    blocks = math.ceil(n / T)
    split = split_of(n, [3, 5] * (n // 8) + [n % 8] * (n % 8 > 0))
    idx, targets = batches(split, 0, blocks, T=T, shuffle=shuffle)
    times = np.bincount(targets.ravel(), minlength=n)
    assert times.min() == 1 and (times - 1).sum() == blocks * T - n < T
    in_order = (idx + 1) % n == targets
    assert in_order.all() if not shuffle else in_order.mean() > 0.5  # 3 of 4 lie in one record


def test_each_epoch_has_its_own_order_and_offset():
    split = split_of(1000)
    one, two = (batches(split, i, 100)[0][:, 0] for i in (0, 100))
    assert one[0] % 10 != two[0] % 10  # offsets; true of this seed
    assert not np.array_equal(np.diff(one), np.full(99, 10))  # shuffled


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_a_function_of_their_number_across_epochs(shuffle):
    split = split_of(95, [19] * 5)
    whole = batches(split, 0, 40, shuffle=shuffle)[0]
    parts = [batches(split, i, 1, B=4, shuffle=shuffle)[0] for i in range(10)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_records_follow_each_other_in_a_new_order_in_each_epoch_and_stay_whole():
    split = split_of(1000, [10] * 100)
    orders = []
    for epoch in range(3):
        targets = batches(split, 20 * epoch, 20, T=50, shuffle=True)[1]
        inside = targets[:, :-1] % 10 < 9
        assert np.all(np.diff(targets)[inside] == 1)
        orders.append([*dict.fromkeys((targets // 10).ravel().tolist())])
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    epoch_order.cache_clear()
    again = batches(split, 40, 20, T=50, shuffle=True)[1]
    assert np.array_equal(again, targets)
    epoch_order.cache_clear()
    orders = [epoch_order(split, seed, 0)[1].tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_paragraphs_of_plain_text_among_records_keep_their_order(tmp_path):
    rows = [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(40)]
    rows[20:20] = [{"text": f"Paragraph {i}."} for i in range(20)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = f"--training-mode full --checkpoint-dir {tmp_path}/ck --dataset {tmp_path}/mixed.jsonl"
    train_split = load_prepared(train_mlx.settings(args.split()), "full")[1]
    text = train_split.bytes.tobytes()
    units = np.split(train_split.bytes, train_split.record_ends)[:-1]
    assert b"".join(unit.tobytes() for unit in units) == text
    paragraphs = [unit.tobytes() for unit in units if b"Paragraph" in unit.tobytes()]
    assert len(paragraphs) == 1 and 30 < len(units) < 40


def test_plain_text_and_ready_splits_are_not_shuffled(tmp_path):
    (tmp_path / "story.txt").write_text("\n\n".join(f"Paragraph {i} of it." for i in range(50)))
    (tmp_path / "ready").mkdir()
    for side in ("train", "val"):
        (tmp_path / f"ready/{side}.bin").write_bytes(b"some text\n" * 50)
    args = "--block-size 8 --training-mode full --shuffle-records --checkpoint-dir"
    for dataset, is_shuffled in (("story.txt", False), ("ready", False), ("sample", True)):
        name = dataset if dataset == "sample" else str(tmp_path / dataset)
        s = train_mlx.settings([*args.split(), str(tmp_path / "ck"), "--dataset", name])
        train_split = load_prepared(s, "full")[1]
        assert (train_split.record_ends is not None) == is_shuffled
        if is_shuffled:
            assert train_split.record_ends[-1] == len(train_split.bytes)


def test_the_learning_rate_rises_then_falls_to_its_share():
    s = SimpleNamespace(WARMUP_ITERS=10, LEARNING_RATE=1.0, MIN_LR_RATIO=0.1)
    s.LR_DECAY_ITERS = None
    rates = [schedule.learning_rate(i, 100, s) for i in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert np.all(np.diff(rates[10:]) < 0)


def test_a_share_of_the_bytes_is_replaced_by_others_of_the_batch():
    idx = mx.array(np.arange(4096).reshape(4, 1024) % 251)
    for share in (0.05, 0.5):
        result = np.array(corrupt_bytes(idx, share, mx.random.key(1)))
        replaced = np.mean(result != np.array(idx))
        assert replaced == pytest.approx(share * 250 / 251, abs=0.02) and result.max() < 251


def test_the_average_starts_fast_and_slows_down_to_its_decay():
    mx.random.seed(1)
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0.0, 1, 2))
    optimizer = optim.AdamW(1e-2)
    optimizer.init(model.trainable_parameters())
    ema = copy_tree(model.parameters())
    s = SimpleNamespace(BYTE_NOISE=0, GRAD_CLIP=1.0, EMA_DECAY=0.5)
    micro_step, apply_update, state = compile_steps(model, optimizer, ema, s)
    expected = np.array(ema["lm_head"], np.float64)
    idx, weights = mx.array([[1, 2, 3, 4]]), mx.full((1, 4), 0.25)
    for step in range(1, 14):
        mx.eval(apply_update(*micro_step(idx, idx, weights, mx.random.key(step))), state)
        rate = 1 - min(0.5, step / (step + 9))
        expected += rate * (np.array(model.lm_head) - expected)
        assert np.allclose(np.array(ema["lm_head"]), expected, atol=1e-6), step


def test_each_batch_of_a_seed_has_a_key_of_its_own(tmp_path, monkeypatch):
    seeds, key = [], mx.random.key
    monkeypatch.setattr(train_mlx.mx.random, "key", lambda seed: seeds.append(seed) or key(seed))
    for seed in (1, 2):
        train(tmp_path / str(seed), "--max-iters", 3, "--seed", seed)
    batches = [seed for seed in seeds if seed >= 2**32]
    assert batches == [seed * 2**32 + i for seed in (1, 2) for i in range(3)]


def test_a_gpu_that_computes_ahead_trains_and_logs_the_same(straight, tmp_path, monkeypatch):
    for module in (train_mlx, runlog):
        monkeypatch.setattr(module, "on_cuda", lambda: True)
    assert train(tmp_path, "--max-iters", 12) == 0
    assert same(arrays(straight, 12), arrays(tmp_path, 12))
    losses = [[(m["step"], m["loss"], m["skipped"]) for m in metrics(run) if "loss" in m]
              for run in (straight, tmp_path)]  # fmt: skip
    assert losses[0] == losses[1] and losses[0]


def test_an_update_that_is_read_late_counts_as_its_own(monkeypatch, capsys):
    monkeypatch.setattr(runlog, "on_cuda", lambda: True)
    meter = runlog.Meter(0, 3, 1000)
    for step, loss in enumerate((1.0, math.nan, 3.0), 1):
        meter.start()
        meter.stop(step, mx.array(loss), mx.array(1.0), True)
    assert (
        meter.consecutive_skips == 1 and "iter      2 | update skipped" in capsys.readouterr().out
    )
    assert meter.read(3)["loss"] == 2.0 and meter.consecutive_skips == 0
    assert meter.read(3) == {}


def test_the_first_update_is_not_timed(monkeypatch):
    meter = runlog.Meter(0, 5, 1000)
    clock = iter([0.0, 100.0, 102.0])  # a start, a start and its end; the first end reads no clock
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    for step in (1, 2):
        meter.start()
        meter.stop(step, 1.0, 1.0, True)
    assert meter.timed_bytes / meter.seconds == 500


def test_the_run_ends_at_the_sooner_of_iterations_and_epochs():
    s = SimpleNamespace(BLOCK_SIZE=10, BATCH_SIZE=2, GRAD_ACCUM=1, MAX_ITERS=7, EPOCHS=3.0)
    assert schedule.total_steps(s, 95) == 7
    s.MAX_ITERS = None
    assert schedule.total_steps(s, 95) == 15
    assert "MAX_ITERS" not in schedule.schedule_summary(s, 95)
    s.MAX_ITERS = 14
    assert "14 iterations of 20 bytes are 280 bytes or 2.95" in schedule.schedule_summary(s, 95)
    assert schedule.schedule_summary(s, 95).endswith("; MAX_ITERS ends it before EPOCHS (3)")
    s.EPOCHS = None
    assert schedule.total_steps(s, 95) == 14 and schedule.schedule_summary(s, 95).endswith("epochs")


@pytest.mark.parametrize("n", [2, 7, 9, 50, 81])
def test_evaluation_reads_every_byte_once(n):
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0.5, 1, 4))
    val = np.random.default_rng(0).integers(0, 256, n, dtype=np.uint8)
    nats = 0.0
    for begin in range(0, n - 1, 8):
        piece = mx.array(val[begin : begin + 9].astype(np.int32))[None]
        nats += model(piece[:, :-1], piece[:, 1:])[1].item() * (piece.shape[1] - 1)
    losses = partial(byte_losses, model)
    mean, of = evaluation.evaluate(losses, val, np.zeros(n, np.uint8), B=3, T=8)
    assert mean == of["headers"] == pytest.approx(nats / (n - 1), rel=1e-5)


# ------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("stops", [[5], [4, 5, 8], [1, 11]])
def test_a_stopped_run_ends_in_the_same_bits(tmp_path, straight, stops):
    for stop in (*stops, 12):
        assert train(tmp_path, "--max-iters", stop) == 0
    assert same(arrays(tmp_path, 12), arrays(straight, 12))


def test_accumulating_runs_resume_exactly_too(tmp_path):
    for folder, stops in (("a", [6]), ("b", [3, 6])):
        for stop in stops:
            train(tmp_path / folder, "--grad-accum", 3, "--max-iters", stop)
    assert same(arrays(tmp_path / "a", 6), arrays(tmp_path / "b", 6))


@pytest.mark.parametrize("lost", ["optimizer", "data position", "dropout"])
def test_a_resume_that_loses_something_ends_elsewhere(tmp_path, straight, monkeypatch, lost):
    """Negative controls: the comparison above can fail."""
    train(tmp_path, "--max-iters", 5)
    if lost == "optimizer":
        load = checkpoints.load

        def without_optimizer(run, step, model, optimizer, raw):
            state = optimizer.state
            load(run, step, model, optimizer)
            optimizer.state = state

        monkeypatch.setattr(checkpoints, "load", without_optimizer)
    if lost == "data position":
        monkeypatch.setattr(
            train_mlx, "get_batch", lambda split, i, *rest: get_batch(split, i - 5, *rest)
        )
    if lost == "dropout":
        key = mx.random.key
        monkeypatch.setattr(mx.random, "key", lambda seed: key(seed + 1))
    train(tmp_path, "--max-iters", 12)
    assert not same(arrays(tmp_path, 12), arrays(straight, 12))


HELD = """
import sys
sys.path.insert(0, {root!r})
import train_mlx
get_batch, calls = train_mlx.get_batch, []

def held(*args):
    calls.append(args)
    if len(calls) == {after} + 1:
        print("held", flush=True)
        sys.stdin.read()
    return get_batch(*args)

train_mlx.get_batch = held
sys.exit(train_mlx.main())
"""


def start_held(folder, after):
    """The trainer of 12 iterations, which waits after so many of them until its stdin is closed."""
    code = HELD.format(root=str(ROOT), after=after)
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
    tmp_path, straight, number, owner, name, script, args
):
    code = DEAF.format(root=str(ROOT), owner=owner, name=name, script=script)
    args = [a.format(run=straight / "full") for a in args]
    args += [] if script == "generate" else ["--checkpoint-dir", str(tmp_path)]
    command = [sys.executable, "-c", code, *args]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, **pipes)
    assert any(line == "held\n" for line in process.stdout)
    process.send_signal(number)
    process.communicate(timeout=20)  # which the call would take for minutes
    assert process.returncode == -number


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_run_ends_in_the_same_bits(tmp_path, straight, blow):
    process = start_held(tmp_path, 6)
    process.send_signal(blow)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL), err
    if blow == signal.SIGINT:
        assert "the same command continues it" in out
        assert err == "stopping, once the iteration is done and saved\n"
    assert train(tmp_path, "--max-iters", 12) == 0
    assert same(arrays(tmp_path, 12), arrays(straight, 12))
    steps = [m["step"] for m in metrics(tmp_path) if "loss" in m]
    assert steps == list(range(1, 13))  # each iteration is told once


def test_a_finished_run_says_so_and_what_to_change(straight, capsys):
    assert train(straight, "--max-iters", 12) == 0
    assert "raise MAX_ITERS or EPOCHS" in capsys.readouterr().out


def test_other_bytes_before_the_first_checkpoint_are_evaluated_too(tmp_path, monkeypatch):
    records = (ROOT / "bdh_lib/data/sample.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(records[:100]))
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(train_mlx, "get_batch", lambda *_: 1 / 0)
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
    assert "kept as damaged-metrics.jsonl-0" in capsys.readouterr().out
    assert (tmp_path / "full" / "damaged-metrics.jsonl-0").read_bytes() == before
    steps = [m["step"] for m in metrics(tmp_path) if "loss" in m]
    assert steps == [n for n in range(1, 7) if damage != "flipped" or n != 2]


def test_a_log_cut_by_a_kill_is_no_damage_and_one_that_is_gone_is_told(tmp_path, capsys):
    train(tmp_path, "--max-iters", 4)
    log = tmp_path / "full" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 5, "lo')
    capsys.readouterr()
    train(tmp_path, "--max-iters", 5)
    assert "warning" not in capsys.readouterr().out
    log.unlink()
    train(tmp_path, "--max-iters", 6)
    assert "is gone; what it told up to iteration 5 is lost" in capsys.readouterr().out
    assert not list((tmp_path / "full").glob("damaged-*"))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(train_mlx, "learning_rate", lambda step, *_: 1 / (2 - step))
        train(tmp_path, "--max-iters", 4)
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1, 2]
    assert train(tmp_path, "--max-iters", 4) == 0


def test_a_run_past_a_lowered_end_is_finished(tmp_path, capsys):
    """It was stopped between evaluations: there is nothing to train, and nothing to tell."""
    train(tmp_path, "--max-iters", 5, "--eval-freq", 100)
    log = tmp_path / "full" / "metrics.jsonl"  # as if it had not been evaluated at its end
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"step": 5' not in line))
    assert train(tmp_path, "--max-iters", 3, "--eval-freq", 100) == 0
    assert "has 5 iterations of 3; to go on, raise MAX_ITERS" in capsys.readouterr().out


def test_a_run_goes_on_with_a_setting_that_was_added_since(tmp_path, monkeypatch):
    train(tmp_path, "--max-iters", 2)
    settings = train_mlx.settings

    def with_another(argv):
        s = settings(argv)
        s.COOLDOWN = 0.5
        return s

    monkeypatch.setattr(train_mlx, "settings", with_another)
    for module in (train_mlx, resume):
        monkeypatch.setattr(module, "learning_rate", lambda step, total, s: 1e-3 * s.COOLDOWN)
    assert train(tmp_path, "--max-iters", 4) == 0


def test_a_resumed_run_tells_a_rate_that_jumps(tmp_path, capsys):
    decay = ["--lr-decay-iters", "none", "--learning-rate", 1e-3]
    train(tmp_path, "--max-iters", 10, *decay)
    capsys.readouterr()
    train(tmp_path, "--max-iters", 20, *decay)
    out = capsys.readouterr().out
    s = [train_mlx.settings([*ARGS, *map(str, decay), "--max-iters", n]) for n in ("10", "20")]
    last, new = schedule.learning_rate(9, 10, s[0]), schedule.learning_rate(10, 20, s[1])
    assert new > 4 * last
    assert f"learning rate: {last:.2e} at iteration 10, {new:.2e} from here on\n" in out
    train(tmp_path, "--max-iters", 20, *decay)
    assert "learning rate:" not in capsys.readouterr().out  # nothing has changed


def test_a_run_keeps_the_order_of_its_records(tmp_path):
    train(tmp_path, "--max-iters", 2)
    with pytest.raises(UserError, match="SHUFFLE_RECORDS: there True, here False"):
        train(tmp_path, "--max-iters", 4, "--no-shuffle-records")
    for file in (tmp_path / "full").glob("step-*/config.json"):  # from before the setting
        info = json.loads(file.read_text())
        del info["settings"]["SHUFFLE_RECORDS"]
        file.write_text(json.dumps(info))
        manifest = file.with_name("manifest.json")
        written = json.loads(manifest.read_text())
        written["config.json"]["sha256"] = files.sha256_file(file)
        written["config.json"]["bytes"] = file.stat().st_size
        manifest.write_text(json.dumps(written))
    with pytest.raises(UserError, match="SHUFFLE_RECORDS: there False, here True"):
        train(tmp_path, "--max-iters", 4)


def test_a_run_resumes_across_epochs_with_the_whole_recipe(tmp_path):
    """Average, decay and shuffled records as the trainer has them by default, bit for bit."""
    rows = [{"instruction": f"q{i}?", "response": f"a{i}."} for i in range(30)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = train_mlx.settings([])
    recipe = ["--ema-decay", s.EMA_DECAY, "--weight-decay", s.WEIGHT_DECAY, "--beta2", s.BETA2]
    args = [*recipe, "--dataset", tmp_path / "few.jsonl", "--eval-bytes", "none"]
    train(tmp_path / "whole", "--max-iters", 24, *args)
    for n in (5, 13, 24):
        train(tmp_path / "parts", "--max-iters", n, *args)
    n_bytes = json.loads((tmp_path / "whole/full/config.json").read_text())["data"]["train"][
        "bytes"
    ]
    assert 2 * n_bytes < 24 * 2 * 64  # over two epochs
    assert same(arrays(tmp_path / "whole", 24), arrays(tmp_path / "parts", 24))


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


def test_beta2_weighs_the_squared_gradients(tmp_path):
    train(tmp_path, "--max-iters", 1, "--beta2", 0.75)
    state = arrays(tmp_path, 1)
    gradient = state["1.encoder.m"] / 0.1  # of the first update, from a mean that began at 0
    np.testing.assert_allclose(state["1.encoder.v"], 0.25 * gradient**2, rtol=1e-4)


def test_a_resumed_run_tells_of_a_damaged_config(tmp_path, capsys):
    train(tmp_path, "--max-iters", 1)
    config = tmp_path / "full" / "config.json"
    config.write_text("5")
    capsys.readouterr()
    assert train(tmp_path, "--max-iters", 2) == 0
    assert f"warning: {config} is damaged: it holds no JSON object\n" in capsys.readouterr().err
    assert train(tmp_path, "--max-iters", 3) == 0
    assert "damaged" not in capsys.readouterr().err  # it was written anew


def test_more_accumulation_takes_no_more_memory(tmp_path, monkeypatch):
    """A million batches an update: what is made for all of them at once is not for each byte."""
    largest, real = [0], np.full
    for name in ("full", "ones", "zeros", "empty"):
        real = getattr(np, name)
        monkeypatch.setattr(np, name, lambda shape, *a, real=real, **k: (
            largest.append(int(np.prod(shape))), real(shape, *a, **k))[1])  # fmt: skip
    seen = []

    def stopped(*args):
        seen.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_mlx, "get_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--grad-accum", 10**6, "--max-iters", 1)
    assert seen and max(largest) < 10**6


def test_what_takes_long_is_said_before_it_begins(tmp_path, capsys):
    train(tmp_path, "--max-iters", 1)
    lines = capsys.readouterr().out.splitlines()
    order = ("compiling the evaluation", "evaluating ", "iter      0", "compiling the training")
    at = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert at == sorted(at)


def test_a_refused_start_leaves_no_folder(tmp_path, monkeypatch):
    for args in (["--dataset", tmp_path / "none.jsonl"], ["--init-from", "nowhere"]):
        with pytest.raises(UserError):
            train(tmp_path, *args)
    monkeypatch.setattr(train_mlx.memory, "available", lambda: 1000)
    with pytest.raises(UserError, match="needs"):
        train(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [".data"]
    (tmp_path / "full").mkdir()  # the user's own
    with pytest.raises(UserError, match="needs"):
        train(tmp_path)
    assert (tmp_path / "full").is_dir()


def test_a_run_whose_name_differs_in_case_alone_is_refused(tmp_path):
    train(tmp_path, "--max-iters", 1)
    with pytest.raises(UserError, match=r"/Full and .*/full, which exists, differ in case alone"):
        train(tmp_path, "--max-iters", 1, "--run-name", "Full")
    assert sorted(f.name for f in tmp_path.iterdir()) == [".data", "full"]
    if not (tmp_path / "FULL").exists():  # a disk that tells them apart may hold both from before
        (tmp_path / "Full").mkdir()
        assert train(tmp_path, "--max-iters", 1, "--run-name", "Full") == 0
        assert train(tmp_path, "--max-iters", 1) == 0


def test_samples_and_the_command_at_the_end_fit_the_data(tmp_path, capsys, monkeypatch):
    """Without system texts none is asked for, and a text stays within the blocks."""
    asked = [{"question": f"q {i}" * 9, "answer": f"a {i}" * 9} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, asked)))
    train(tmp_path, "--dataset", tmp_path / "d.jsonl", "--max-iters", 1)
    (output,) = [m["samples"] for m in metrics(tmp_path) if "samples" in m]
    assert output and not any("### System" in text for text in output)
    command = shlex.split(re.search("sample_it: (.*)", capsys.readouterr().out)[1])
    assert command[1] == "generate.py"
    args = generate.parse_args(command[2:])
    assert args.prompt == "### Instruction:\nAnalyze the ethical implications".replace("\n", "\\n")
    assert args.window == 64 and args.model == tmp_path / "full"
    s = SimpleNamespace(BLOCK_SIZE=2, TRAINING_MODE="full")
    assert "--window 4" in summary.sample_command(s, tmp_path, {"text"})
    monkeypatch.chdir(tmp_path)
    elsewhere = shlex.split(summary.sample_command(s, tmp_path, {"text"}))
    assert elsewhere[:2] == [sys.executable, str(ROOT / "generate.py")]


def test_other_settings_in_the_same_run_are_refused_by_name(straight):
    with pytest.raises(
        UserError, match=r"BLOCK_SIZE: there 64, here 32; n_embd: there 16, here 8\).* another$"
    ):
        train(straight, "--max-iters", 20, "--block-size", 32, "--n-embd", 8)
    with pytest.raises(UserError, match=r"\(TRAINING_MODE: there full, here both\)"):
        train(straight, "--training-mode", "both", "--run-name", "full")  # not: other bytes
    shape = ("--n-layer", 1, "--n-embd", 8, "--n-head", 1, "--mlp-internal-dim-multiplier", 2)
    with pytest.raises(UserError, match=r"n_head: there 2, here 1; and others\)"):
        train(straight, "--seed", 1, "--block-size", 32, *shape)


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
        assert str(error.value).endswith("with INIT_FROM full from these weights")
        assert not re.search("[0-9a-f]{9}", str(error.value).replace(str(tmp_path), ""))
    (tmp_path / "d.txt").write_text("\n\n".join(map(str.upper, texts)))
    with pytest.raises(UserError, match="train data: other bytes, as many: "):
        train(tmp_path, "--max-iters", 2, "--dataset", tmp_path / "d.txt")


# ----------------------------------------------------------------------- what a run does and leaves


def test_what_a_run_leaves(straight):
    run = straight / "full"
    best = json.loads((run / "best.json").read_text())
    evaluations = {m["step"]: m["val_loss"] for m in metrics(straight) if "val_loss" in m}
    assert list(evaluations) == [0, 5, 10, 12]
    assert best["monitored_loss"] == min(v for k, v in evaluations.items() if k)
    assert {f"step-{n:06d}" for n in checkpoints.steps(run)} >= {best["checkpoint"], "step-000012"}
    config = json.loads((run / "step-000012" / "config.json").read_text())
    assert config["step"] == 12 and config["settings"]["BLOCK_SIZE"] == 64
    assert sorted(f.name for f in run.iterdir() if f.name.startswith(".")) == [".lock", ".saved"]
    assert runs.find_weights(run) == run / best["checkpoint"] / "model.safetensors"


def test_a_checkpoint_is_written_before_the_evaluation_of_its_step(tmp_path, monkeypatch):
    def dies(*args):
        raise MemoryError

    train(tmp_path, "--max-iters", 3, "--eval-freq", 4)
    monkeypatch.setattr(train_mlx, "evaluate", dies)
    with pytest.raises(MemoryError):
        train(tmp_path, "--max-iters", 9, "--eval-freq", 4)
    assert checkpoints.steps(tmp_path / "full")[-1] == 4


@pytest.mark.parametrize("supported", [True, False])
def test_where_a_full_flush_is_refused_fsync_flushes(tmp_path, monkeypatch, supported):
    calls = []

    def fcntl(descriptor, command):  # as on a Mac, with a drive of its own or of the network
        calls.append(command)
        if not supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", "full", raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append("fsync"))
    files.atomic_write_text(tmp_path / "file", "text")
    assert calls == 2 * (["full"] if supported else ["full", "fsync"])  # the file, its folder
    assert (tmp_path / "file").read_text() == "text"


def test_only_the_last_and_the_best_checkpoints_stay(tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 1.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(train_mlx, "evaluate", lambda *args: (next(losses), {}))
    train(tmp_path, "--max-iters", 12, "--eval-freq", 2, "--save-freq", 2, "--keep-checkpoints", 2)
    assert checkpoints.steps(tmp_path / "full") == [4, 10, 12]
    assert checkpoints.read_best(tmp_path / "full")["step"] == 4


@pytest.mark.parametrize("minutes", [10, "none"])
def test_a_checkpoint_is_written_when_minutes_have_passed(tmp_path, straight, monkeypatch, minutes):
    saved, save, now = [], checkpoints.save, [0.0]

    def four_minutes(*args):
        now[0] += 240
        return get_batch(*args)

    monkeypatch.setattr(train_mlx, "get_batch", four_minutes)
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        checkpoints, "save", lambda run, step, *a: saved.append(step) or save(run, step, *a)
    )
    rare = ("--eval-freq", 100, "--save-freq", 8, "--keep-checkpoints", 2)
    train(tmp_path, "--max-iters", 12, "--save-minutes", minutes, *rare)
    assert saved == ([8, 12] if minutes == "none" else [3, 6, 8, 11, 12])
    assert checkpoints.steps(tmp_path / "full") == saved[-2:]
    assert same(arrays(tmp_path, 12), arrays(straight, 12))


def rewrite_best(run, **best):
    best["sha256"] = hashlib.sha256(repr(best).encode()).hexdigest()
    (run / "best.json").write_text(json.dumps(best))


def test_a_best_json_of_a_checkpoint_that_is_gone_is_dropped(tmp_path, capsys):
    train(tmp_path, "--max-iters", 4)
    rewrite_best(tmp_path / "full", checkpoint="step-000006", step=6, monitored_loss=1.0)
    assert checkpoints.read_best(tmp_path / "full") == {}
    assert "the best until the next validation: step-000006 is not" in capsys.readouterr().out


def test_evaluating_and_sampling_do_not_disturb_training(tmp_path, straight):
    train(tmp_path, "--max-iters", 12, "--eval-freq", 1, "--sample-bytes", 5, "--log-freq", 5)
    assert same(arrays(tmp_path, 12), arrays(straight, 12))


def test_dropout_differs_between_steps_and_is_off_in_evaluation(tmp_path):
    """At learning rate ~0 on one batch only dropout moves the loss; without it, nothing does."""
    spread = {}
    for dropout in (0, 0.5):
        folder = tmp_path / str(dropout)
        text = tmp_path / "one.txt"
        text.write_text("a" * 65 + "\n\n" + "b" * 65)
        train(folder, "--max-iters", 6, "--dropout", dropout, "--learning-rate", 1e-12,
              "--dataset", text, "--eval-freq", 1)  # fmt: skip
        logged = metrics(folder)
        spread[dropout] = np.ptp([m["loss"] for m in logged if "loss" in m])
        assert np.ptp([m["val_loss"] for m in logged if "val_loss" in m]) < 1e-5
    assert spread[0] < 1e-5 < 1e-3 < spread[0.5]


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    for accum in (1, 4):
        train(tmp_path / str(accum), "--batch-size", 4 // accum, "--grad-accum", accum,
              "--max-iters", 3, "--dropout", 0)  # fmt: skip
    one, four = (arrays(tmp_path / str(n), 3) for n in (1, 4))
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=0, atol=1e-5)


def test_one_batch_is_overfitted(tmp_path):
    text = tmp_path / "one.txt"
    fox = "The quick brown fox jumps over the lazy dog, then rests for a while."
    text.write_text(f"{fox}\n\n{fox.upper()}")
    train(tmp_path, "--dataset", text, "--max-iters", 150, "--learning-rate", 1e-2, "--dropout", 0,
          "--lr-decay-iters", 150, "--eval-freq", 150, "--save-freq", 150)  # fmt: skip
    losses = [m["loss"] for m in metrics(tmp_path) if "loss" in m]
    assert losses[0] > 4 and losses[-1] < 0.5


def test_a_ready_split_trains_and_evaluates_to_the_same_loss(tmp_path, capsys):
    (split := tmp_path / "split").mkdir()
    (split / "train.bin").write_bytes(bytes(range(32, 128)) * 9)
    (split / "val.bin").write_bytes(bytes(range(32, 128)) * 3)
    assert train(tmp_path, "--max-iters", 3, "--dataset", split) == 0
    loss = [m["val_loss"] for m in metrics(tmp_path) if "val_loss" in m][-1]
    settings = {"BLOCK_SIZE": 64, "BATCH_SIZE": 2}
    table = evaluation.evaluation_table(
        bdh_mlx.load_model(tmp_path / "full"), str(split), "full", settings
    )
    assert "split, held out side: mode full, 288 bytes" in table
    assert re.search(rf"^whole +287 +100.0% +{loss:.4f} ", table, re.M)
    report = capsys.readouterr().out
    assert f"data: {split}, mode full\n  structure ready split\n  training: 864 bytes\n" in report
    card = export.facts(tmp_path / "full" / "step-000003")[0]
    assert card["training data"] == "864 bytes" and "records" not in report + table


def test_plain_text_promises_no_response(tmp_path, capsys):
    (tmp_path / "d.txt").write_text("\n\n".join(f"{i} paragraph of plain text" for i in range(30)))
    train(tmp_path, "--max-iters", 1, "--dataset", tmp_path / "d.txt")
    train(tmp_path, "--max-iters", 1, "--run-name", "records")
    plain, records = re.findall(r"^note: (.*)", capsys.readouterr().out, re.M)
    assert "plain text" in plain and "response" not in plain
    assert "response" in records


def test_phase_two_starts_from_the_weights_of_phase_one(tmp_path, capsys):
    train(tmp_path, "--training-mode", "system", "--max-iters", 4)
    train(tmp_path, "--training-mode", "instruction", "--max-iters", 1, "--init-from", "system",
          "--learning-rate", 1e-9)  # fmt: skip
    assert "weights of system, a new optimizer" in capsys.readouterr().out
    one, two = arrays(tmp_path, 4, "system"), arrays(tmp_path, 1, "instruction")
    assert all(np.allclose(two[k], one[k], atol=1e-6) for k in one if k.startswith("0."))
    assert two["1.step"] == 1
    shape = r"INIT_FROM system is of another shape: n_layer: there 2, here 3; n_embd: there 16, "
    with pytest.raises(UserError, match=shape + "here 32$"):
        args = ("--n-layer", 3, "--n-embd", 32, "--dropout", 0)
        train(tmp_path, "--run-name", "x", "--init-from", "system", *args)


# ------------------------------------------------------------------------------------------ a Mac


@pytest.fixture
def caffeinate(tmp_path, monkeypatch):
    """A stand-in for the program of a Mac, which writes its arguments and its pid to a file."""
    (folder := tmp_path / "bin").mkdir()
    program, told = folder / "caffeinate", folder / "told"
    program.write_text(f'#!/bin/sh\necho "$@" $$ > {told}\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(sys, "platform", "darwin")
    return told


def test_a_mac_is_kept_awake_while_it_trains_and_its_display_is_not(tmp_path, caffeinate):
    assert train(tmp_path, "--max-iters", 2) == 0
    *arguments, pid = caffeinate.read_text().split()
    assert arguments == ["-i", "-s", "-w", str(os.getpid())]
    with pytest.raises(ProcessLookupError):  # it ended with the run, as a notebook does not
        os.kill(int(pid), 0)


@pytest.mark.parametrize("case", ["--no-keep-awake", "--plan", "linux", "missing"])
def test_nothing_is_kept_awake_without_need(tmp_path, caffeinate, monkeypatch, case):
    if case == "linux":
        monkeypatch.setattr(sys, "platform", "linux")
    if case == "missing":
        (caffeinate.parent / "caffeinate").unlink()
    assert train(tmp_path, "--max-iters", 1, *([case] if case.startswith("--") else [])) == 0
    assert not caffeinate.exists()


GPU_FAULT = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)
FAULTY = """
import os, sys
sys.path.insert(0, {root!r})
import train_mlx
from bdh_lib import cli
train_mlx.redraw = lambda *_: None
print("pid", os.getpid(), file=sys.stderr)
micro_batches, step = train_mlx.micro_batch_indices, {step}

def faulty(s, at, world):
    if at == step and "BDH_RESTARTS" not in os.environ:
        raise RuntimeError({fault!r})
    return micro_batches(s, at, world)

train_mlx.micro_batch_indices = faulty
cli.run("train_mlx")
"""


def test_after_a_gpu_fault_the_process_starts_again_and_ends_in_the_same_bits(tmp_path, straight):
    code = FAULTY.format(root=str(ROOT), step=6, fault=GPU_FAULT)
    args = ["--checkpoint-dir", tmp_path, "--max-iters", 12, "--json", "--refresh-data"]
    command = [sys.executable, "-c", code, *ARGS, *map(str, args)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (warning,) = [line for line in ran.stderr.splitlines() if line.startswith("warning: ")]
    assert GPU_FAULT in warning and "display sleep" in warning
    assert "newest checkpoint: restart 1 of at most 3" in warning
    pids = re.findall(r"^pid (\d+)$", ran.stderr, re.M)
    assert len(pids) == 2 and pids[0] == pids[1]
    assert ran.stderr.count("data: sample") == 2 and "continues" in ran.stderr
    steps = [m["step"] for m in map(json.loads, ran.stdout.splitlines()) if "loss" in m]
    assert steps == [*range(1, 7), *range(6, 13)]  # from the best one, of iteration 5
    assert same(arrays(tmp_path, 12), arrays(straight, 12))


class Restarted(BaseException):
    """Stands for the next process, which execv starts in place of this one."""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Starts the trainer, whose GPU fails at the second update; gives how that ended."""

    def fails(s, step, world):
        seen.append(step)
        if len(seen) == 2:
            raise RuntimeError(GPU_FAULT)
        return micro_batches(s, step, world)

    def start(*args):
        seen.clear()
        arguments = [*ARGS, "--checkpoint-dir", str(tmp_path), *map(str, args)]
        monkeypatch.setattr(sys, "argv", ["train_mlx.py", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *sys.argv, "--refresh-data"])
        with pytest.raises(BaseException) as ending:
            train_mlx.main()
        return ending.value

    def execv(*command):
        raise Restarted(*command)

    seen, micro_batches = [], train_mlx.micro_batch_indices
    monkeypatch.setattr(train_mlx, "micro_batch_indices", fails)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv(macos.RESTARTS, "")
    return start


def test_three_restarts_without_a_newer_checkpoint_are_the_last(faulty):
    for _ in range(3):
        restarted = faulty()
        assert type(restarted) is Restarted
        assert restarted.args == (sys.executable, [sys.executable, "-u", *sys.argv])
    given_up = faulty()
    assert type(given_up) is macos.GpuFault and given_up.exit_code == 1
    assert GPU_FAULT in str(given_up) and "\n" not in str(given_up)


def test_restarts_with_a_newer_checkpoint_between_them_go_on(faulty):
    endings = [faulty("--save-freq", 1) for _ in range(5)]
    assert [type(ending) for ending in endings] == [Restarted] * 5
    assert os.environ[macos.RESTARTS] == "1 [5]"


def test_a_process_that_does_more_than_this_run_is_not_restarted(tmp_path, faulty):
    with pytest.raises(macos.GpuFault):
        train(tmp_path, "--max-iters", 3)


# ------------------------------------------------------------------------------- settings and flags


def test_flags_beat_presets_and_presets_beat_constants():
    s = train_mlx.settings(["--preset", "tiny", "--block-size", "99", "--epochs", "none"])
    assert (s.BLOCK_SIZE, s.LEARNING_RATE, s.SEED) == (99, 2e-3, train_mlx.SEED)
    assert (s.BDH_CONFIG.n_embd, s.BDH_CONFIG.n_head) == (64, 4) and s.EPOCHS is None
    plain = train_mlx.settings([])
    assert plain.BDH_CONFIG == train_mlx.BDH_CONFIG and plain.EPOCHS == train_mlx.EPOCHS


def test_the_presets_are_those_of_the_guide():
    names = ("TRAINING_MODE", "BLOCK_SIZE", "BATCH_SIZE", "MAX_ITERS", "LEARNING_RATE")
    of = {p: train_mlx.settings(["--preset", p]) for p in train_mlx.PRESETS}
    got = {p: tuple(vars(s)[n] for n in names) for p, s in of.items() if "gb" in p}
    assert got == {
        "both-64gb": ("both", 4096, 2, 5000, 5e-5),
        "full-64gb": ("full", 4096, 2, 8000, 3e-5),
        "phase1-64gb": ("system", 4096, 2, 3000, 1e-4),
        "phase2-64gb": ("instruction", 4096, 2, 3000, 5e-5),
        "both-16gb": ("both", 2048, 1, 5000, 5e-5),
    }
    assert of["both-64gb"].EPOCHS == of["full-64gb"].EPOCHS == 3
    assert of["phase2-64gb"].INIT_FROM == "system"
    for s in (s for name, s in of.items() if "gb" in name):  # the rest is as in the official code
        assert bdh_mlx.BDHConfig() == s.BDH_CONFIG
        assert (s.WEIGHT_DECAY, s.BETA2, s.EMA_DECAY, s.SHUFFLE_RECORDS) == (0.1, 0.999, 0, False)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("--training-mode most", "TRAINING_MODE"),
        ("--training-mode a/b", "TRAINING_MODE is 'a/b'"),
        ("--block-size 0", "BLOCK_SIZE is 0"),
        ("--epochs 0", "EPOCHS is 0"),
        ("--max-iters none --epochs none", "MAX_ITERS and EPOCHS are both none.*set one"),
        ("--max-iters none --phases full:1,full:none", "MAX_ITERS and EPOCHS are both none"),
        ("--learning-rate nan", "LEARNING_RATE is nan"),
        ("--weight-decay nan", "WEIGHT_DECAY is nan; it must be a number from 0 to 1,000"),
        ("--seed -1", "SEED is -1"),
        (
            "--min-lr-ratio 2",
            "MIN_LR_RATIO is 2.0; .* above 0 and at most 1",
        ),
        ("--run-name ../x", "RUN_NAME is '../x'"),
        ("--val-fraction 2", "VAL_FRACTION is 2"),
        ("--n-head 3", "n_head is 3"),
        ("--block-size 900000", "BLOCK_SIZE is 900,000"),
        ("--dataset /no/such/file.jsonl", "does not exist"),
        ("--init-from nowhere --run-name x", "INIT_FROM nowhere: there is no such run"),
        ("--dataset ~no-such-user/d.jsonl", "~no-such-user/d.jsonl does not exist"),
        ("--init-from ~no-such-user --run-name x", "INIT_FROM ~no-such-user: there is no such run"),
    ],
)
def test_wrong_values_are_named(tmp_path, args, complaint):
    with pytest.raises(UserError, match=complaint):
        train(tmp_path, *args.split())


@pytest.mark.parametrize("args", ["--blok-size 2", "--preset huge", "--training-mode"])
def test_wrong_flags_exit_with_2(args):
    with pytest.raises(SystemExit) as error:
        train_mlx.settings(args.split())
    assert error.value.code == 2


def test_every_setting_has_a_rule_and_a_reason():
    assert set(flags.setting_names(train_mlx)) == set(train_mlx.RULES)
    reasons = flags.comments(train_mlx)
    assert all(all(reasons[name]) for name in train_mlx.RULES)


@pytest.mark.parametrize(
    "kind",
    ["--ema-decay 0.9 --grad-accum 2", "--byte-noise 0.2 --dropout-v 0.1"],
)
def test_a_recipe_resumes_in_the_same_bits(tmp_path, kind):
    for folder, ends in (("once", [6]), ("twice", [4, 6])):
        for end in ends:
            assert train(tmp_path / folder, *kind.split(), "--max-iters", end) == 0
    assert same(arrays(tmp_path / "twice", 6), arrays(tmp_path / "once", 6))


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
    assert "best.json is not what was written" in capsys.readouterr().out
    assert json.loads(best.read_text())["step"] == 4
    aside = tmp_path / "full" / "damaged-best.json-0"
    assert aside.is_symlink() or aside.is_dir() or aside.read_text()[:4] in ("mine", "[[[[")
