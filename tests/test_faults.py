"""A few tries of most faults of tests/faults; `make faults` runs them all in full."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

SHARES = 3  # of about as many seconds each, for the processes of pytest-xdist


@pytest.mark.skipif(sys.platform == "darwin", reason="a fork of a process that loaded Metal hangs")
@pytest.mark.parametrize("share", range(SHARES))
def test_faults_are_survived_and_every_control_fails(share):
    run = subprocess.run(
        [sys.executable, ROOT / "tests/faults", "--quick", "--share", str(share), str(SHARES)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("fails at try") >= 3  # controls
