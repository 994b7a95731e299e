"""A state is what the bytes read have left: any way to read them, to keep it, to go on is equal."""

import mlx.core as mx
import numpy as np
import pytest
from test_model import SMALL, furthest, random_bytes, random_model

import bdh_mlx
import state
from bdh_mlx import UserError
from fast_layer import rotate
from state import PARTS, TAIL, State, fold, pick, prefill, stack


@pytest.fixture(params=["numpy", "mlx"])
def step(request, monkeypatch):
    """The path a CPU takes, and the one a GPU takes, here on a CPU."""
    monkeypatch.setattr(state, "_on_gpu", lambda: request.param == "mlx")


def close(a, b):
    return furthest(a, b) < 2e-5 * mx.max(mx.abs(b)).item()


def read_by(model, idx, cuts, state=None):
    out = []
    for piece in mx.split(idx, cuts, 1):
        logits, state = model.read(piece, state)
        out.append(logits)
    return mx.concatenate(out, 1), state


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "cuts", [[1, 2, 3], [40], list(range(1, 200)), [50, 51, 52, 150], [190, 195]]
)
def test_however_a_text_is_cut_the_logits_are_the_definition_s(step, cuts, sparse, monkeypatch):
    if sparse:
        monkeypatch.setattr(state, "GATHER", 1)
        monkeypatch.setattr(state, "GATHER_DY", 1)
    else:
        monkeypatch.setattr(state, "GATHER", 0)
        monkeypatch.setattr(state, "GATHER_DY", 0)
    model, idx = random_model(), random_bytes(2, 200)
    assert close(read_by(model, idx, cuts)[0], model.quadratic(idx)[0])
