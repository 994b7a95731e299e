"""CUDA's kernels against the plain step, on a CPU: a C++ compiler and a little of CUDA imitated."""

import ctypes
import itertools
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT

import cuda_byte
import state
from bdh_mlx import BDH, BDHConfig

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not COMPILER, reason="no g++, or not the fibers of Linux"
)
TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16"}
DIMS = (16, 32, 96, 256)
GUARD = 1 << 20  # bytes around an array that no kernel may touch


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """All kernels for DIMS in both types, called as cuda_byte.step has MLX call them."""
    source = '#include "cuda_on_cpu.h"\n' + f'#include "{ROOT / "cuda_byte.cu"}"\n'
    for D, (dtype, T) in itertools.product(DIMS, TYPES.items()):
        for kernel in (cuda_byte.RECALL, cuda_byte.RECALL_ONE, cuda_byte.FIRE):
            source += entry(kernel, D, dtype, T)
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "kernels.cpp").write_text(source)
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-I", ROOT / "tests", "-o"]
    subprocess.run([*command, folder / "kernels.so", folder / "kernels.cpp"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def entry(kernel, D, dtype, T):
    """A C function: arrays of pointers and of shapes, blocks in x and y, and threads."""
    name, inputs, outputs, call = kernel
    kinds = dict.fromkeys((*inputs, *outputs), T)
    kinds |= dict.fromkeys(("v", "S", "parts", "a", "out", "before"), "float")
    kinds |= {"turns": "uint32_t", "count": "int32_t", "done": "uint32_t"}
    lines = [f"auto {a} = ({kinds[a]}*)at[{i}];" for i, a in enumerate((*inputs, *outputs))]
    lines += [f"auto {a}_shape = shapes[{i}];" for i, a in enumerate(inputs)]
    called = f"{name}_{D}_{T}(void** at, int (*shapes)[4], int P, int HB, int threads)"
    return (
        f'extern "C" void {called} {{ '
        f"using T = {T}; constexpr int D = {D}, W = {cuda_byte.THREADS // D * D // 32}, "
        f"G = {cuda_byte.G}; {' '.join(lines)} "
        f"launch({{unsigned(P), unsigned(HB)}}, threads, [&] {{ {call} }}); }}\n"
    )


class Kernel:
    """What mx.fast.cuda_kernel gives: NumPy in between, and inputs that are written in place."""

    def __init__(self, library, name):
        self.library, self.name = library, name

    def __call__(self, inputs, output_shapes, output_dtypes, template, grid, threadgroup):
        constants = dict(template)
        outputs = [mx.zeros(s, t) + 0 for s, t in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(inputs, outputs)
        views = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a, copy=False)
                 for a in (*inputs, *outputs)]  # fmt: skip
        assert all(view.flags.c_contiguous for view in views)
        there = [on_16(view) for view in views]
        at = (ctypes.c_void_p * len(views))(*(array.ctypes.data for array, _ in there))
        shapes = (ctypes.c_int * 4 * len(inputs))(*(tuple(a.shape) for a in inputs))
        function = self.library[f"{self.name}_{constants['D']}_{TYPES[constants['T']]}"]
        threads = threadgroup[0]
        assert constants["W"] * 32 == threads and grid[0] % threads == 0
        function(at, shapes, grid[0] // threads, grid[1], threads)
        for view, (array, around) in zip(views, there, strict=True):
            assert all((side == 0xAB).all() for side in around), "written beside an array"
            view[...] = array
        return outputs


def on_16(view):
    """A copy whose address is a multiple of 16, as CUDA's are, and the bytes on its two sides."""
    room = np.full(view.nbytes + 2 * GUARD, 0xAB, np.uint8)
    begin = GUARD - room.ctypes.data % 16
    copy = room[begin : begin + view.nbytes].view(view.dtype).reshape(view.shape)
    copy[...] = view
    return copy, (room[:begin], room[begin + view.nbytes :])


@pytest.fixture
def kernels(library, monkeypatch):
    monkeypatch.setattr(cuda_byte, "_kernel", lambda name, *_: Kernel(library, name))


@pytest.mark.parametrize(
    ("D", "B", "dtype"),
    [
        *((16, 3, mx.float32), (32, 1, mx.float32), (32, 3, mx.bfloat16), (96, 1, mx.bfloat16)),
        *((96, 3, mx.float32), (256, 1, mx.bfloat16), (256, 3, mx.float32)),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_plain_step(kernels, D, B, dtype):
    same_as_the_plain_step(a_model(D), B, dtype)


@pytest.mark.parametrize(("B", "blocks"), [(1, 256), (3, 256), (1, 4)])
def test_several_blocks_a_head_and_several_turns_of_each_leave_nothing_out(
    kernels, B, blocks, monkeypatch
):
    monkeypatch.setattr(cuda_byte, "BLOCKS", blocks)
    same_as_the_plain_step(a_model(16, 160), B, mx.float32)


def test_more_parts_than_a_block_adds_at_once_are_added(kernels):
    same_as_the_plain_step(a_model(96, 6, heads=24), 1, mx.float32)


def same_as_the_plain_step(model, B, dtype):
    weights = cuda_byte.weights_of(model, dtype), state._weights(model, dtype)
    H, D, N = model.encoder.shape
    own, plain = (tuple(mx.random.normal((H, B, N, D), key=mx.random.key(7)) for _ in range(2))
                  for _ in range(2))  # fmt: skip
    mx.eval(own, plain)
    v = mx.zeros((B, 1, D))
    for count in (0, 900):
        idx = mx.array([[(65 + count + b) % 256] for b in range(B)])
        v = cuda_byte.step(idx, weights[0], mx.array(count), own, v)
        expected, plain = state.step(idx, weights[1], mx.array(count), plain)
        near = 2e-4 if dtype == mx.float32 else 3e-2
        assert mx.max(mx.abs(v - expected)) < near
        for S, T in zip(own, plain, strict=True):
            assert mx.max(mx.abs(S - T)) < near * mx.max(mx.abs(T))
        plain = tuple(mx.array(np.array(S)) for S in own)


def a_model(D, multiplier=3, heads=2):
    """Two heads of 3/2 D neurons are not enough for a block."""
    mx.random.seed(1)
    config = BDHConfig(n_layer=2, n_embd=D, n_head=heads, mlp_internal_dim_multiplier=multiplier)
    model = BDH(config)
    model.update({k: 8 * a for k, a in model.parameters().items() if isinstance(a, mx.array)})
    return model


def test_a_nan_writes_nowhere_but_where_it_is(kernels):
    """Lanes that have no neuron must not write the rows of the next head."""
    model = a_model(32)
    encoder = np.array(model.encoder)
    encoder[0, :, -1] = np.nan
    model.encoder = mx.array(encoder)
    S = tuple(mx.ones((2, 1, 48, 32)) * 1 for _ in range(2))
    mx.eval(S)
    v = mx.zeros((1, 1, 32))
    v = cuda_byte.step(mx.array([[65]]), cuda_byte.weights_of(model, mx.float32), mx.array(3), S, v)
    assert mx.all(mx.isnan(v)).item()
    first = np.array(S[0])
    assert np.isnan(first[0, 0, -2:]).all() and np.isfinite(first[0, 0, :-2]).all()
    assert np.isfinite(first[1]).all()
