"""What a run does, prints and leaves."""

import json
import math
import re
import shlex
import sys
from itertools import count
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT, arrays, equal_arrays, metrics, train

import generate
import train_mlx
from bdh_lib import runs
from bdh_lib.errors import Diverged, UserError
from bdh_lib.generation import arguments, export
from bdh_lib.settings import Settings
from bdh_lib.training import batches, checkpoints, evaluator, runlog, summary
from bdh_lib.training import meter as meters
from bdh_lib.training import step as training_step
from bdh_lib.training.batches import get_batch


def test_a_gpu_that_computes_ahead_trains_and_logs_the_same(
    uninterrupted_run, tmp_path, monkeypatch
):
    for module in (training_step, meters):
        monkeypatch.setattr(module, "on_cuda", lambda: True)
    assert train(tmp_path, "--max-iters", 12) == 0
    assert equal_arrays(arrays(uninterrupted_run, 12), arrays(tmp_path, 12))
    losses = [[(m["step"], m["loss"], m["skipped"]) for m in metrics(run) if "loss" in m]
              for run in (uninterrupted_run, tmp_path)]  # fmt: skip
    assert losses[0] == losses[1] and losses[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_updates_that_are_not_finite_at_the_end_of_a_run_end_it(
    ahead, tmp_path, monkeypatch, capsys
):
    real = train_mlx.sum_gradients
    steps = count()

    def sum_gradients(*args):
        loss, gradients = real(*args)
        return (mx.array(math.nan) if next(steps) >= 3 else loss), gradients

    monkeypatch.setattr(train_mlx, "sum_gradients", sum_gradients)
    for module in (training_step, meters):
        monkeypatch.setattr(module, "on_cuda", lambda: ahead)
    flags = ["--max-iters", 6, "--log-freq", 100, "--eval-freq", 100, "--max-consecutive-skips", 3]
    with pytest.raises(Diverged, match="no finite update in 3 iterations") as raised:
        train(tmp_path, *flags)
    out, err = capsys.readouterr()
    assert (out + err).count("update skipped") == 3 and raised.value.exit_code == 1


def test_skipped_updates_are_counted_over_resumes(tmp_path, monkeypatch):
    real = train_mlx.sum_gradients
    steps = count(1)

    def sum_gradients(*args):
        loss, gradients = real(*args)
        return (mx.array(math.nan) if next(steps) in (1, 2, 4) else loss), gradients

    monkeypatch.setattr(train_mlx, "sum_gradients", sum_gradients)
    for end in (3, 5):
        assert train(tmp_path, "--max-iters", end, "--log-freq", 1, "--eval-freq", 100) == 0
    assert [m["skipped"] for m in metrics(tmp_path) if "skipped" in m] == [2, 3]


def test_samples_that_a_signal_cuts_are_not_logged(tmp_path, monkeypatch):
    real = train_mlx.write_samples

    def write_samples(s, step, model, val, stop):
        samples = real(s, step, model, val, stop)
        stop.requested = 15
        return samples

    monkeypatch.setattr(train_mlx, "write_samples", write_samples)
    flags = ["--max-iters", 4, "--eval-freq", 2, "--sample-bytes", 4]
    assert train(tmp_path, *flags) == 128 + 15
    assert not any("samples" in m for m in metrics(tmp_path))
    monkeypatch.undo()
    assert train(tmp_path, *flags) == 0
    assert [m["step"] for m in metrics(tmp_path) if "samples" in m] == [4]


def test_beta2_weighs_the_squared_gradients(tmp_path):
    train(tmp_path, "--max-iters", 1, "--beta2", 0.75)
    state = arrays(tmp_path, 1)
    gradient = state["1.encoder.m"] / 0.1  # of the first update, from a mean that began at 0
    np.testing.assert_allclose(state["1.encoder.v"], 0.25 * gradient**2, rtol=1e-4)


def test_the_batches_of_a_step_are_made_one_by_one(monkeypatch):
    made = []
    monkeypatch.setattr(batches, "get_batch", lambda split, i, *_: made.append(i) or i)
    s = Settings(BATCH_SIZE=1, BLOCK_SIZE=8, GRAD_ACCUM=10**6, PROCESSES=1, LOSS_ON="all")
    _, iterator = batches.step_batches(None, 0, s, SimpleNamespace(rank=0, size=1))
    assert made == [] and next(iterator) == 0 and made == [0]


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
    monkeypatch.setattr(train_mlx.memory, "available_bytes", lambda: 1000)
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


@pytest.fixture
def questions(tmp_path):
    """A file of records without system texts."""
    asked = [{"question": f"q {i}" * 9, "answer": f"a {i}" * 9} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return tmp_path / "d.jsonl"


def test_samples_of_data_without_system_texts_ask_for_none(questions, tmp_path):
    train(tmp_path, "--dataset", questions, "--max-iters", 1, "--sample-bytes", 1)
    (output,) = [m["samples"] for m in metrics(tmp_path) if "samples" in m]
    assert output and not any("### System" in text for text in output)


def test_the_command_at_the_end_samples_the_run(questions, tmp_path, capsys):
    """It has a prompt that fits the data, and leaves the window of a text to generate.py."""
    train(tmp_path, "--dataset", questions, "--max-iters", 1, "--sample-bytes", 0)
    command = shlex.split(re.search("sample_it: (.*)", capsys.readouterr().out)[1])
    assert command[1] == "generate.py"
    args = generate.parse_args(command[2:])
    assert args.prompt == r"### Instruction:\nAnalyze the ethical implications"
    assert args.window == arguments.AUTO and args.model == tmp_path / "full"


def test_the_command_at_the_end_names_the_script_where_it_is_not_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = SimpleNamespace(TRAINING_MODE="full")
    command = shlex.split(summary.sample_command(s, tmp_path, {"text"}))
    assert command[:2] == [sys.executable, str(ROOT / "generate.py")]


def test_what_a_run_leaves(uninterrupted_run):
    run = uninterrupted_run / "full"
    best = json.loads((run / "best.json").read_text())
    evaluations = {m["step"]: m["val_loss"] for m in metrics(uninterrupted_run) if "val_loss" in m}
    assert list(evaluations) == [0, 5, 10, 12]
    assert best["monitored_loss"] == min(v for k, v in evaluations.items() if k)
    assert {f"step-{n:06d}" for n in runs.steps(run)} >= {best["checkpoint"], "step-000012"}
    config = json.loads((run / "step-000012" / "config.json").read_text())
    assert config["step"] == 12 and config["settings"]["BLOCK_SIZE"] == 64
    assert sorted(f.name for f in run.iterdir() if f.name.startswith(".")) == [".lock", ".saved"]
    assert runs.find_weights(run) == run / best["checkpoint"] / "model.safetensors"


def test_a_checkpoint_is_written_before_the_evaluation_of_its_step(tmp_path, monkeypatch):
    def dies(*args):
        raise MemoryError

    train(tmp_path, "--max-iters", 3, "--eval-freq", 4)
    monkeypatch.setattr(evaluator, "evaluate", dies)
    with pytest.raises(MemoryError):
        train(tmp_path, "--max-iters", 9, "--eval-freq", 4)
    assert runs.steps(tmp_path / "full")[-1] == 4


def test_only_the_last_and_the_best_checkpoints_stay(tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 1.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(evaluator, "evaluate", lambda *args: (next(losses), {}))
    train(tmp_path, "--max-iters", 12, "--eval-freq", 2, "--save-freq", 2, "--keep-checkpoints", 2)
    assert runs.steps(tmp_path / "full") == [4, 10, 12]
    assert runs.read_best(tmp_path / "full")["step"] == 4


@pytest.mark.parametrize("minutes", [10, "none"])
def test_a_checkpoint_is_written_when_minutes_have_passed(
    tmp_path, uninterrupted_run, monkeypatch, minutes
):
    saved = []
    save = checkpoints.save
    now = [0.0]

    def four_minutes(*args):
        now[0] += 240
        return get_batch(*args)

    monkeypatch.setattr(batches, "get_batch", four_minutes)
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        checkpoints, "save", lambda run, step, *a: saved.append(step) or save(run, step, *a)
    )
    rare = ("--eval-freq", 100, "--save-freq", 8, "--keep-checkpoints", 2)
    train(tmp_path, "--max-iters", 12, "--save-minutes", minutes, *rare)
    assert saved == ([8, 12] if minutes == "none" else [3, 6, 8, 11, 12])
    assert runs.steps(tmp_path / "full") == saved[-2:]
    assert equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))


def test_evaluating_and_sampling_do_not_disturb_training(tmp_path, uninterrupted_run):
    train(tmp_path, "--max-iters", 12, "--eval-freq", 1, "--sample-bytes", 5, "--log-freq", 5)
    assert equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))


def test_dropout_differs_between_steps_and_is_off_in_evaluation(tmp_path):
    """At learning rate ~0 on one batch only dropout moves the loss; without it, nothing does."""
    spread = {}
    for dropout in (0, 0.5):
        folder = tmp_path / str(dropout)
        (split := tmp_path / "one").mkdir(exist_ok=True)
        for side, byte in (("train", b"a"), ("val", b"b")):
            (split / f"{side}.bin").write_bytes(byte * 65)
        train(folder, "--max-iters", 6, "--dropout", dropout, "--learning-rate", 1e-12,
              "--dataset", split, "--eval-freq", 1)  # fmt: skip
        logged = metrics(folder)
        spread[dropout] = np.ptp([m["loss"] for m in logged if "loss" in m])
        assert np.ptp([m["val_loss"] for m in logged if "val_loss" in m]) < 1e-5
    assert spread[0] < 1e-5 < 1e-3 < spread[0.5]


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
    report = capsys.readouterr().out
    assert generate.main([str(tmp_path / "full"), "--evaluate", str(split)]) == 0
    table = capsys.readouterr().out
    assert "split, held out side: mode full, 288 bytes" in table
    assert re.search(rf"^whole +287 +100.0% +{loss:.4f} ", table, re.M)
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


@pytest.mark.parametrize("has_work", [False, True])
def test_a_failure_after_a_signal_is_told_once_there_is_work(has_work, tmp_path, monkeypatch):
    def fail(s, stop, world, json_to):
        stop.received = 15
        stop.has_work_to_save = has_work
        raise RuntimeError("a failure")

    monkeypatch.setattr(train_mlx, "train", fail)
    if has_work:
        with pytest.raises(RuntimeError, match="a failure"):
            train(tmp_path, "--max-iters", 1)
    else:
        assert train(tmp_path, "--max-iters", 1) == 128 + 15
