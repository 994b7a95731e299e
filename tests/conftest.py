import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's: they spin on a busy machine
os.environ.setdefault("BDH_DEVICE", "cpu")  # equal bits are promised there; empty: the GPU

import bdh_mlx  # noqa: F401  before any test imports mlx.core: it loads the fast BLAS

# isort: split
from helpers import COUNTING, model_of, random_model, saved, train

import generate
from bdh_lib.training import report


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Runs of other tests draw no report, which would take a second at each evaluation."""
    if request.module.__name__ != "test_report":
        monkeypatch.setattr(report, "write_report", lambda *_: None)


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory):
    """A run of 12 iterations without a stop."""
    folder = tmp_path_factory.mktemp("uninterrupted_run")
    assert train(folder, "--max-iters", 12) == 0
    return folder


@pytest.fixture(scope="module")
def counting_run(tmp_path_factory):
    """The run of a model that writes all byte values, over and over."""
    return saved(model_of(COUNTING), tmp_path_factory.mktemp("counting_run"))


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """The run of a model of random weights."""
    return saved(random_model(), tmp_path_factory.mktemp("random_run"))


@pytest.fixture
def output(capfdbinary):
    """Runs generate.py in this process; what it printed."""

    def run(*args):
        capfdbinary.readouterr()
        assert generate.main([str(a) for a in args]) == 0
        return capfdbinary.readouterr().out

    return run
