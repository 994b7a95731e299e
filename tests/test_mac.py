"""What a Mac needs, as far as Linux can tell: no test here has run on a Mac."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("device", "output"),
    [(None, "DeviceType.cpu\n"), ("", ""), ("gpu", "error: BDH_DEVICE is 'gpu'; set it to cpu")],
)
def test_the_tests_and_their_child_processes_compute_on_the_cpu(device, output):
    """conftest.py sets BDH_DEVICE; print stands for what moves MLX."""
    code = "import mlx.core as mx; mx.set_default_device = print; from bdh_lib import cli; "
    env = os.environ | ({} if device is None else {"BDH_DEVICE": device})
    command = [sys.executable, "-c", f"{code} cli.run('generate.py')", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if device == "gpu":
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(output)
    else:
        assert done.stdout.startswith(f"{output}BDH-MLX, mlx")
