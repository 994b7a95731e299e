import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bdh_mlx  # noqa: E402, F401  before any test imports mlx.core: it loads the fast BLAS
