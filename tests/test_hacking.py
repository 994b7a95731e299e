"""The edits that docs/hacking.md shows do what it says, each in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import NO_REPORT, ROOT

TINY = (
    "--preset tiny --dataset sample --max-iters 2 --n-layer 1 --n-embd 16 "
    "--mlp-internal-dim-multiplier 8 --block-size 64 --batch-size 2 --eval-bytes 100 "
    "--sample-bytes 4 --log-freq 1"
)
UNDRAWN = ("-c", f"import sys\n{NO_REPORT}sys.exit(train_mlx.main())")  # of the folder it runs in
TEXT = (ROOT / "docs/hacking.md").read_text()


def edits(heading: str) -> list[tuple[str, str, str]]:
    """File, lines before and lines after of each edit below a heading of docs/hacking.md."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]
    found = []
    for file, body in re.findall(r"```diff\n--- (\S+)\n(.*?)```", section, re.S):
        lines = body.splitlines(keepends=True)
        sides = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
        found.append((file, *sides))
    return found


def project(folder, heading=None):
    """A copy of the project in a folder, with the edits below a heading."""
    shutil.copytree(ROOT / "bdh_lib", folder / "bdh_lib")
    for name in ("bdh_mlx.py", "train_mlx.py"):
        shutil.copy(ROOT / name, folder)
    for file, before, after in edits(heading) if heading else []:
        text = (folder / file).read_text()
        assert text.count(before) == 1, f"{file} does not hold once: {before}"
        (folder / file).write_text(text.replace(before, after))
    return folder


def train(folder, *more, code=0):
    """What a tiny run of the project in a folder prints, and its log lines."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *UNDRAWN, *TINY.split(), *more]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert ran.returncode == code, ran.stderr
    log = folder / "checkpoints_mlx/full/metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return ran.stdout + ran.stderr, [json.loads(line) for line in lines]


def values(lines, name):
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    return project(tmp_path_factory.mktemp("unedited"))


def test_every_edit_of_the_page_is_tried_here():
    tried = [*edits("The loss"), *edits("The schedule"), *edits("The data")]
    assert len(tried) == TEXT.count("```diff") == 4


def test_another_loss(tmp_path, unedited):
    _, plain = train(unedited)
    _, smoothed = train(project(tmp_path, "The loss"))
    assert values(smoothed, "val_loss")[0] == values(plain, "val_loss")[0]  # of the same weights
    assert values(smoothed, "loss")[0] != values(plain, "loss")[0]
    assert values(smoothed, "val_loss")[-1] != values(plain, "val_loss")[-1]


def test_another_schedule(tmp_path):
    folder = project(tmp_path, "The schedule")
    flags = ("--learning-rate", "1e-3", "--warmup-iters", "0", "--cooldown-iters", "2")
    _, lines = train(folder, *flags)
    assert values(lines, "lr") == pytest.approx([1e-3, 5e-4])
    config = json.loads((folder / "checkpoints_mlx/full/config.json").read_text())
    assert config["settings"]["COOLDOWN_ITERS"] == 2


def test_another_column(tmp_path, unedited):
    data = tmp_path / "personas.jsonl"
    records = [{"persona": f"You are {i}.", "question": f"Who is {i}?", "answer": f"I am {i}."}
               for i in range(100)]  # fmt: skip
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    output, _ = train(unedited, "--dataset", str(data), "--run-name", "personas")
    assert "columns not used" in output and "field system" not in output
    output, _ = train(project(tmp_path / "edited", "The data"), "--dataset", str(data))
    assert "structure persona/question/answer: 100.0% of records" in output
    assert re.search(r"field system: in 100.0% of records", output)
