"""The README's commands and the guide's snippet run as printed, on tiny settings."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import train_mlx
from bdh_lib.generation import states

BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
TRAIN = [line for line in LINES if line.startswith("python train_mlx.py")]
GENERATE = [line for line in LINES if line.startswith("python generate.py")]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
TINY = (
    "--max-iters 2 --n-layer 1 --n-embd 16 --mlp-internal-dim-multiplier 8 --block-size 64 "
    "--batch-size 2 --eval-bytes 100 --sample-bytes 4"
)


def run(command, cwd):
    script, *args = shlex.split(command, comments=True)[1:]
    command = [sys.executable, script if script == "-m" else str(ROOT / script), *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, input="", env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data files of the user's, and a run of mode full."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_records.jsonl").write_text((ROOT / "bdh_lib/data/sample.jsonl").read_text())
    records = (ROOT / "bdh_lib/data/sample.jsonl").read_text().splitlines(keepends=True)
    (folder / "held_out.jsonl").write_text("".join(records[:3]))
    (folder / "asked.jsonl").write_text('{"prompt": "a"}\n{"instruction": "b"}\n')
    assert run(f"python train_mlx.py --preset tiny --dataset sample {TINY}", folder).returncode == 0
    return folder


@pytest.mark.parametrize("line", TRAIN)
def test_training_commands_run(line, folder):
    data = "" if "--dataset" in line else "--dataset sample"
    phase = "" if "phase" in line else f"--run-name r{abs(hash(line))}"
    if "phase2" in line:  # whichever test ran before
        run(f"python train_mlx.py --preset phase1-64gb {data} {TINY}", folder)
    more = "" if "--selfcheck" in line else f"{data} {TINY} {phase}"
    ran = run(f"{line.split('#')[0]} {more}", folder)
    assert ran.returncode == 0, ran.stderr
    if "--plan" in line or "--selfcheck" in line:
        return
    assert "val_loss: " in ran.stdout
    assert ("start: weights of system" in ran.stdout) == ("phase2" in line)


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.startswith("python -m bdh_lib.training.report")]
)
def test_report_commands_run(line, folder):
    ran = run(line.replace("checkpoints_mlx/both", "checkpoints_mlx/full"), folder)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("line", GENERATE)
def test_generating_commands_run(line, folder):
    ran = run(line, folder)
    assert ran.returncode == 0, ran.stderr
    if "--prompt " in line:
        assert ran.stdout.startswith("### Instruction:\nExplain")
        assert run(line, folder).stdout == ran.stdout  # it names a seed
    if "--prompts" in line:
        assert len((folder / "answered.jsonl").read_text().splitlines()) == 2
    if "--evaluate" in line:
        assert ran.stdout.splitlines()[-1].startswith("whole ")


def test_there_is_something_to_test():
    assert len(TRAIN) >= 5 and GENERATE and len(PYTHON) >= 2


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "manual.txt").write_text("A chapter. " * 100)  # more than the window it shows
    exec(code, names := {})
    assert names["model"].config.n_embd == 16
    if "save_state" in code:
        assert names["logits"].shape == (1, 256) and names["after"].batch == 2
        assert states.load_state("manual.safetensors", names["model"]).position == 1100
        assert names["state"].window == 512


def test_the_snippet_of_the_guide_runs(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    code = PYTHON[0]
    code += """
import mlx.core as mx
prompt_bytes = list(bytearray("### System:\\nTask Overview: Analyze", "utf-8"))
idx = mx.array([prompt_bytes])
output = model.generate(idx, max_new_tokens=5, temperature=0.8, top_k=50)
print(bytes(output[0].tolist()).decode("utf-8", errors="backslashreplace"))
"""
    exec(code, {})
    assert capsys.readouterr().out.startswith("### System:\nTask Overview: Analyze")


def test_the_readme_names_every_preset_and_mode():
    text = (ROOT / "README.md").read_text()
    for name in [*train_mlx.PRESETS, *train_mlx.NEEDED]:
        assert f"`{name}`" in text, name
