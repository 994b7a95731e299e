"""What a Mac needs, as far as Linux can tell: no test here has run on a Mac."""

import ast
import os
import re
import subprocess
import sys

import mac_audit
import mlx.core as mx
import pytest
from helpers import ROOT

import train_mlx
from bdh_lib.compute import device, memory, rope, state
from bdh_lib.training import memory_plan


@pytest.mark.parametrize(
    ("device", "output"),
    [(None, "DeviceType.cpu\n"), ("", ""), ("gpu", "error: BDH_DEVICE is 'gpu'; set it to cpu")],
)
def test_the_tests_and_their_child_processes_compute_on_the_cpu(device, output):
    """conftest.py sets BDH_DEVICE; print stands for what moves MLX."""
    code = "import mlx.core as mx; mx.set_default_device = print; from bdh_lib.script import cli; "
    env = os.environ | ({} if device is None else {"BDH_DEVICE": device})
    command = [sys.executable, "-c", f"{code} cli.run('generate.py')", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if device == "gpu":
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(output)
    else:
        assert done.stdout.startswith(f"{output}BDH-MLX, mlx")


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("bdh_lib/**/*.py"), *ROOT.glob("bench/*.py")]
SOURCES += [file for file in ROOT.glob("tests/**/*.py") if file.parent.name != "faults"]  # Linux's
LINUX = re.compile(r"\W*/(proc|sys|dev/shm|dev/full)\b")
GUARD = re.compile(r"\.exists\(\)|\.is_dir\(\)|suppress\(OSError|platform == .darwin")


def test_no_process_is_forked_and_no_folder_of_linux_is_taken_for_granted():
    """A fork may only exec, since Metal does not survive it. The guard is in the same function."""
    found = []
    for file in SOURCES:
        lines = file.read_text().splitlines()
        nodes = [*ast.walk(ast.parse("\n".join(lines)))]
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        for node in nodes:
            at = getattr(node, "lineno", 0)
            inside = [f for f in functions if f.body[0].lineno <= at <= f.end_lineno]
            around = lines[inside[0].lineno - 1 : inside[0].end_lineno] if inside else lines
            names = [getattr(node, "module", ""), *getattr(node, "names", [])]
            names = {getattr(name, "name", name) for name in names}
            forks = getattr(node, "attr", "") in ("fork", "forkpty", "multiprocessing")
            linux = isinstance(node, ast.Constant) and LINUX.match(str(node.value))
            if (
                "multiprocessing" in names
                or (forks and "os.exec" not in "\n".join(around))
                or (linux and not GUARD.search("\n".join(around)))
            ):
                found.append(f"{file.relative_to(ROOT)}:{at}")
    assert found == []


def test_the_faults_which_fork_are_refused_on_a_mac():
    code = "import runpy, shutil, sys; sys.argv = ['faults']; sys.path[0] = 'tests/faults'\n"
    code += "names = runpy.run_path('tests/faults/__main__.py', run_name='faults')\n"
    code += "shutil.rmtree(names['ROOM']); sys.platform = 'darwin'; names['main']()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: a fork of a process that loaded")


def test_a_page_that_starts_two_processes_says_that_one_mac_gains_nothing():
    pages = [page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    pages = [" ".join(page.split()) for page in pages if "mlx.launch -n" in page]
    assert pages and all("On one Mac the two would share one GPU" in page for page in pages)


# ----------------------------------------------------------------------------------------- memory

BUFFER = "[METAL] Command buffer execution failed: "
METAL_TEXTS = {  # of MLX 0.32's backend for Metal, and of Metal itself: whether memory is out
    "[malloc] Unable to allocate 536870912 bytes.": True,
    "[metal::malloc] Attempting to allocate 9000000000 bytes which is greater than the maximum "
    "allowed buffer size of 8589934592 bytes.": True,
    "[metal::malloc] Resource limit (499000) exceeded.": True,
    f"{BUFFER}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).": True,
    f"{BUFFER}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInterac"
    "tivity).": False,
    f"{BUFFER}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).": False,
    f"{BUFFER}Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommandBufferCall"
    "backErrorSubmissionsIgnored).": False,
    f"{BUFFER}Internal Error.": False,
}


@pytest.mark.parametrize(("text", "is_out"), METAL_TEXTS.items())
def test_a_text_of_metal_is_exhausted_memory_or_not(text, is_out):
    assert memory.is_exhausted(RuntimeError(text)) == is_out


@pytest.mark.parametrize(
    ("working_set", "preset", "mode"),  # bytes, as Macs with 16 and 64 GB report them
    [
        (11_453_246_122, "both-64gb", "balanced"),
        (11_453_246_122, "both-16gb", "fast"),
        (51_539_607_552, "both-64gb", "fast"),
        (51_539_607_552, "small-data", "fast"),
    ],
)
def test_each_size_of_mac_gets_the_fastest_mode_that_it_holds(
    monkeypatch, working_set, preset, mode
):
    for module in (device, memory, rope, state):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory, "mac_free_memory", lambda: working_set + 1e9)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"max_recommended_working_set_size": working_set}
    )
    name, compute, peak = memory_plan.select_mode(train_mlx.read_settings(["--preset", preset]))
    assert (name, compute.dtype) == (mode, mx.bfloat16) and peak < working_set
    assert state._piece_rows(compute.dtype) == 4096


# ------------------------------------------------------------------------------ make mac-audit


def test_the_audit_of_metals_library_names_what_is_missing():
    kernels = mac_audit.expand(mac_audit.KERNELS)
    assert {"rope_single_bfloat16", "vjp_layer_normfloat32", "v_Selectuint64"} <= {*kernels}
    metallib = b"".join(b"NAME\x12\x00%s\x00TYPE" % name.encode() for name in kernels[1:])
    library = b"\0".join(mac_audit.TEXTS[:-1])
    found = mac_audit.missing(mac_audit.KERNELS, metallib, library)
    assert found == [kernels[0], mac_audit.TEXTS[-1].decode()]
    assert all(text in " ".join(METAL_TEXTS) for text in map(bytes.decode, mac_audit.TEXTS))


def test_the_workflow_calls_make_on_linux_and_a_mac():
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    called = re.findall(r"run: make (.*)", workflow)
    assert called and {*called} <= {*targets}
    assert "ubuntu" in workflow and "macos-" in workflow and "has never been run" in workflow


# -------------------------------------------------------------------------------- docs/mac.md


def test_the_estimates_of_the_page_follow_from_its_own_figures():
    text = (ROOT / "docs/mac.md").read_text()
    assert "Nothing on this page was run on a Mac" in text and "are estimates" in text
    assert "(docs/mac.md)" in (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| M\d.*\|$", text, re.M)
    assert len(rows) >= 7
    for row in rows:
        cells = [re.findall(r"[\d.]+", cell.replace(",", "")) for cell in row.split("|")[2:-1]]
        (peak,), (bandwidth,), speeds, hours, (bound,) = [[*map(float, cell)] for cell in cells]
        for speed, time, share in zip(speeds, reversed(hours), (0.45, 0.65), strict=True):
            assert speed == pytest.approx(share * peak * 1e12 / 1.94e9, rel=0.04), row
            assert time == pytest.approx(3 * 3.6e6 / speed / 3600, abs=0.06), row
        assert bound == pytest.approx(bandwidth * 1e9 / 503e6, rel=0.04), row
