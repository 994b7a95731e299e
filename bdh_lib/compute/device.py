"""The device that MLX computes on."""

import os

import mlx.core as mx

from bdh_lib.errors import UserError

if device := os.environ.get("BDH_DEVICE"):
    if device != "cpu":
        raise UserError(f"BDH_DEVICE is {device!r}; set it to cpu, or unset it for the GPU")
    mx.set_default_device(mx.cpu)


def on_gpu() -> bool:
    """Tell whether MLX computes on a GPU; BDH_DEVICE=cpu in the environment keeps it from one."""
    return mx.default_device() == mx.gpu


def on_metal() -> bool:
    """Tell whether MLX computes on the GPU of a Mac."""
    return on_gpu() and mx.metal.is_available()


def on_cuda() -> bool:
    """Tell whether MLX computes on an NVIDIA GPU."""
    return on_gpu() and mx.cuda.is_available()
