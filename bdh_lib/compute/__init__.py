"""The computation of a layer: in chunks for training and prefill, byte by byte for decoding.

Import this package before mlx.core: it must open a fast BLAS first.
"""

import os

# CUDA: MLX stops with an error after 800 different graphs (its lru_cache.h); training with
# evaluation and sampling has more.
os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "4000")
os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")

from bdh_lib.compute import blas

# MLX orders the operations of a graph breadth-first up to this width (20 by default), else depth-
# first: all of one group of heads before another, so that one core waits (layer.by_groups). It
# matters only where a graph is not compiled (docs/log.md, 2026-11-28).
if blas.is_limited:
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "200")
