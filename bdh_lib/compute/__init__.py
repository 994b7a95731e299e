"""How a layer is computed: in chunks to train on, byte by byte to write.

Whatever imports mlx.core imports this package before it, since a fast BLAS must be opened first.
"""

import os

# CUDA: MLX counts the graphs it has met and gives up at 800 (its lru_cache.h); evaluating and
# sampling between steps meet more.
os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "4000")
os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")

from bdh_lib.compute import blas  # noqa: F401
