"""The computation of a layer: in chunks for training and prefill, byte by byte for decoding.

Import this package before mlx.core: it must open a fast BLAS first.
"""

import os

# CUDA: MLX stops with an error after 800 different graphs (its lru_cache.h); training with
# evaluation and sampling has more.
os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "4000")
os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")

from bdh_lib.compute import blas  # noqa: F401
