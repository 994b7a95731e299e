"""The averages and the speed of a run, and steps that are read late."""

import math

import mlx.core as mx
import pytest

from bdh_lib.training import meter as meters
from bdh_lib.training import runlog


def test_an_update_that_is_read_late_counts_as_its_own(monkeypatch, capsys):
    monkeypatch.setattr(meters, "on_cuda", lambda: True)
    meter = meters.Meter(0, 3, 1000)
    for step, loss in enumerate((1.0, math.nan, 3.0), 1):
        meter.start_step()
        meter.end_step(step, mx.array(loss), mx.array(1.0), has_targets=True, read_now=False)
    assert meter.consecutive_skips == 1 and meter.losses == [1.0]
    assert "iter      2 | update skipped" in capsys.readouterr().out
    meter.close()
    assert meter.consecutive_skips == 0 and meter.pop_averages(3)["loss"] == 2.0
    assert meter.pop_averages(3) == {}


def test_a_line_without_a_timed_step_has_no_speed():
    meter = meters.Meter(0, 2, 1000)
    speeds = []
    for step in (1, 2):
        meter.start_step()
        meter.end_step(step, mx.array(1.0), mx.array(1.0), has_targets=True, read_now=True)
        line = {"step": step, "lr": 1e-3, "grad_norm": 1.0} | meter.pop_averages(step)
        speeds.append("bytes/s" in runlog.format_line(line))
    assert speeds == [False, True]  # the first step compiles


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_speed_of_a_gpu_that_computes_ahead_is_that_of_the_gpu(every, monkeypatch):
    """A GPU takes 10 s for an update, which the host submits in 1 s."""
    clock, done = [0.0], [0.0]

    class Loss:
        def __init__(self):
            self.at = done[0] = max(clock[0], done[0]) + 10

        def __float__(self):
            clock[0] = max(clock[0], self.at)
            return 1.0

    monkeypatch.setattr(meters, "on_cuda", lambda: True)
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    meter = meters.Meter(0, 21, 100)
    speeds = []
    for step in range(1, 22):
        meter.start_step()
        clock[0] += 1
        meter.end_step(step, Loss(), 1.0, has_targets=True, read_now=step == 1 or step % every == 0)
        if step > 1 and step % every == 0:
            speeds.append(meter.pop_averages(step)["bytes_per_s"])
    host = 1 / every  # seconds an update for which the GPU has nothing to do
    assert speeds[1:] == pytest.approx([100 / (10 + host)] * len(speeds[1:]))


def test_the_first_update_is_not_timed(monkeypatch):
    meter = meters.Meter(0, 5, 1000)
    clock = iter([0.0, 100.0, 102.0])  # a start, a start and its end; the first end reads no clock
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    for step in (1, 2):
        meter.start_step()
        meter.end_step(step, 1.0, 1.0, has_targets=True, read_now=True)
    assert meter.timed_bytes / meter.seconds == 500
