"""Give MLX a fast matrix product on Linux CPUs; imported before `mlx.core`.

MLX's CPU wheel for Linux links the reference BLAS, about 5 GFLOP/s. A library opened earlier with
RTLD_GLOBAL provides `cblas_sgemm` instead and is 30 to 60 times faster (docs/log.md).
"""

import ctypes
import sys
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from bdh_lib.errors import warn

is_limited = False  # whether a product takes one thread; the other cores serve layer.by_groups


def _open(library: str) -> None:
    """Open a BLAS and limit it to one thread.

    Its threads spin while they wait for one another, which takes long on a busy machine.
    """
    global is_limited
    opened = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    names = ("openblas_set_num_threads", "MKL_Set_Num_Threads")
    getattr(opened, next(name for name in names if hasattr(opened, name)))(1)
    is_limited = True


def _open_packaged_openblas() -> None:
    """Open the OpenBLAS of the PyPI package ngsolve-openblas (x86-64).

    It needs libgfortran.so.5, which MLX's wheel contains under another name. The loader searches a
    library's own folder, so all of them are linked into a temporary folder.
    """
    openblas = next(
        Path(distribution("ngsolve-openblas").locate_file("ngsolve_openblas")).glob("*.so")
    )
    mlx_libs = Path(distribution("mlx-cpu").locate_file("mlx_cpu.libs"))
    with tempfile.TemporaryDirectory() as folder:
        for lib in [openblas, *mlx_libs.glob("libgfortran*"), *mlx_libs.glob("libquadmath*")]:
            name = "libgfortran.so.5" if lib.name.startswith("libgfortran") else lib.name
            Path(folder, name).symlink_to(lib)
        _open(f"{folder}/{openblas.name}")


def open_library() -> None:
    """Open the first BLAS that loads. If none does, warn in one line on stderr."""
    libraries = ("libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")
    openers = (_open_packaged_openblas, *(partial(_open, name) for name in libraries))
    for opener in openers:
        try:
            opener()
        except (OSError, PackageNotFoundError, StopIteration):
            continue
        return
    warn(
        "no fast BLAS, matrix products will be some 30 times slower. To cure it: "
        "pip install ngsolve-openblas (x86-64) or apt install libopenblas0"
    )


def is_wanted() -> bool:
    """Test whether MLX needs a BLAS: only its CPU wheel for Linux does, not Accelerate or CUDA."""
    try:
        distribution("mlx-cpu")
    except PackageNotFoundError:
        return False
    return True


if is_wanted() and "mlx.core" in sys.modules:
    warn("slow matrix products; import bdh_mlx before mlx.core")
elif is_wanted():
    open_library()
