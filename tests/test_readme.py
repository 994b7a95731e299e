"""The commands and the Python of README.md and docs/ run as printed, on tiny settings."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

import train_mlx
from bdh_lib.data.formats import PROMPTS, REQUIRED_FIELDS

README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [file for file in DOCS if file.name != "log.md"]  # not the log of what was measured
BLOCKS = [
    block for file in DOCS for block in re.findall(r"```(\w+)\n(.*?)```", file.read_text(), re.S)
]
# Each command once, whichever pages show it
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
LINES = list(dict.fromkeys(LINES))
HUB = [line for line in LINES if "hf:USER/NAME" in line]  # test_hub_models.py has them
TRAIN = [line for line in LINES if line.startswith("python train_mlx.py") and line not in HUB]
GENERATE = [line for line in LINES if line.startswith("python generate.py") and line not in HUB]
REPORT = [line for line in LINES if line.startswith("python -m bdh_lib.training.report")]
NOT_RUN = ("git clone ", "cd ", "python3 -m ", "source ", "pip install ", "make ", "mlx.launch ")
NOT_RUN += ("xcode-select ", "brew ", "sw_vers", "sysctl ")  # a Mac's
PYTHON = [block for kind, block in BLOCKS if kind == "python" and "torch" not in block]
TINY = (
    "--max-iters 2 --n-layer 1 --n-embd 16 --mlp-internal-dim-multiplier 8 --block-size 64 "
    "--batch-size 2 --eval-bytes 100 --sample-bytes 4"
)


def run(command, cwd):
    script, *args = shlex.split(command)[1:]
    command = [sys.executable, script if script == "-m" else str(ROOT / script), *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, input="", env=env)


def of_the_one_run(line):
    """The command, on the run that the tests have in place of a run of each mode."""
    return re.sub(r"checkpoints_mlx/(system|instruction|both)\b", "checkpoints_mlx/full", line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data files of the user's, and a run of mode full."""
    folder = tmp_path_factory.mktemp("readme")
    sample = (ROOT / "bdh_lib/data/sample.jsonl").read_text()
    (folder / "my_records.jsonl").write_text(sample)
    rows = "".join(f"Who is {i}?,I am {i}.,You are {i}.\n" for i in range(40))
    (folder / "my_qa.csv").write_text(f"ask,say,persona\n{rows}")
    (folder / "my_text.txt").write_text("A paragraph.\n\n" * 20 + "Another one.\n\n" * 200)
    (folder / "held_out.jsonl").write_text("".join(sample.splitlines(keepends=True)[:3]))
    (folder / "asked.jsonl").write_text('{"prompt": "a"}\n{"instruction": "b"}\n')
    assert run(f"python train_mlx.py --preset tiny --dataset sample {TINY}", folder).returncode == 0
    return folder


@pytest.mark.parametrize("line", TRAIN)
def test_training_commands_run(line, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("my_*"):
        shutil.copy(file, tmp_path)
    data = "" if "--dataset" in line else "--dataset sample"
    if "phase2" in line:
        train_mlx.main(f"--preset phase1-64gb {data} {TINY}".split())
    capsys.readouterr()
    more = "" if "--selfcheck" in line else f"{data} {TINY}"
    assert train_mlx.main(shlex.split(f"{line} {more}")[2:]) == 0
    out = capsys.readouterr().out
    if "--plan" not in line and more:
        assert "val_loss: " in out
        assert ("start: weights of system" in out) == ("phase2" in line)


@pytest.mark.parametrize("line", REPORT)
def test_report_commands_run(line, folder):
    ran = run(of_the_one_run(line), folder)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("line", GENERATE)
def test_generating_commands_run(line, folder):
    ran = run(of_the_one_run(line), folder)
    assert ran.returncode == 0, ran.stderr
    words = shlex.split(line)
    if "--prompt" in words:
        prompt = words[words.index("--prompt") + 1].replace("\\n", "\n")
        assert ran.stdout.startswith(prompt)
        assert run(of_the_one_run(line), folder).stdout == ran.stdout  # it names a seed
    if "--prompts" in words:
        assert len((folder / "answered.jsonl").read_text().splitlines()) == 2
    if "--evaluate" in words:
        assert ran.stdout.splitlines()[-1].startswith("whole ")


def test_there_is_something_to_test():
    assert len(TRAIN) >= 12 and len(GENERATE) >= 9 and len(REPORT) == 2 and len(PYTHON) >= 2


def test_every_command_is_run_here_or_known_not_to_be():
    rest = [line for line in LINES if line and line not in {*TRAIN, *GENERATE, *REPORT, *HUB}]
    assert [line for line in rest if not line.startswith(NOT_RUN)] == []
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[-1] for line in rest if line.startswith("make ")} <= {*targets}


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "manual.txt").write_text("A chapter. " * 100)  # more than the window it shows
    exec(code, names := {})
    assert names["model"].config.n_embd == 16
    if "save_state" in code:
        assert names["logits"].shape == (1, 256) and names["after"].batch == 2
        assert names["load_state"]("manual.safetensors", names["model"]).position == 1100
        assert names["state"].window == 512


def test_a_loaded_model_generates(folder, capsys, monkeypatch):
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
    written = capsys.readouterr().out
    assert written.startswith("b'### Instruction") or written.startswith('b"### Instruction')
    assert "\n### System:\nTask Overview: Analyze" in written


# ------------------------------------------------------------------------------------- the pages


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_the_readme_names_every_preset_and_mode():
    text = README.read_text()
    for name in [*train_mlx.PRESETS, *REQUIRED_FIELDS]:
        assert f"`{name}`" in text, name


def test_the_page_on_training_names_every_sample_prompt():
    text = (ROOT / "docs/training.md").read_text()
    for prompt in (prompt for of_mode in PROMPTS.values() for prompt in of_mode):
        assert "`" + prompt.replace("\n", "\\n") + "`" in text


def test_a_mac_takes_every_command_as_it_is_pasted():
    """zsh has no comments, expands * ? [ outside of quotes and ! within them, ` everywhere."""
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "diff"}  # no other shell
    for line in LINES:
        assert not re.search(r"[!`]|(^|\s)#", line), line
        assert not re.search(r"[?*\[]", re.sub(r"'[^']*'|\"[^\"]*\"", "", line)), line


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_no_page_cites_what_the_reader_does_not_have(file):
    text = " ".join(file.read_text().split())
    assert re.findall(r"\bthe guide\b|\bOption \d", text, re.I) == []


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = file.parent / path if path else file
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def test_every_file_in_the_tree_of_the_readme_exists():
    tree = re.search(r"^## Files\n\n```\n(.*?)```", README.read_text(), re.M | re.S)[1]
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) == 12 and all(any(ROOT.glob(name)) for name in names)
