"""--selfcheck passes on a sound machine, and each of its checks can fail."""

import re

import mlx.core as mx
import pytest

import bdh_mlx
import train_mlx
from bdh_lib.training import checkpoints, selfcheck


def lines(capsys):
    return {line[:34].strip(): line[34:] for line in capsys.readouterr().out.splitlines()}


def test_it_passes_here(capsys):
    assert train_mlx.main(["--selfcheck"]) == 0
    output = lines(capsys)
    results = {name: output[name].split()[0] for name in selfcheck.CHECKS}
    assert results.pop("GPU = CPU") == ("skipped" if selfcheck.devices() is None else "ok")
    assert set(results.values()) == {"ok"}


def one_more_array(monkeypatch):
    before = bdh_mlx.BDH.__init__

    def init(self, config):
        before(self, config)
        self.freqs = mx.zeros(3)

    monkeypatch.setattr(bdh_mlx.BDH, "__init__", init)


def reads_itself(monkeypatch):
    monkeypatch.setattr(
        bdh_mlx, "attention_quadratic", lambda q, v: mx.tril(q @ q.swapaxes(-1, -2)) @ v
    )


def forgets_what_it_read(monkeypatch):
    read = bdh_mlx.BDH.read
    monkeypatch.setattr(bdh_mlx.BDH, "read", lambda self, idx, state: read(self, idx))


def loads_something_else(monkeypatch):
    load = bdh_mlx.load_model

    def other(path):
        model = load(path)
        model.lm_head = model.lm_head * 1.001
        return model

    monkeypatch.setattr(bdh_mlx, "load_model", other)


def loses_the_optimizer(monkeypatch):
    load = checkpoints.load

    def without(run, step, model, optimizer):
        state = optimizer.state
        load(run, step, model, optimizer)
        optimizer.state = state

    monkeypatch.setattr(checkpoints, "load", without)


def computes_otherwise_the_second_time(monkeypatch):
    monkeypatch.setattr(selfcheck, "devices", lambda: (mx.cpu, mx.cpu))
    call, factors = bdh_mlx.BDH.__call__, iter([1, 1.1])

    def other(self, *batch):
        logits, loss = call(self, *batch)
        return logits, loss * next(factors)

    monkeypatch.setattr(bdh_mlx.BDH, "__call__", other)


@pytest.mark.parametrize(
    ("check", "breaks"),
    [
        ("exactly five trainable arrays", one_more_array),
        ("in chunks = the definition", reads_itself),
        ("read byte by byte = at once", forgets_what_it_read),
        ("saved and loaded: the same loss", loads_something_else),
        ("stopped and resumed = straight", loses_the_optimizer),
        ("GPU = CPU", computes_otherwise_the_second_time),
    ],
)
def test_each_check_can_fail(monkeypatch, capsys, check, breaks):
    monkeypatch.setattr(selfcheck, "CHECKS", {check: selfcheck.CHECKS[check]})
    breaks(monkeypatch)
    assert train_mlx.main(["--selfcheck"]) == 1
    assert re.match(r"FAILED  [\d.]+e[-+]\d+ ", lines(capsys)[check])  # measured, not an error


def test_a_check_that_breaks_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "CHECKS", {"divides": lambda _: 1 / 0})
    assert selfcheck.run_checks(train_mlx.compile_steps) == 1
    assert "FAILED  ZeroDivisionError" in capsys.readouterr().out
