"""The layer with its own gradient equals the quadratic form, whatever it keeps or cuts."""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import (
    CONFIG,
    loss_and_gradients,
    masked_quadratic,
    max_abs_error,
    max_relative_error,
    random_bytes,
    random_model,
)

import bdh_mlx
from bdh_lib.compute import layer, memory
from bdh_lib.compute.layer import Compute
from bdh_lib.compute.rope import rotate

H, N = CONFIG.n_head, CONFIG.neurons_per_head


@pytest.mark.parametrize("T", [1, 31, 129, 300])
@pytest.mark.parametrize("chunk", [8, 400])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (100, 2), (10_000, 1)])
@pytest.mark.parametrize("keep", [0, 1, 4])
def test_values_and_gradients_equal_the_quadratic_form(T, chunk, rows, groups, keep):
    model = random_model()
    batch = (random_bytes(2, T), random_bytes(2, T, seed=2))
    slow = loss_and_gradients(model, lambda idx: model.quadratic(idx)[0], batch)
    model.compute = Compute(chunk=chunk, segment_rows=rows, saved_activations=keep, groups=groups)
    fast = loss_and_gradients(model, lambda idx: model(idx)[0], batch)
    assert max_relative_error(fast, slow) < 2e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("keep", "groups"), [(0, 1), (4, 1), (4, 2)])
def test_dropout_has_one_mask_in_forward_and_recomputation(keep, groups, compiled):
    """Against a quadratic layer that is given the same mask."""
    B, T = 2, 45
    compute = Compute(chunk=8, segment_rows=40, saved_activations=keep, groups=groups)
    key = mx.random.key(3)
    rate = 0.3
    model = random_model()
    v = layer.ln(mx.random.normal((B, T, 16), key=key))
    weights = [model.encoder, model.encoder_v, model.decoder.reshape(H, N, -1)]
    parts = layer.segments(B, T, compute)

    def group_mask(key):
        masks = []
        for key_i, (begin, end) in zip(mx.random.split(key, len(parts)), parts, strict=True):
            mask = layer.dropout_mask(key_i, rate, (H // groups, B * (end - begin), N))
            factor = layer.dropout_scale(mask, mx.float32)
            masks.append(factor.reshape(H // groups, B, end - begin, N))
        return mx.concatenate(masks, 2)

    keys = [key] if groups == 1 else mx.random.split(key, groups)
    mask = mx.concatenate([group_mask(key) for key in keys])

    quadratic = masked_quadratic(mask)

    def fast(v, *weights):
        return (layer.layer(v, weights, compute, key, rate) ** 3).sum()

    gradient = mx.value_and_grad(fast, argnums=(0, 1, 2, 3))
    value, gradients = (mx.compile(gradient) if compiled else gradient)(v, *weights)
    expected, wanted = mx.value_and_grad(quadratic, argnums=(0, 1, 2, 3))(v, *weights)
    for got, want in zip((value, *gradients), (expected, *wanted), strict=True):
        assert max_abs_error(got, want) < 2e-5 * mx.max(mx.abs(want)).item()


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_dropout_silences_at_its_rate_and_keeps_the_mean(rate):
    factors = [
        layer.dropout_scale(layer.dropout_mask(k, rate, (4, 64, 65)), mx.float32)
        for k in mx.random.split(mx.random.key(0), 100)
    ]
    silenced = mx.mean(mx.stack(factors) == 0).item()
    assert abs(silenced - rate) < 0.002  # 1.7 million draws: 0.0004 is one standard deviation
    assert abs(mx.mean(mx.stack(factors)).item() - 1) < 0.02 / (1 - rate)


def test_bfloat16_is_no_further_from_float32_than_the_quadratic_form_in_bfloat16():
    model = random_model(scale=1)
    batch = (random_bytes(1, 96), random_bytes(1, 96, seed=2))
    exact = loss_and_gradients(model, lambda idx: model.quadratic(idx)[0], batch)

    def rounded(idx):
        """The quadratic form with every product in bfloat16, norms and sums in float32."""
        Dx, Dy, E = (
            w.astype(mx.bfloat16)
            for w in (model.encoder, model.encoder_v, model.decoder.reshape(H, N, -1))
        )
        v = layer.ln(model.embed(idx))
        for _ in range(CONFIG.n_layer):
            vb = v.astype(mx.bfloat16)
            x = nn.relu(vb[None] @ Dx[:, None])
            a = bdh_mlx.attention_quadratic(rotate(x), vb).astype(mx.float32)
            y = nn.relu(layer.ln(a).astype(mx.bfloat16) @ Dy[:, None]) * x
            v = layer.add_and_norm(v, (y @ E[:, None]).astype(mx.float32).sum(0))
        return v @ model.lm_head

    def error(got):
        return sum(mx.linalg.norm(got[k] - exact[k]) / mx.linalg.norm(exact[k]) for k in exact)

    yardstick = error(loss_and_gradients(model, rounded, batch)).item()
    for chunk, keep in ((16, 0), (16, 4), (96, 4)):
        model.compute = Compute(mx.bfloat16, chunk=chunk, segment_rows=48, saved_activations=keep)
        fast = loss_and_gradients(model, lambda idx: model(idx)[0], batch)
        assert all(g.dtype == mx.float32 for g in fast.values())
        assert 1e-4 < error(fast).item() <= 1.1 * yardstick


def test_the_rotation_undoes_itself_and_depends_on_the_position_alone():
    x = mx.random.normal((2, 1, 40, 8), key=mx.random.key(0))
    turned = rotate(x, 5)
    assert max_abs_error(rotate(turned, 5, -1), x) < 1e-5
    assert max_abs_error(turned[:, :, 10:], rotate(x[:, :, 10:], 15)) < 1e-5
    rope = mx.fast.rope(x, 8, traditional=True, base=65536.0, scale=1.0, offset=5)
    assert max_abs_error(turned, rope) < 1e-4


def test_segments_cover_the_block_in_whole_chunks():
    for B, T, rows, chunk in ((1, 100, 30, 8), (3, 64, 1, 16), (2, 7, 100, 8), (2, 200, 64, 16)):
        parts = layer.segments(B, T, Compute(chunk=chunk, segment_rows=rows))
        assert parts[0][0] == 0 and parts[-1][1] == T
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        assert all((end - begin) % chunk == 0 for begin, end in parts[:-1])
        assert all(B * (end - begin) <= max(rows, B * chunk) for begin, end in parts)


def test_a_very_long_block_has_few_segments_since_compiling_takes_the_cube_of_them():
    for B, T in ((1, 65_536), (4, 1_000_001)):
        parts = layer.segments(B, T, Compute(chunk=128, segment_rows=1024, max_segment_rows=2**18))
        assert len(parts) <= layer.MAX_SEGMENTS + 1  # what no chunk divides
        assert (parts[0][0], parts[-1][1]) == (0, T)
        parts = layer.segments(B, T, Compute(chunk=128, segment_rows=1024, max_segment_rows=1536))
        assert max(B * (end - begin) for begin, end in parts) <= 1536


@pytest.mark.parametrize(
    ("H", "cores", "gpu", "limited", "groups"),
    [
        (4, 1, False, True, 1),
        (4, 2, False, True, 2),
        (4, 3, False, True, 2),
        (3, 2, False, True, 1),
        (6, 64, False, True, 6),
        (4, 2, True, True, 1),
        (4, 2, False, False, 1),
    ],
)
def test_groups_are_as_many_as_cores_and_divide_the_heads(
    monkeypatch, H, cores, gpu, limited, groups
):
    monkeypatch.setattr(layer, "on_gpu", lambda: gpu)
    monkeypatch.setattr(layer.blas, "is_limited", limited)
    affinity = set(range(cores))
    monkeypatch.setattr(layer.os, "sched_getaffinity", lambda _: affinity, raising=False)
    assert layer.default_groups(H) == groups


def test_the_mask_of_the_residual_has_a_key_that_none_of_three_segments_has(monkeypatch):
    drawn = []
    draw = layer.dropout_mask

    def dropout_mask(key, rate, shape):
        drawn.append(key)
        return draw(key, rate, shape)

    for module in (layer, layer.elementwise):
        monkeypatch.setattr(module, "dropout_mask", dropout_mask)
    v, Dx, E = mx.ones((1, 48, 4)), mx.ones((3, 4, 8)), mx.ones((3, 8, 4))
    layer.layer(v, (Dx, Dx, E), Compute(chunk=16, segment_rows=16), mx.random.key(1), 0.5, 0.5)
    mx.eval(drawn)
    assert len(drawn) == 4 and len({tuple(key.tolist()) for key in drawn}) == 4


@pytest.mark.parametrize("gpu", [False, True])
def test_no_segment_is_larger_than_an_array_may_be(gpu, monkeypatch):
    monkeypatch.setattr(memory, "on_gpu", lambda: gpu)
    config = bdh_mlx.BDHConfig(n_embd=1024)
    for mode in memory.MODES:
        compute = memory.compute_for(config, mode, "float32")
        row = config.n_head * config.neurons_per_head * 4
        for B in (1, 4):
            one_chunk = B * compute.chunk  # of each row: a segment is never shorter
            for begin, end in layer.segments(B, 1_000_000, compute):
                assert B * (end - begin) <= max(memory.MAX_ARRAY_BYTES // row, one_chunk)
    B = 2**31 // (config.n_head * config.neurons_per_head * compute.chunk)
    estimates = [memory.estimate_step_bytes(config, b, 10**4, compute) for b in (B - 1, B)]
    assert estimates[0] < math.inf and (estimates[1] == math.inf) == gpu


@pytest.mark.parametrize("name", memory.MODES)
def test_the_planner_estimates_the_peak(name):
    """Within 20 % on a shape of some hundred MB; docs/log.md has the table for a GPU."""
    config = bdh_mlx.BDHConfig(2, 64, 0.0, 4, 32)
    compute = memory.compute_for(config, name, "float32")
    model = random_model(config, scale=1)
    batch = (random_bytes(1, 2048), random_bytes(1, 2048))
    model.compute = compute
    gradient = nn.value_and_grad(model, lambda *batch: model(*batch)[1])
    mx.eval(model.parameters(), batch)
    mx.eval(gradient(*batch))
    mx.reset_peak_memory()
    mx.eval(gradient(*batch))
    estimate = memory.estimate_step_bytes(config, 1, 2048, compute)
    assert 0.8 < estimate / mx.get_peak_memory() < 1.2
