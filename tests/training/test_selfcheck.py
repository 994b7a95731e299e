"""--selfcheck passes on a sound machine, and each of its checks can fail."""

import re

import mlx.core as mx
import pytest

import bdh_mlx
import train_mlx
from bdh_lib.compute import elementwise_cuda, layer
from bdh_lib.training import checkpoints, selfcheck


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A layer as trained takes seconds; tests/test_readme.py runs all at its full size."""
    config = bdh_mlx.BDHConfig(n_layer=1, n_embd=32, n_head=2, mlp_internal_dim_multiplier=16)
    monkeypatch.setattr(selfcheck, "LAYER", config)
    monkeypatch.setattr(selfcheck, "LAYER_BYTES", 300)
    monkeypatch.setattr(selfcheck, "MAX_ROWS", 64)


def lines(capsys):
    return {line[:34].strip(): line[34:] for line in capsys.readouterr().out.splitlines()}


def test_it_passes_here(capsys):
    assert train_mlx.main(["--selfcheck"]) == 0
    output = lines(capsys)
    results = {name: output[name].split()[0] for name in selfcheck.CHECKS}
    assert results.pop("GPU = CPU") == ("skipped" if selfcheck.devices() is None else "ok")
    assert results.pop("fused kernels = plain operations") == (
        "ok" if elementwise_cuda.is_available() else "skipped"
    )
    assert set(results.values()) == {"ok"}


def test_it_checks_the_precision_that_training_takes(capsys):
    assert train_mlx.main(["--selfcheck", "--dtype", "bfloat16"]) == 0
    output = lines(capsys)
    for name, bound in zip(selfcheck.AS_TRAINED, ("2e-02", "1e-01"), strict=True):
        measured = float(output[name].split()[1])
        assert output[name].endswith(f"(at most {bound})") and measured > 1e-3, name


def test_products_are_not_compared_with_the_library_that_computes_them():
    measured, allowed = selfcheck.check_products("float32")
    assert 0 < measured < allowed  # an exact product of 64 bits has other last bits


def test_the_cpu_is_the_arbiter_of_metal(monkeypatch):
    devices = []
    stream = mx.stream
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(layer, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: "the GPU")
    monkeypatch.setattr(mx, "stream", lambda device: (devices.append(device), stream(mx.cpu))[1])
    selfcheck.check_layer("float32")
    assert devices == ["the GPU", mx.cpu]


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("fails", [*selfcheck.AS_TRAINED, "GPU = CPU"])
def test_a_fault_as_trained_names_the_way_on(monkeypatch, capsys, on_gpu, fails):
    monkeypatch.setattr(selfcheck, "CHECKS", {fails: lambda *_: (float("nan"), 1)})
    monkeypatch.setattr(selfcheck.memory, "on_gpu", lambda: on_gpu)
    assert selfcheck.run_checks() == 1
    printed = "--dtype float32, or update macOS" in capsys.readouterr().out
    assert printed == (on_gpu and fails in selfcheck.AS_TRAINED)


@pytest.mark.parametrize(
    ("release", "chip", "warned"),
    [
        ("26.0", "Apple M5", True),
        ("26.1.3", "Apple M5 Max", True),
        ("16.1", "Apple M5", True),
        ("26.2", "Apple M5", False),
        ("26.10", "Apple M5", False),
        ("26.1", "Apple M4 Max", False),
        ("15.1", "Apple M1", False),
    ],
)
def test_a_mac_is_told_and_warned_of(monkeypatch, capsys, release, chip, warned):
    monkeypatch.setattr(selfcheck, "CHECKS", {})
    monkeypatch.setattr(selfcheck.sys, "platform", "darwin")
    monkeypatch.setattr(selfcheck.platform, "mac_ver", lambda: (release, ("", "", ""), "arm64"))
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": chip})
    assert selfcheck.run_checks() == 0
    output = capsys.readouterr().out
    assert f"macOS {release}, {chip}\n" in output and ("update macOS" in output) == warned


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

    def without(run, step, state):
        before = state.optimizer.state
        load(run, step, state)
        state.optimizer.state = before

    monkeypatch.setattr(checkpoints, "load", without)


def computes_otherwise_the_second_time(monkeypatch):
    monkeypatch.setattr(selfcheck, "devices", lambda: (mx.cpu, mx.cpu))
    call = bdh_mlx.BDH.__call__
    factors = iter([1, 1.1])

    def other(self, *batch):
        logits, loss = call(self, *batch)
        return logits, loss * next(factors)

    monkeypatch.setattr(bdh_mlx.BDH, "__call__", other)


def leaves_a_tile_out(monkeypatch):
    matmul = mx.matmul

    def other(a, b):
        out = matmul(a, b)
        out[-1, -8:, -8:] = 0
        return out

    monkeypatch.setattr(mx, "matmul", other)


def forgets_a_head_of_the_last_chunk(monkeypatch):
    states = layer._chunk_states

    def other(S, k, v, reverse=False):
        prefix, total = states(S, k, v, reverse)
        return prefix, total * (mx.arange(len(total)) < len(total) - 1)[:, None, None, None]

    monkeypatch.setattr(layer, "_chunk_states", other)


@pytest.mark.parametrize(
    ("check", "breaks"),
    [
        ("exactly five trainable arrays", one_more_array),
        ("in chunks = the definition", reads_itself),
        ("read byte by byte = at once", forgets_what_it_read),
        ("saved and loaded: the same loss", loads_something_else),
        ("stopped and resumed = straight", loses_the_optimizer),
        ("GPU = CPU", computes_otherwise_the_second_time),
        ("products as trained = exact ones", leaves_a_tile_out),
        ("layer as trained = the definition", forgets_a_head_of_the_last_chunk),
    ],
)
def test_each_check_can_fail(monkeypatch, capsys, check, breaks):
    monkeypatch.setattr(selfcheck, "CHECKS", {check: selfcheck.CHECKS[check]})
    breaks(monkeypatch)
    assert train_mlx.main(["--selfcheck"]) == 1
    assert re.match(r"FAILED  [\d.]+e[-+]\d+ ", lines(capsys)[check])  # measured, not an error


def test_a_check_that_breaks_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "CHECKS", {"divides": lambda *_: 1 / 0})
    assert selfcheck.run_checks() == 1
    assert "FAILED  ZeroDivisionError" in capsys.readouterr().out
