"""CUDA's kernels against the plain step, on a CPU: a C++ compiler and a little of CUDA imitated."""

import ctypes
import itertools
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_cpu import TYPES, Kernel, bits, compiled, needs_compiler

from bdh_lib.compute import step_cuda, step_mlx
from bdh_mlx import BDH, BDHConfig

pytestmark = needs_compiler
DIMS = (16, 32, 96, 256)
NAMES = ("RECALL", "RECALL_ONE", "FIRE", "FIRE_ONE", "FOLD", "QUANTIZE")
KERNELS = [getattr(step_cuda, k) for k in NAMES]
GROUPS = {
    "recall": step_cuda.PAIRS,
    "recall_one": step_cuda.PAIRS_ONE,
    "fire": step_cuda.NEURONS,
    "fire_one": step_cuda.NEURONS_ONE,
    "fold": 0,
    "quantize": 0,
}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """All kernels for DIMS in both types, called as step_cuda.step has MLX call them."""
    source = ""
    for D, (dtype, T) in itertools.product(DIMS, TYPES.items()):
        for kernel in KERNELS:  # FOLD is for bfloat16
            source += entry(kernel, D, dtype, T)
    return compiled("step_cuda.cu", source, tmp_path_factory.mktemp("cuda"))


def entry(kernel, D, dtype, T):
    """A C function: arrays of pointers and of shapes, blocks in x and y, and threads."""
    name, inputs, outputs, call = kernel
    Q, words = ("float", "float") if dtype == mx.float32 else ("int8_t", "uint64_t")
    kinds = dict.fromkeys((*inputs, *outputs), T)
    floats = ["v", "scales", "parts", "v_out", "previous_v", "S_sum"]
    floats += ["S"] if name in ("quantize", "fold") else []
    kinds |= {"S": words, "S_int8": "uint64_t"}
    kinds |= dict.fromkeys(floats, "float") | {"count": "int32_t"}
    kinds |= dict.fromkeys(("begin", "increments", "done"), "uint32_t")
    whole = 1 if name in ("fold", "quantize") else D
    W = step_cuda.THREADS // whole * whole // 32
    lines = [f"auto {a} = ({kinds[a]}*)at[{i}];" for i, a in enumerate((*inputs, *outputs))]
    lines += [f"auto {a}_shape = shapes[{i}];" for i, a in enumerate(inputs)]
    called = f"{name}_{D}_{T}(void** at, int (*shapes)[5], int P, int HB, int threads)"
    return (
        f'extern "C" void {called} {{ '
        f"using T = {T}; using Q = {Q}; constexpr int D = {D}, G = {GROUPS[name]}, "
        f"K = {step_cuda.BUFFER_BYTES}, W = {W}; {' '.join(lines)} "
        f"launch({{unsigned(P), unsigned(HB)}}, threads, [&] {{ {call} }}); }}\n"
    )


@pytest.fixture
def kernels(library, monkeypatch):
    monkeypatch.setattr(mx, "compile", lambda step: step)
    monkeypatch.setattr(step_mlx, "BUFFER_BYTES", step_cuda.BUFFER_BYTES)
    monkeypatch.setattr(step_cuda, "cuda_kernel", lambda _, kernel: Kernel(library, *kernel[:2]))


@pytest.mark.parametrize(
    ("D", "B", "dtype", "count"),
    [
        *((16, 3, mx.float32, 0), (32, 1, mx.float32, 37), (32, 3, mx.bfloat16, 61)),
        *((16, 3, mx.bfloat16, 61), (256, 1, mx.bfloat16, 61)),
        *((96, 1, mx.bfloat16, 61), (96, 3, mx.float32, 61)),
        *((256, 3, mx.float32, 37), (256, 3, mx.bfloat16, 61)),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_plain_step(kernels, D, B, dtype, count):
    same_as_the_plain_step(a_model(D), B, dtype, count)


@pytest.mark.parametrize(("B", "blocks"), [(1, 256), (3, 256), (1, 4)])
def test_several_blocks_a_head_and_several_turns_of_each_leave_nothing_out(
    kernels, B, blocks, monkeypatch
):
    monkeypatch.setattr(step_cuda, "BLOCKS", blocks)
    same_as_the_plain_step(a_model(16, 160), B, mx.float32, 5)


def test_rows_share_the_synapses_of_one(kernels):
    same_as_the_plain_step(a_model(32), 3, mx.bfloat16, 61, rows=1)


def test_copies_that_land_at_once_replace_nothing_in_use(kernels, library, monkeypatch):
    monkeypatch.setattr(ctypes.c_bool.in_dll(library, "at_once"), "value", True)
    same_as_the_plain_step(a_model(32), 3, mx.bfloat16, 61)


def test_more_parts_than_a_block_adds_at_once_are_added(kernels):
    same_as_the_plain_step(a_model(96, 6, heads=24), 1, mx.float32, 0)


def same_as_the_plain_step(model, B, dtype, count, rows=None):
    """Compare three bytes after `count` others, then a fold, and a byte more.

    Before the second byte another state goes on from the same buffer.
    """
    model.compute = replace(model.compute, dtype=dtype)
    (H, D, N) = model.encoder.shape
    at = 10**6
    S = tuple(mx.random.normal((H, rows or B, N, D), key=mx.random.key(7)) for _ in range(2))
    ways = step_cuda.DecodeStep(model), step_mlx.DecodeStep(model)
    buffers = [way.new_buffer(at, S, B) for way in ways]
    fill(*buffers, count)
    buffers = [buffer._replace(count=count) for buffer in buffers]
    near = 2e-4 if dtype == mx.float32 else 4e-2

    def step(buffers, i):
        idx = mx.array([[(65 + i + b) % 256] for b in range(B)])
        if i == 1:
            ways[0].step(idx + 1, buffers[0])
        (v, own), (expected, plain) = (
            way.step(idx, t) for way, t in zip(ways, buffers, strict=True)
        )
        assert mx.max(mx.abs(v - expected)) < near and mx.mean(mx.abs(v - expected)) < near / 4
        for pairs in zip(own.keys_and_values(), plain.keys_and_values(), strict=True):
            for found, wanted in zip(*pairs, strict=True):
                assert mx.max(mx.abs(found - wanted)) < near * mx.max(mx.abs(wanted))
        return own, plain

    for i in range(3):
        buffers = step(buffers, i)
    given = [[np.array(a, np.float64) for a in pair] for pair in buffers[0].keys_and_values()]
    exact = [np.array(s, np.float64) + keys @ v for s, (keys, v) in zip(S, given, strict=True)]
    at += count + 3
    if dtype == mx.float32:
        after = tuple(mx.array(s.astype(np.float32)) for s in exact)
        buffer = ways[0].new_buffer(at, after, B)
    else:
        after, buffer = buffers[0].flush(S, at)
        for found, wanted, (low, scales) in zip(after, exact, buffer.base_synapses, strict=True):
            assert np.abs(np.array(found) - wanted).max() < 1e-5 * np.abs(wanted).max()
            off = mx.abs(low.view(mx.int8).astype(mx.float32) * scales[..., None] - found)
            assert mx.all(off <= 0.5001 * scales[..., None]).item()
    step((buffer, ways[1].new_buffer(at, after, B)), 3)


def fill(own, plain, count):
    """`count` bytes of random keys, half of them 0, and values, in both tails."""
    H, B, pairs, K, _ = own.keys[0].shape
    there = mx.arange(K)[:, None] < count
    for i, (keys, values) in enumerate(zip(own.keys, own.values, strict=True)):
        some = mx.random.normal(keys.shape, key=mx.random.key(i)) * 2
        some = mx.where(there & (some > 0), some, 0).astype(keys.dtype)
        v = mx.random.normal(values.shape, key=mx.random.key(9 + i))
        v = mx.where(there, v, 0).astype(values.dtype)
        mx.eval(some, v)
        for to, given in ((keys, some), (values, v)):
            np.array(bits(to), copy=False)[...] = np.array(bits(given))
        plain.keys[i][...] = some.swapaxes(2, 3).reshape(H, B, K, 2 * pairs)
        plain.values[i][...] = v.astype(mx.float32)
    own.shared_length[0] = count


def a_model(D, multiplier=3, heads=2):
    """Two heads of 3/2 D neurons are not enough for a block."""
    mx.random.seed(1)
    config = BDHConfig(n_layer=2, n_embd=D, n_head=heads, mlp_internal_dim_multiplier=multiplier)
    model = BDH(config)
    model.update({k: 8 * a for k, a in model.parameters().items() if isinstance(a, mx.array)})
    return model


@pytest.mark.parametrize("neuron", [-1, -2])
def test_a_nan_writes_nowhere_but_where_it_is(kernels, neuron):
    """Lanes that have no neuron must not write the rows of the next head."""
    model = a_model(32)
    encoder = np.array(model.encoder)
    encoder[0, :, neuron] = np.nan
    model.encoder = mx.array(encoder)
    way = step_cuda.DecodeStep(model)
    v, buffer = way.step(mx.array([[65]]), way.new_buffer(3, (), 1))
    assert mx.all(mx.isnan(v)).item()
    keys = np.array(buffer.keys_and_values()[0][0])
    assert np.isnan(keys[0, 0, -2:]).all() and np.isfinite(keys[0, 0, :-2]).all()
    assert np.isfinite(keys[1]).all()


def test_synapses_as_int8_are_off_by_half_a_step_and_keep_what_is_not_finite(kernels):
    S = mx.random.normal((2, 3, 10, 32)) * mx.repeat(mx.array([0.0, 1e-3, 1, 1e3, 1]), 2)[:, None]
    low, scales = step_cuda.quantize(S)
    off = mx.abs(low.view(mx.int8).astype(mx.float32) * scales[..., None] - S)
    assert mx.all(off <= 0.5001 * scales[..., None]).item()
    assert mx.allclose(scales, mx.max(mx.abs(S), -1) / 127).item()
    S[1, 2, 3, 4], S[0, 1, 9, 31] = math.nan, math.inf
    spoilt = np.isnan(np.array(step_cuda.quantize(S)[1]))
    assert np.argwhere(spoilt).tolist() == [[0, 1, 9], [1, 2, 3]]
