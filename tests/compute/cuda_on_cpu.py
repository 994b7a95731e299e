"""CUDA kernels on a CPU: a C++ compiler, cuda_on_cpu.h, and a stand-in for mx.fast.cuda_kernel."""

import ctypes
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not COMPILER, reason="no g++, or not the fibers of Linux"
)
TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16"}
GUARD = 1 << 20  # bytes around an array that no kernel may touch


def compiled(file, entries, folder):
    """The library of a .cu file's kernels, with their entries in C++."""
    paths = (ROOT / "bdh_lib/compute" / name for name in ("cuda_kernel.cuh", file))
    includes = "".join(f'#include "{path}"\n' for path in ("cuda_on_cpu.h", *paths))
    (folder / "kernels.cpp").write_text(includes + entries)
    command = [
        COMPILER,
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-I",
        ROOT / "tests/compute",
        "-o",
    ]
    subprocess.run([*command, folder / "kernels.so", folder / "kernels.cpp"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


class Kernel:
    """What mx.fast.cuda_kernel gives: NumPy in between, and inputs that are written in place."""

    def __init__(self, library, name, inputs):
        self.library, self.name = library, name
        assert "keys" not in inputs or "previous_v" in inputs  # nothing else makes it wait

    def __call__(self, inputs, output_shapes, output_dtypes, template, grid, threadgroup):
        constants = dict(template)
        outputs = [mx.zeros(s, t) + 0 for s, t in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(inputs, outputs)
        views = [np.array(bits(a), copy=False) for a in (*inputs, *outputs)]
        assert all(view.flags.c_contiguous for view in views)
        there = [on_16(view) for view in views]
        at = (ctypes.c_void_p * len(views))(*(array.ctypes.data for array, _ in there))
        shapes = (ctypes.c_int * 5 * len(inputs))(*(tuple(a.shape) for a in inputs))
        threads = min(threadgroup[0], grid[0])
        T = TYPES[constants.get("T", mx.float32)]
        shape = [str(constants[k]) for k in ("D", "V", "LIMIT") if k in constants]
        assert constants.get("W", threads // 32) == threads // 32
        function = self.library["_".join([self.name, *shape, T])]
        function(at, shapes, -(-grid[0] // threads), grid[1], threads)
        for view, (array, around) in zip(views, there, strict=True):
            assert all((side == 0xAB).all() for side in around), (
                f"{self.name}: written beside an array"
            )
            view[...] = array
        return outputs


def bits(array):
    """What NumPy can read."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def on_16(view):
    """A copy whose address is a multiple of 16, as CUDA's are, and the bytes on its two sides."""
    room = np.full(view.nbytes + 2 * GUARD, 0xAB, np.uint8)
    begin = GUARD - room.ctypes.data % 16
    copy = room[begin : begin + view.nbytes].view(view.dtype).reshape(view.shape)
    copy[...] = view
    return copy, (room[:begin], room[begin + view.nbytes :])
