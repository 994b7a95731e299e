"""A Mac is kept awake while it trains, and a process starts again after a fault of its GPU."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ARGS, IMPORT_TRAINER, RUN_TRAINER, arrays, equal_arrays, train

import train_mlx
from bdh_lib.training import batches, macos


@pytest.fixture
def caffeinate(tmp_path, monkeypatch):
    """A stand-in for the program of a Mac, which writes its arguments and its pid to a file."""
    (folder := tmp_path / "bin").mkdir()
    program, calls = folder / "caffeinate", folder / "calls"
    program.write_text(f'#!/bin/sh\necho "$@" $$ > {calls}\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(sys, "platform", "darwin")
    return calls


def test_a_mac_is_kept_awake_while_it_trains_and_its_display_is_not(tmp_path, caffeinate):
    assert train(tmp_path, "--max-iters", 2) == 0
    *arguments, pid = caffeinate.read_text().split()
    assert arguments == ["-i", "-s", "-w", str(os.getpid())]
    with pytest.raises(ProcessLookupError):  # it ended with the run, as a notebook does not
        os.kill(int(pid), 0)


@pytest.mark.parametrize("case", ["--no-keep-awake", "--plan", "linux", "missing"])
def test_nothing_is_kept_awake_without_need(tmp_path, caffeinate, monkeypatch, case):
    if case == "linux":
        monkeypatch.setattr(sys, "platform", "linux")
    if case == "missing":
        (caffeinate.parent / "caffeinate").unlink()
    assert train(tmp_path, "--max-iters", 1, *([case] if case.startswith("--") else [])) == 0
    assert not caffeinate.exists()


GPU_FAULT = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)

FAULTY = """
import os
from bdh_lib.training import batches
print("pid", os.getpid(), file=sys.stderr)
micro_batches, step = batches.micro_batch_indices, {step}

def faulty(s, at, world):
    if at == step and "BDH_RESTARTS" not in os.environ:
        raise RuntimeError({fault!r})
    return micro_batches(s, at, world)

batches.micro_batch_indices = faulty
"""


def test_after_a_gpu_fault_the_process_starts_again_and_ends_in_the_same_bits(
    tmp_path, uninterrupted_run
):
    code = IMPORT_TRAINER + FAULTY.format(step=6, fault=GPU_FAULT) + RUN_TRAINER
    args = ["--checkpoint-dir", tmp_path, "--max-iters", 12, "--json", "--refresh-data"]
    command = [sys.executable, "-c", code, *ARGS, *map(str, args)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (warning,) = [line for line in ran.stderr.splitlines() if line.startswith("warning: ")]
    assert GPU_FAULT in warning and "display sleep" in warning
    assert "newest checkpoint: restart 1 of at most 3" in warning
    pids = re.findall(r"^pid (\d+)$", ran.stderr, re.M)
    assert len(pids) == 2 and pids[0] == pids[1]
    assert ran.stderr.count("data: sample") == 2 and "continues" in ran.stderr
    steps = [m["step"] for m in map(json.loads, ran.stdout.splitlines()) if "loss" in m]
    assert steps == [*range(1, 7), *range(6, 13)]  # from the best one, of iteration 5
    assert equal_arrays(arrays(tmp_path, 12), arrays(uninterrupted_run, 12))


class Restarted(BaseException):
    """Stands for the next process, which execv starts in place of this one."""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Starts the trainer, whose GPU fails at the second update; gives how that ended."""

    def fails(s, step, world):
        seen.append(step)
        if len(seen) == 2:
            raise RuntimeError(GPU_FAULT)
        return micro_batches(s, step, world)

    def start(*args):
        seen.clear()
        arguments = [*ARGS, "--checkpoint-dir", str(tmp_path), *map(str, args)]
        monkeypatch.setattr(sys, "argv", ["train_mlx.py", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *sys.argv, "--refresh-data"])
        with pytest.raises(BaseException) as ending:
            train_mlx.main()
        return ending.value

    def execv(*command):
        raise Restarted(*command)

    seen = []
    micro_batches = batches.micro_batch_indices
    monkeypatch.setattr(batches, "micro_batch_indices", fails)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv(macos.RESTARTS, "")
    return start


def test_three_restarts_without_a_newer_checkpoint_are_the_last(faulty):
    for _ in range(3):
        restarted = faulty()
        assert type(restarted) is Restarted
        assert restarted.args == (sys.executable, [sys.executable, "-u", *sys.argv])
    given_up = faulty()
    assert type(given_up) is macos.GpuFault and given_up.exit_code == 1
    assert GPU_FAULT in str(given_up) and "\n" not in str(given_up)


def test_restarts_with_a_newer_checkpoint_between_them_go_on(faulty):
    endings = [faulty("--save-freq", 1) for _ in range(5)]
    assert [type(ending) for ending in endings] == [Restarted] * 5
    assert os.environ[macos.RESTARTS] == "1 [5]"


def test_a_process_that_does_more_than_this_run_is_not_restarted(tmp_path, faulty):
    with pytest.raises(macos.GpuFault):
        train(tmp_path, "--max-iters", 3)
