"""Kernels of this folder's .cu files, as MLX compiles them on a CUDA GPU."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import mlx.core as mx

# name, inputs, outputs and C++ call; MLX passes the arguments that a call names
Kernel = tuple[str, tuple[str, ...], tuple[str, ...], str]


@lru_cache
def cuda_kernel(file: str, kernel: Kernel) -> Callable:
    """Make the kernel that calls a function of a .cu file; cuda_kernel.cuh is included before."""
    # included and not inserted: MLX hashes the text at every launch, 4 us for all of step_cuda.cu
    paths = (Path(__file__).resolve().with_name(name) for name in ("cuda_kernel.cuh", file))
    name, inputs, outputs, call = kernel
    header = "".join(f'#include "{path}"\n' for path in paths)
    return mx.fast.cuda_kernel(name, list(inputs), list(outputs), call, header)
