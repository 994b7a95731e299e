import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's: they spin on a busy machine
os.environ.setdefault("BDH_DEVICE", "cpu")  # equal bits are promised there; empty: the GPU

import bdh_mlx  # noqa: E402, F401  before any test imports mlx.core: it loads the fast BLAS


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Runs of other tests draw no report, which would take a second at each evaluation."""
    if request.module.__name__ != "test_report" and (trainer := sys.modules.get("train_mlx")):
        monkeypatch.setattr(trainer, "redraw", lambda *_: None)
