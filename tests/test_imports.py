"""Imports point down: training and generation, the loss, the model and data, compute, the base."""

import ast
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, random_model

from bdh_mlx import save_model

BASE = {"bdh_lib", "bdh_lib.script"}  # errors, rules, files, runs; how a script runs, its flags
LOWER = BASE | {"bdh_lib.compute", "bdh_lib.data", "bdh_mlx"}
SHARED = LOWER | {"bdh_lib.loss"}  # what training and generation share
MAY_IMPORT = {
    "bdh_lib": {"bdh_lib"},
    "bdh_lib.script": BASE,
    "bdh_lib.compute": BASE | {"bdh_lib.compute"},
    "bdh_lib.data": BASE | {"bdh_lib.data"},
    "bdh_mlx": BASE | {"bdh_lib.compute"},
    "bdh_lib.loss": LOWER,
    "bdh_lib.training": SHARED | {"bdh_lib.training"},
    "bdh_lib.generation": SHARED | {"bdh_lib.generation"},
    "train_mlx": SHARED | {"bdh_lib.training", "bdh_lib.generation"},
    "generate": SHARED | {"bdh_lib.generation"},
}
FILES = [*ROOT.glob("*.py"), *(ROOT / "bdh_lib").rglob("*.py")]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}


def folder(module: str) -> str:
    """The package that a module lies in; of a script, and of a layer by itself, its own name."""
    return module if module in MAY_IMPORT else module.rpartition(".")[0]


def imported(module: str) -> set[str]:
    """This project's modules that a module imports, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__")])
def test_imports_point_down(module):
    assert {folder(name) for name in imported(module)} <= MAY_IMPORT[folder(module)]


def test_generate_works_without_the_trainer(tmp_path):
    shutil.copytree(ROOT / "bdh_lib", tmp_path / "bdh_lib")
    for name in ("bdh_mlx.py", "generate.py"):
        shutil.copy(ROOT / name, tmp_path)
    for file in (tmp_path / "bdh_lib/training").glob("*.py"):
        file.write_text("def typo(:\n")
    save_model(random_model(), tmp_path / "m.safetensors")
    (tmp_path / "a.txt").write_text("Is it still right?")
    command = [sys.executable, "generate.py", "m.safetensors", "--mode", "full"]
    for more in (["--evaluate", "a.txt"], ["--prompt", "a", "--max-new-tokens", "2"]):
        ran = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


def test_no_imports_go_in_a_circle():
    done = set()

    def walk(module, path=()):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in imported(module):
                walk(name, (*path, module))
        done.add(module)

    for module in MODULES:
        walk(module)


def test_no_script_of_bench_has_the_name_of_another_module():
    names = [f.stem for f in [*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")]]
    assert len(names) == len(set(names))
