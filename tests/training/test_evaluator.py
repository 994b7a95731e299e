"""The share of active neurons, and dead ones."""

import mlx.core as mx
import numpy as np
import pytest
from helpers import metrics, train

import bdh_mlx
from bdh_lib.compute.layer import ln
from bdh_lib.compute.rope import rotate
from bdh_lib.generation import trace
from bdh_lib.training.evaluator import neuron_activity


@pytest.mark.parametrize("T", [40, 300, 999])
def test_activity_is_the_share_of_neurons_not_zero_in_each_layer(T):
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(3, 8, 0.5, 2, 4))
    val = np.random.default_rng(0).integers(0, 256, 600, dtype=np.uint8)
    counts = np.zeros((2, 3))
    for begin in range(0, 600, T):  # each block at once, by the equations of the model's docstring
        v = ln(model.embed(mx.array(val[None, begin : begin + T].astype(np.int32))))
        for i in range(3):
            x = mx.maximum(v @ model.encoder, 0)  # (H, T, N)
            a = bdh_mlx.attention_quadratic(rotate(x[:, None]), v)[:, 0]
            y = mx.maximum(ln(a) @ model.encoder_v, 0) * x
            counts[:, i] += [mx.sum(x > 0).item(), mx.sum(y > 0).item()]
            v = model.quadratic_layer(v)
    shares = counts / (600 * 32)
    found = neuron_activity(model, val, T)
    np.testing.assert_allclose([found["active_x"], found["active_y"]], shares, atol=2e-4)
    assert np.all(shares[0] > shares[1]) and np.all(shares > 0)


def test_neurons_that_no_byte_excites_in_any_layer_are_dead():
    mx.random.seed(0)  # with which some neurons are dead
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(3, 8, 0.5, 2, 4))
    val = np.frombuffer(b"dead?", np.uint8)
    ever = False
    last = False
    fired = False
    for begin in (0, 3):  # blocks of T
        for layer in trace.layers(model, val[begin : begin + 3].tobytes()):
            last = np.array(mx.any(layer.x > 0, 1))
            ever, fired = ever | last, fired | np.array(mx.any(layer.y > 0, 1))
    assert 0 < np.sum(~ever) < min(np.sum(~last), np.sum(~fired))
    assert neuron_activity(model, val, 3)["dead"] == np.sum(~ever)


def test_activity_takes_no_more_memory_for_more_bytes():
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(2, 64, 0.5, 2, 32))
    val = np.arange(4096, dtype=np.uint8)
    peaks = []
    for n in (512, 4096):
        mx.reset_peak_memory()
        neuron_activity(model, val[:n], 256)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.2 * peaks[0]


def test_activity_is_logged_at_each_evaluation_and_summed_up(tmp_path, capsys):
    train(tmp_path, "--max-iters", 5)
    evaluated = [m for m in metrics(tmp_path) if "val_loss" in m]
    assert len(evaluated) == 2  # before the first iteration, and at the last
    assert all(len(m["active_x"]) == len(m["active_y"]) == 2 for m in evaluated)
    x = " ".join(f"{share:.1%}" for share in evaluated[-1]["active_x"])
    assert f"active_x: {x}\n" in capsys.readouterr().out
