"""Runs that stop early, since validation no longer improves."""

import json

import pytest
from helpers import arrays, equal_arrays, metrics, train

from bdh_lib import runs
from bdh_lib.training import evaluator

OVER = ["--eval-freq", "2", "--save-freq", "5", "--max-iters", "40"]


@pytest.fixture
def worse_after_6(monkeypatch):
    """Validation that is best after update 6, as a function of the training alone."""
    step = iter(())

    def evaluate(*_, **__):
        return next(step), {}

    def begin(first):
        nonlocal step
        step = iter([abs(6 - i) + 1.0 for i in range(first, 99, 2)])

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    return begin


def test_a_run_out_of_patience_stops_early_and_says_where_its_best_is(
    tmp_path, worse_after_6, capsys
):
    worse_after_6(0)
    assert train(tmp_path, *OVER, "--patience", 3) == 0
    out = capsys.readouterr().out
    assert "iterations: 12\n" in out and "best_step: 6\n" in out and "ended: early" in out
    assert runs.steps(tmp_path / "full")[-1] == 12  # saved, though no SAVE_FREQ is due
    assert runs.read_best(tmp_path / "full")["step"] == 6

    assert train(tmp_path, *OVER, "--patience", 3) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "its best is of 6; to continue, raise PATIENCE (3)" in out
    worse_after_6(14)
    assert train(tmp_path, *OVER, "--patience", 4) == 0
    assert metrics(tmp_path)[-1]["step"] == 14


def test_a_resumed_run_keeps_the_count_and_ends_in_the_same_bits(tmp_path, worse_after_6):
    worse_after_6(0)
    train(tmp_path / "a", *OVER, "--patience", 3)
    worse_after_6(0)
    train(tmp_path / "b", *OVER, "--patience", 3, "--max-iters", 10)
    worse_after_6(12)
    train(tmp_path / "b", *OVER, "--patience", 3)
    for folder in ("a", "b"):
        steps = [m["step"] for m in metrics(tmp_path / folder) if "val_loss" in m]
        assert steps == [0, 2, 4, 6, 8, 10, 12]
    assert equal_arrays(arrays(tmp_path / "a", 12), arrays(tmp_path / "b", 12))


def test_without_patience_a_run_goes_to_its_end(tmp_path, worse_after_6):
    worse_after_6(0)
    train(tmp_path, *OVER, "--patience", "none", "--max-iters", 20)
    assert json.loads((tmp_path / "full" / "best.json").read_text())["step"] == 6
    assert metrics(tmp_path)[-1]["step"] == 20
