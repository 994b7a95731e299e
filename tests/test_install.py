"""`make` says what a machine lacks, and replaces a .venv that does not work."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

FAKE = f"""#!/bin/sh
echo "$*" >>calls
case "$*" in
  *version_info*) exit $OLD ;;
  *"import mlx.core") exit $STALE ;;
  *platform_check.py) exec {sys.executable} -c "
import platform, runpy
platform.system, platform.machine = lambda: '$SYSTEM', lambda: '$MACHINE'
platform.mac_ver = lambda: ('$MACOS', ('', '', ''), '$MACHINE')
runpy.run_path('bdh_lib/platform_check.py', run_name='__main__')" ;;
  "-m venv --clear"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """`make train` on a machine as named, with a stand-in for Python: exit code, output, calls."""
    for name in ("Makefile", "requirements.txt", "constraints.txt", "bdh_lib/platform_check.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)

    def run(system="Linux", machine="x86_64", macos="", python="./fake", old=0, stale=1):
        env = {"SYSTEM": system, "MACHINE": machine, "MACOS": macos, "OLD": old, "STALE": stale}
        env = os.environ | {name: str(value) for name, value in env.items()}
        command = ["make", f"PYTHON={python}", "train"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        calls = tmp_path / "calls"
        return done.returncode, done.stdout + done.stderr, calls.exists() and calls.read_text()

    return run


@pytest.mark.parametrize("macos", ["", "14.0", "15.7.1", "26.2", "27.0"])
def test_a_machine_that_mlx_knows_gets_an_environment_and_trains(make, macos):
    code, out, calls = make(*(("Darwin", "arm64", macos) if macos else ()))
    assert code == 0, out
    assert calls.splitlines()[2:] == [
        "-m venv --clear .venv",
        "-m pip install -r requirements.txt",
        "train_mlx.py --preset tiny --dataset sample",
    ]


@pytest.mark.parametrize(
    ("machine", "complaint"),
    [
        ({"python": "./none"}, "./none does not run, or is older than 3.11. Install a newer one"),
        ({"old": 1}, "xcode-select --install and brew install python@3.13 .* make PYTHON=.* train"),
        ({"machine": "x86_64", "macos": "14.5"}, "built for x86_64 .* MLX needs arm64"),
        ({"machine": "arm64", "macos": "13.7.8"}, "macOS is 13.7.8, and MLX needs 14"),
        ({"machine": "arm64", "macos": "26.1"}, "macOS is 26.1, and .* needs 26.2; update"),
    ],
)
def test_what_a_machine_lacks_is_said_before_anything_is_made(make, tmp_path, machine, complaint):
    code, out, _ = make(**({"system": "Darwin"} | machine))
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and re.search(complaint, errors[0])
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("kind", ["", "-cuda", "-dev"])
def test_every_package_is_installed_in_its_tested_version(kind):
    needed = (ROOT / f"requirements{kind}.txt").read_text()
    tested = re.findall(r"^([\w-]+)==\d", (ROOT / "constraints.txt").read_text(), re.M)
    names = re.findall(r"^[a-z][\w-]*", needed, re.M)
    assert "\n-c constraints.txt\n" in f"\n{needed}" and len(names) >= 3
    assert {*names} <= {*tested}


def test_an_environment_stays_only_where_mlx_runs(make, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(tmp_path / "gone")  # of a Python that was removed
    assert make()[0] == 0
    (tmp_path / ".venv/ready").unlink()
    (tmp_path / "calls").unlink()
    assert "venv" not in make(stale=0)[2]
