"""--tune finds the fastest way to compute, auto takes it, and a run stays with its own."""

import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import cycle

import numpy as np
import pytest
from helpers import ARGS, arrays, equal_arrays, train

import train_mlx
from bdh_lib.compute import memory
from bdh_lib.errors import UserError
from bdh_lib.training import memory_plan, tuning


def shape(*args):
    return train_mlx.read_settings([*ARGS, "--block-size", "1024", "--n-layer", "1", *args])


class Stub:
    """Steps that take what `cost` says, for as many calls as there is time for."""

    def __init__(self, cost, calls=10**6):
        self.cost = cost
        self.calls = calls
        self.counts = Counter()

    def has_time(self):
        return self.counts.total() < self.calls

    def seconds(self, compute, B, T):
        self.counts[compute] += 1
        return self.cost(compute)


def found(cost, calls=10**6):
    s = shape()
    start = memory.compute_for(s.BDH_CONFIG, "fast", "float32")
    updates = Stub(cost, calls)
    best, tried = tuning.search(s, start, updates)
    assert set(tried) == set(updates.counts)
    return start, best, tried, updates


def test_the_search_walks_to_the_fastest():
    def cost(c):  # least for chunk 32, segments of 256 and mode balanced
        far = abs(c.chunk.bit_length() - 6) + abs(c.segment_rows.bit_length() - 9)
        return 1 + far / 10 + 0.1 * (c.saved_activations != 1) + (c.chunk == 256)

    start, best, tried, updates = found(cost)
    assert (best.chunk, best.segment_rows, best.saved_activations) == (32, 256, 1)
    keys = [tuning.equivalence_key(shape(), c) for c in tried]
    assert len(keys) == len(set(keys))  # nothing is tried again
    assert updates.counts[start] == 2 + tuning.FINAL_ROUNDS  # which the others are to beat
    assert updates.counts[best] > updates.counts[replace(start, chunk=256)] == 1  # the slow one


def test_noise_and_a_lack_of_time_leave_what_auto_takes():
    noise = cycle([1, 1.05, 1.02, 0.97, 1.01])
    start, best, tried, _ = found(lambda c: next(noise) * (0.99 if c.chunk == 64 else 1))
    assert best == start and len(tried) > 4
    for calls in (0, 1, 2):
        start, best, tried, updates = found(lambda c: 1, calls)
        assert best == start and updates.counts.total() == calls
    start, best, *_ = found(lambda c: c.segment_rows, calls=6)  # each was timed once
    assert best == start
    start, best, *_ = found(lambda c: c.segment_rows, calls=10)  # what there was time for counts
    assert best == replace(start, segment_rows=512)


@pytest.mark.parametrize(("share", "is_kept"), [(1, False), (0.6, True)])
def test_a_busy_machine_keeps_no_noise_and_finds_a_large_gain(share, is_kept):
    for seed in range(4):
        noise = np.random.default_rng(seed)
        cost = partial(lambda r, c: (share if c.chunk == 64 else 1) * r.lognormal(0, 0.1), noise)
        start, best, *_ = found(cost)
        assert (best != start) == is_kept, seed


def test_a_machine_that_drifts_is_told_from_a_way_that_is_slow():
    seconds = iter(1.02**i for i in range(1000))  # it becomes slower all the time

    def cost(c):
        return next(seconds) * (0.5 if c.chunk == 64 else 1)

    assert found(cost)[1].chunk == 64


def test_nothing_larger_than_the_memory_or_than_macos_bears(monkeypatch):
    s = shape("--batch-size", "8")
    start = memory.compute_for(s.BDH_CONFIG, "fast", "float32")
    near = tuning.neighbours(s, start)
    assert max(c.segment_rows for c in near) == 2048 and max(c.chunk for c in near) == 256
    peak = memory_plan.step_peak(s, start)
    assert max(memory_plan.step_peak(s, c) for c in near) > peak
    monkeypatch.setattr(memory, "available_bytes", lambda: peak)
    near = tuning.neighbours(s, start)
    assert near and max(memory_plan.step_peak(s, c) for c in near) <= peak
    monkeypatch.setattr(memory, "available_bytes", lambda: 1e12)
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    monkeypatch.setattr(memory, "on_metal", lambda: True)
    near = tuning.neighbours(s, memory.compute_for(s.BDH_CONFIG, "fast", "float32"))
    assert (
        max(c.segment_rows for c in near) == memory.METAL_ROWS and max(c.chunk for c in near) == 128
    )


def test_what_takes_too_long_is_not_begun(monkeypatch):
    s = shape()
    monkeypatch.setattr(tuning, "SECONDS", 0)
    with pytest.raises(UserError, match="too long"):
        tuning.tune(s)


# ------------------------------------------------------------------------------- the kept choice

PLANTED = {"mode": "balanced", "chunk": 16, "rows": 32}


def plant(folder, **values):
    """Put a choice in place of the one that --tune keeps for the shape of ARGS."""
    s = train_mlx.read_settings([*ARGS, "--checkpoint-dir", str(folder)])
    file = tuning.choice_file(s)
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(PLANTED | {"conditions": tuning.conditions(s)} | values))
    return file


def test_tune_keeps_a_choice_that_a_new_run_takes(tmp_path, capsys):
    assert train(tmp_path, "--tune") == 0
    out = capsys.readouterr().out
    assert [f.name for f in tmp_path.iterdir()] == [".tune"]  # no data, no run
    assert out.count("auto by itself") == 1 and out.count("kept") == 2
    file = plant(tmp_path)
    assert [*(tmp_path / ".tune").iterdir()] == [file]  # the same shape: the same file
    assert train(tmp_path, "--max-iters", 1) == 0
    assert "memory: balanced by --tune (chunk 16, segment 32), float32" in capsys.readouterr().out
    config = json.loads((tmp_path / "full/step-000001/config.json").read_text())
    assert config["compute"].items() > PLANTED.items()  # and groups of heads
    assert train(tmp_path, "--max-iters", 1, "--run-name", "b", "--memory-mode", "fast") == 0
    assert "memory: fast, float32" in capsys.readouterr().out
    assert train(tmp_path, "--max-iters", 1, "--run-name", "c", "--block-size", 32) == 0
    assert "memory: fast, float32" in capsys.readouterr().out  # another shape


def test_a_run_goes_on_as_it_began_to_the_bit(tmp_path, capsys):
    for folder in ("one", "other"):
        assert train(tmp_path / folder, "--max-iters", 2 if folder == "other" else 4) == 0
    plant(tmp_path / "other")
    capsys.readouterr()
    assert train(tmp_path / "other", "--max-iters", 4) == 0
    assert "memory: fast as before, float32" in capsys.readouterr().out
    assert equal_arrays(arrays(tmp_path / "one", 4), arrays(tmp_path / "other", 4))
    plant(tmp_path / "third")
    assert train(tmp_path / "third", "--max-iters", 2) == 0
    tuning.choice_file(
        train_mlx.read_settings([*ARGS, "--checkpoint-dir", str(tmp_path / "third")])
    ).unlink()
    capsys.readouterr()
    assert train(tmp_path / "third", "--max-iters", 4) == 0
    assert "memory: balanced as before (chunk 16, segment 32)" in capsys.readouterr().out
    # it matters
    assert not equal_arrays(arrays(tmp_path / "one", 4), arrays(tmp_path / "third", 4))


@pytest.mark.parametrize("mode", ["auto", "small"])
def test_a_run_goes_on_with_its_groups_of_heads_on_other_cores(mode, tmp_path, monkeypatch):
    flags = ("--n-head", 2, "--memory-mode", mode)
    for cores, folder, steps in ((2, "one", 4), (2, "other", 2), (1, "other", 4)):
        if hasattr(os, "sched_getaffinity"):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert train(tmp_path / folder, *flags, "--max-iters", steps) == 0
    assert equal_arrays(arrays(tmp_path / "one", 4), arrays(tmp_path / "other", 4))


@pytest.mark.parametrize("left_out", [0, 3, "2", True, None])
def test_groups_that_do_not_divide_the_heads_are_left_out(left_out):
    s = train_mlx.read_settings([*ARGS, "--n-head", "4"])
    choice = {"mode": "fast", "chunk": 64, "rows": 128, "groups": left_out}
    of_mode = memory.compute_for(s.BDH_CONFIG, "fast", s.DTYPE).groups
    groups = tuning.select(s, "as before", choice).compute.groups
    assert type(groups) is int and groups == of_mode


def test_a_choice_that_does_not_fit_any_more_is_left_with_a_word(capsys, monkeypatch):
    s = train_mlx.read_settings(ARGS)
    large = {"mode": "fast", "chunk": 64, "rows": 128}
    assert tuning.select(s, "as before", large).label == "fast as before (chunk 64, segment 128)"
    room = memory_plan.step_peak(s, memory.compute_for(s.BDH_CONFIG, "small", "float32"))
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    mode, compute, peak = memory_plan.select_mode(s)
    assert tuning.select(s, "as before", large) == (mode, "", compute, peak)
    assert "memory: fast as before (chunk 64, segment 128) needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", {"mode": []}, {"chunk": 0}, {"rows": "32"}, {"conditions": {}}],
    ids=str,
)
def test_a_damaged_file_is_ignored_with_one_warning(damage, tmp_path, capsys):
    file = plant(tmp_path, **(damage if isinstance(damage, dict) else {}))
    if isinstance(damage, str):
        file.write_text(damage)
    s = train_mlx.read_settings([*ARGS, "--checkpoint-dir", str(tmp_path)])
    assert tuning.select(s, *tuning.saved_choice(s)).label == "fast"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: ") and str(file) in err


def test_only_a_long_run_is_told_of_it(monkeypatch):
    monkeypatch.setattr(memory_plan, "on_gpu", lambda: True)  # where the default model is not slow

    def hint(preset, n_steps, by="", *args):
        return tuning.hint(train_mlx.read_settings(["--preset", preset, *args]), by, n_steps)

    assert "--tune" in hint("both-64gb", 1300)
    assert not hint("tiny", 4500)
    assert not hint("both-64gb", 1300, "by --tune")
    assert not hint("both-64gb", 1300, "", "--memory-mode", "fast")
    monkeypatch.setattr(memory_plan, "on_gpu", lambda: False)
    assert not hint("both-64gb", 1300)  # an update takes minutes: --tune would refuse it


def test_tune_is_refused_where_it_has_no_effect(tmp_path):
    for flags, word in ((["--plan"], "--plan"), (["--memory-mode", "small"], "MEMORY_MODE")):
        with pytest.raises(UserError, match=word):
            train(tmp_path, "--tune", *flags)


@pytest.mark.parametrize("command", ["--tune", "--plan"])
def test_a_folder_that_cannot_be_written_is_told_before_the_search(tmp_path, command):
    (tmp_path / "file").touch()  # where a folder should be: root may write anywhere else
    with pytest.raises(UserError, match="cannot be written: Not a directory; see CHECKPOINT_DIR"):
        train(tmp_path / "file" / "runs", command)
