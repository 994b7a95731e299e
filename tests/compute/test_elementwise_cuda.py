"""CUDA's fused kernels against plain operations, on a CPU, as test_step_cuda.py runs its own."""

import ctypes
import itertools
from dataclasses import replace

import mlx.core as mx
import pytest
from cuda_on_cpu import TYPES, Kernel, compiled, needs_compiler
from helpers import (
    CONFIG,
    loss_and_gradients,
    masked_quadratic,
    max_abs_error,
    max_relative_error,
    random_bytes,
    random_model,
)

from bdh_lib.compute import elementwise, elementwise_cuda, layer
from bdh_lib.compute.layer import Compute
from bdh_lib.training import selfcheck
from bdh_lib.training.selfcheck import RATE, plain_mask, run_elementwise

pytestmark = needs_compiler
KEY = mx.random.key(5)
LIMITS = [0, elementwise_cuda.dropout_mask(KEY, RATE, ())[1]]
KERNELS = {
    elementwise_cuda.ENCODE: [None],
    elementwise_cuda.GATE: LIMITS,
    elementwise_cuda.GATE_GRADIENTS: LIMITS,
    elementwise_cuda.ENCODE_GRADIENT: [None],
}
ROUNDING = {mx.float32: 1e-6, mx.bfloat16: 2**-8}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """All kernels in both types, for pieces of two and of eight neurons."""
    source = ""
    for T, V, (kernel, limits) in itertools.product(TYPES.values(), (2, 8), KERNELS.items()):
        source += "".join(entry(kernel, T, V, limit) for limit in limits)
    source += (
        'extern "C" void philox(uint32_t counter, const uint32_t* key, uint32_t* words) '
        "{ memcpy(words, bdh::Random(counter, key).words, 16); }\n"
    )
    return compiled("elementwise_cuda.cu", source, tmp_path_factory.mktemp("kernels"))


def entry(kernel, T, V, limit):
    """A C function: arrays of pointers and of shapes, blocks in x and y, and threads."""
    name, inputs, outputs, call = kernel
    kinds = dict.fromkeys((*inputs, *outputs), T)
    kinds |= dict.fromkeys(("begin", "increments", "key"), "uint32_t")
    lines = [f"auto {a} = ({kinds[a]}*)at[{i}];" for i, a in enumerate((*inputs, *outputs))]
    lines += [f"auto {a}_shape = shapes[{i}];" for i, a in enumerate(inputs)]
    symbol = "_".join([name, str(V), *([] if limit is None else [str(limit)]), T])
    return (
        f'extern "C" void {symbol}(void** at, int (*shapes)[5], int P, int Q, int threads) {{ '
        f"using T = {T}; constexpr int V = {V}, LIMIT = {limit or 0}; {' '.join(lines)} "
        f"launch({{unsigned(P), unsigned(Q)}}, threads, [&] {{ {call} }}); }}\n"
    )


@pytest.fixture
def fused(library, monkeypatch):
    """The layer takes the kernels."""
    monkeypatch.setattr(elementwise_cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        elementwise_cuda, "cuda_kernel", lambda _, kernel: Kernel(library, *kernel[:2])
    )


@pytest.mark.parametrize(("H", "B", "T", "N"), [(2, 3, 5, 16), (1, 2, 7, 6), (3, 2, 40, 40)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("position", [0, 10**6])
@pytest.mark.parametrize("rate", [0, RATE])
def test_each_kernel_is_that_of_the_plain_operations(fused, H, B, T, N, dtype, position, rate):
    shape = (H, B * T, N)
    h, g, dy, dq = (mx.random.normal(shape, dtype, key=mx.random.key(i)) for i in range(4))
    h[:, 0] = 0
    g[:, -1] = -0.0
    mask = elementwise_cuda.dropout_mask(KEY, rate, shape)
    assert (mask is None) == (rate == 0)

    found = run_elementwise(elementwise_cuda, mask, position, B, (h, g, dy, dq))
    exact = (array.astype(mx.float32) for array in (h, g, dy, dq))
    expected = run_elementwise(elementwise, mask and plain_mask(mask, shape), position, B, exact)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == shape
        assert max_abs_error(got, want) < 1.5 * ROUNDING[dtype] * mx.max(mx.abs(want)).item()


def test_philox_is_that_of_its_authors(library):
    """The vector of Random123's kat_vectors that a counter of this form reaches: all zeros."""
    words = (ctypes.c_uint32 * 4)()
    library.philox(ctypes.c_uint32(0), (ctypes.c_uint32 * 4)(), words)
    assert list(words) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_the_check_of_the_trainer_compares_them(fused, monkeypatch):
    monkeypatch.setattr(selfcheck, "LAYER", CONFIG)
    measured, allowed = selfcheck.check_fused_kernels("float32")
    assert 0 < measured <= allowed
    gradient = elementwise_cuda.encode_gradient
    monkeypatch.setattr(elementwise_cuda, "encode_gradient", lambda *args: gradient(*args) * 1.001)
    measured, allowed = selfcheck.check_fused_kernels("float32")
    assert measured > allowed


def test_nan_goes_on_and_zero_is_no_sign(fused):
    """Where x is 0 there is no gradient, and -0 elsewhere does not say that it is."""
    h = mx.array([[[mx.nan, 1.0, -1.0, 0.0, 1.0, 1.0]]])
    g, dy, dq = (mx.full(h.shape, value) for value in (1.0, -1.0, 1.0))
    g[0, 0, 4:] = mx.array([-1.0, mx.nan])
    x, q = elementwise_cuda.encode(h, 0, 1)
    assert mx.isnan(q).tolist() == [[[True] * 2 + [False] * 4]]
    y, saved = elementwise_cuda.gate(x, g, None)
    assert mx.isnan(y).tolist() == [[[True] + [False] * 4 + [True]]]
    _, dg, residuals = elementwise_cuda.gate_gradients(x, saved, dy, None)
    dh = elementwise_cuda.encode_gradient(residuals, dq, 0, 1)
    assert dg[0, 0, 1:5].tolist() == [-1, 0, 0, 0] and mx.isnan(dg[0, 0, 0]).item()
    assert dh[0, 0, 1:5].tolist() == [0, 0, 0, 1] and mx.isnan(dh[0, 0, 0]).item()


def test_dropout_is_drawn_at_its_rate_from_key_and_place(fused):
    shape = (4, 64, 128)
    masks = [plain_mask(elementwise_cuda.dropout_mask(key, RATE, shape), shape)[0]
             for key in (*mx.random.split(KEY, 3), mx.random.split(KEY, 3)[0])]  # fmt: skip
    size = masks[0].size
    kept = 1 - RATE
    deviation = (kept * RATE / size) ** 0.5
    for mask in masks:
        assert abs(mx.mean(mask).item() - kept) < 4 * deviation
    assert mx.array_equal(masks[0], masks[3]).item()
    both = RATE**2 + kept**2  # of two that are independent, the share that is equal
    pairs = [(masks[0], masks[1]), (masks[1], masks[2])]
    flat = masks[0].reshape(-1)
    pairs += [(flat[:-by], flat[by:]) for by in (1, 2, 8, 128)]
    for one, other in pairs:
        assert abs(mx.mean(one == other).item() - both) < 5 * deviation
    ones = mx.ones(shape)
    y = elementwise_cuda.gate(ones, ones, elementwise_cuda.dropout_mask(KEY, RATE, shape))[0]
    assert abs(mx.max(y).item() - 1 / kept) < 1e-5 and abs(mx.mean(y).item() - 1) < 0.02


@pytest.mark.parametrize(("keep", "rows"), [(0, 30), (1, 1000), (2, 30), (4, 30)])
def test_gradients_of_a_layer_equal_the_quadratic_form(fused, keep, rows):
    model = random_model()
    batch = (random_bytes(2, 40), random_bytes(2, 40, seed=2))
    slow = loss_and_gradients(model, lambda idx: model.quadratic(idx)[0], batch)
    model.compute = Compute(chunk=8, segment_rows=rows, saved_activations=keep)
    fast = loss_and_gradients(model, lambda idx: model(idx)[0], batch)
    assert max_relative_error(fast, slow) < 2e-5


@pytest.mark.parametrize("keep", [0, 4])
def test_dropout_has_one_mask_in_forward_and_backward(fused, keep):
    compute = Compute(chunk=8, segment_rows=40, saved_activations=keep)
    (B, T) = (2, 30)
    model = random_model()
    H, D, N = model.encoder.shape
    v = layer.ln(mx.random.normal((B, T, D), key=KEY))
    weights = [model.encoder, model.encoder_v, model.decoder.reshape(H, N, D)]
    parts = layer.segments(B, T, compute)
    masks = []
    for key, (begin, end) in zip(mx.random.split(KEY, len(parts)), parts, strict=True):
        shape = (H, B * (end - begin), N)
        kept, _, scale = plain_mask(elementwise_cuda.dropout_mask(key, RATE, shape), shape)
        masks.append((scale * kept).reshape(H, B, -1, N))
    mask = mx.concatenate(masks, 2)

    quadratic = masked_quadratic(mask)

    def fast(v, *weights):
        return (layer.layer(v, weights, compute, KEY, RATE) ** 3).sum()

    results = [mx.value_and_grad(f, (0, 1, 2, 3))(v, *weights) for f in (fast, quadratic)]
    (value, gradients), (expected, wanted) = results
    for got, want in zip((value, *gradients), (expected, *wanted), strict=True):
        assert max_abs_error(got, want) < 2e-5 * mx.max(mx.abs(want)).item()


def test_bfloat16_is_no_further_from_float32_than_with_plain_operations(fused, monkeypatch):
    """Over three models, since a neuron near 0 that fires in one precision alone counts most."""
    config = replace(CONFIG, n_embd=32, mlp_internal_dim_multiplier=32)
    errors = []
    for seed in range(3):
        model = random_model(config, seed, 1)
        batch = [random_bytes(1, 96, seed + i) for i in (3, 6)]
        exact = loss_and_gradients(model, lambda idx, model=model: model.quadratic(idx)[0], batch)
        model.compute = Compute(mx.bfloat16, chunk=16, segment_rows=48, saved_activations=seed)
        for fits in (True, False):
            monkeypatch.setattr(elementwise_cuda, "is_available", lambda fits=fits: fits)
            got = loss_and_gradients(model, lambda idx, model=model: model(idx)[0], batch)
            norms = [mx.linalg.norm(got[k] - exact[k]) / mx.linalg.norm(exact[k]) for k in exact]
            errors.append(sum(norms).item())
    assert 1e-4 < sum(errors[::2]) <= 1.1 * sum(errors[1::2])
