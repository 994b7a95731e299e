"""Several processes train one run: the same losses, one writer, decisions taken together."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import ARGS, IMPORT_TRAINER, ROOT, TRAINER, metrics, train

import train_mlx
from bdh_lib import runs
from bdh_lib.training import checkpoints, dataset, distributed
from bdh_mlx import UserError

SCRIPT = [*TRAINER, *ARGS]


def free_ports(n):
    """Below those that outgoing connections get, one of which could take them meanwhile."""
    free = []
    while len(free) < n:
        port = random.randrange(10_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.append(port)
    return free


def start(folder, *command):
    """Two processes as mlx.launch starts them, in a ring on this machine."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return [subprocess.Popen(command, env=env | {"MLX_RANK": str(r)}, **pipes) for r in (0, 1)]


def ended(processes):
    """(exit code, stdout, stderr) of each."""
    output = [p.communicate(timeout=60) for p in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, output, strict=True)]


def on_two(folder, *args):
    return ended(start(folder, *SCRIPT, "--checkpoint-dir", folder, *args))


def losses(folder):
    return {m["step"]: m["loss"] for m in metrics(folder) if "loss" in m}


def validations(folder):
    return {m["step"]: m["val_loss"] for m in metrics(folder) if "val_loss" in m}


def near(a, b):
    return a.keys() == b.keys() and np.allclose(list(a.values()), list(b.values()), 0, 1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process whose two batches an update are those of two processes, dropout and all."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, "--max-iters", 10, "--grad-accum", 2) == 0
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    (code, out, err), (other, silent, _) = on_two(folder, "--max-iters", 10)
    assert (code, other) == (0, 0), err
    assert "best_step" in out and silent == ""
    return folder


def test_an_equal_global_batch_gives_equal_losses(alone, both):
    assert near(losses(both), losses(alone)) and near(validations(both), validations(alone))
    assert len(losses(both)) == 10 and list(validations(both)) == [0, 5, 10]
    assert not near(losses(both), {k: v + 2e-5 for k, v in losses(alone).items()})


def test_one_large_batch_gives_them_too(tmp_path):
    for folder, size in (("one", 4), ("two", 2)):
        (tmp_path / folder).mkdir()
        args = ("--max-iters", 3, "--batch-size", size, "--dropout", 0, "--eval-freq", 9)
        if size == 4:
            train(tmp_path / folder, *args)
        else:
            assert [code for code, *_ in on_two(tmp_path / folder, *args)] == [0, 0]
    assert near(losses(tmp_path / "one"), losses(tmp_path / "two"))


def test_only_the_first_process_writes(both):
    names = {f.name for f in (both / "full").iterdir()}
    assert {"best.json", "config.json", "step-000010"} <= names
    assert len([m for m in metrics(both) if "loss" in m]) == 10  # each line once
    assert json.loads((both / "full" / "config.json").read_text())["settings"]["PROCESSES"] == 2


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone):
    assert train(tmp_path, "--max-iters", 4, "--grad-accum", 2) == 0  # one
    assert [code for code, *_ in on_two(tmp_path, "--max-iters", 7)] == [0, 0]  # two
    with pytest.raises(UserError, match="BATCH_SIZE x GRAD_ACCUM x processes: there 4, here 2"):
        train(tmp_path, "--max-iters", 10)
    assert train(tmp_path, "--max-iters", 10, "--grad-accum", 2) == 0  # one
    assert near(losses(tmp_path), losses(alone))


def wait_for(process, text):
    for line in process.stdout:
        if line.startswith(text):
            return
    pytest.fail(process.stderr.read())


def test_a_signal_to_any_process_stops_all_with_the_work_saved(tmp_path):
    processes = start(tmp_path, *SCRIPT, "--checkpoint-dir", tmp_path, "--max-iters", 10**6)
    wait_for(processes[0], "iter      6")
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other, _, _) = ended(processes)
    assert (code, other) == (143, 143), err
    assert "the same command continues it" in out
    assert runs.steps(tmp_path / "full")[-1] == len(losses(tmp_path))


def test_a_lost_process_ends_the_run_with_its_checkpoints_intact(tmp_path):
    processes = start(tmp_path, *SCRIPT, "--checkpoint-dir", tmp_path, "--max-iters", 10**6)
    wait_for(processes[0], "iter      6")
    processes[1].kill()
    (code, _, err), _ = ended(processes)
    # MLX's threads write their own lines beside ours, in pieces that mix
    assert code == 1 and err.count("error: ") == err.count("error: process 0 lost another one") == 1
    assert "Traceback" not in err and "the same command continues" in err
    last = checkpoints.newest_valid(tmp_path / "full")
    assert last >= 4 and not list((tmp_path / "full").glob("damaged*"))
    assert train(tmp_path, "--max-iters", last + 1, "--grad-accum", 2) == 0


def test_processes_with_different_data_are_told(tmp_path):
    processes = []
    (tmp_path / "hosts.json").write_text(
        json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)])
    )
    for rank in (0, 1):
        env = {"MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": str(rank)}
        args = ["--checkpoint-dir", tmp_path / str(rank), "--seed", rank]
        command = [sys.executable, *SCRIPT, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | env, **pipes))
    for code, _, err in ended(processes):
        assert code == 2 and "the processes differ in SEED" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"MINE": 2}, "MINE"),
        ({"OTHERS": 3}, "OTHERS"),
        ({"SEED": 0, "n_layer": 9}, "SEED, n_layer"),
        ({"train": "other bytes"}, "train"),
    ],
)
def test_processes_that_differ_in_a_setting_or_in_data_are_told(change, names):
    s, world = train_mlx.read_settings([]), distributed.World()
    s.MINE = 1  # a constant that the user added
    report = {side: {"sha256": side} for side in ("train", "val")}
    world.all_gather_object = lambda value: [value, value]
    dataset.check_processes_agree(s, report, world)
    world.all_gather_object = lambda value: [value, value, value | change]
    with pytest.raises(UserError, match=f"the processes differ in {names}; give all the same$"):
        dataset.check_processes_agree(s, report, world)


FAULTY = """
import os, sys
sys.path.insert(0, {root!r})
import train_mlx
from bdh_lib.script import cli
from bdh_lib.training import batches
n_targets, calls = batches.n_targets_in_step, []

def faulty(*args):
    calls.append(args)
    if len(calls) == 6 and os.environ["MLX_RANK"] == "1":
        raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error")
    return n_targets(*args)

batches.n_targets_in_step = faulty
cli.run_main(train_mlx.main, "train_mlx.py")
"""


def test_a_gpu_fault_of_one_process_ends_all_and_restarts_none(tmp_path):
    code = FAULTY.format(root=str(ROOT))
    args = ("--checkpoint-dir", tmp_path, "--max-iters", 10**6)
    first, second = ended(start(tmp_path, "-c", code, *ARGS, *args))
    assert (first[0], second[0]) == (1, 1)
    assert "process 0 lost another one" in first[2]
    assert second[2].count("error: macOS ended the GPU's work: [METAL] ") == 1
    assert "Traceback" not in second[2] and "newest checkpoint" not in second[2]
    assert checkpoints.newest_valid(tmp_path / "full") >= 4


OTHER_CLOCK = """
import os
from types import SimpleNamespace
from bdh_lib.training import runlog
clock = (lambda: 0.0) if os.environ["MLX_RANK"] == "{stopped}" else runlog.time.monotonic
runlog.time = SimpleNamespace(monotonic=clock)
sys.exit(train_mlx.main())
"""


@pytest.mark.parametrize(("stopped", "saved"), [(0, [6]), (1, [4, 5, 6])])
def test_the_clock_of_the_first_process_says_when_to_save(tmp_path, stopped, saved):
    code = IMPORT_TRAINER + OTHER_CLOCK.format(stopped=stopped)
    args = ("--max-iters", 6, "--save-freq", 99, "--eval-freq", 99, "--save-minutes", 1e-9)
    processes = start(tmp_path, "-c", code, *ARGS, "--checkpoint-dir", tmp_path, *args)
    assert [code for code, *_ in ended(processes)] == [0, 0]
    assert runs.steps(tmp_path / "full") == saved


TOGETHER = """
import math, sys
sys.path.insert(0, {root!r})
import bdh_mlx
import mlx.core as mx
from bdh_lib.training.distributed import World
p = World()
values = p.all_gather_object([p.rank, 0.1 + p.rank, "å" * (3 * p.rank)])
assert values == [[0, 0.1, ""], [1, 1.1, "ååå"]], values
assert p.broadcast_object({{"first": p.rank}}) == {{"first": 0}}
assert math.isinf(p.broadcast_object(math.inf))
total = p.all_reduce_sum((mx.array(1.0 + p.rank), {{"a": mx.full((2, 3), 10.0 * p.rank)}}))
assert total[0].item() == 3 and mx.all(total[1]["a"] == 10).item()
bad = p.all_reduce_sum((mx.array(math.nan if p.rank else 1.0), mx.ones(3)))
assert math.isnan(bad[0].item())  # all skip an update that one cannot make
state = p.broadcast({{"step": mx.array(7 + p.rank, mx.uint64), "w": mx.ones(4) * p.rank}})
assert state["step"].item() == 7 and state["step"].dtype == mx.uint64 and not mx.any(state["w"])
p.barrier()
print("agreed")
"""


def test_what_processes_tell_each_other_arrives(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER.format(root=str(ROOT)))
    for code, out, err in ended(start(tmp_path, script)):
        assert code == 0 and out == "agreed\n", err


@pytest.mark.parametrize(
    ("rank", "hosts"),
    [
        ("0", None),
        ("0", "junk"),
        ("0", "null"),
        ("0", "[]"),
        ("0", '[["a:1"]]'),
        ("0", '["a", "b"]'),
        ("0", "[[], []]"),
        ("5", '["a:1", "b:1"]'),
        ("abc", '["a:1", "b:1"]'),
        ("-1", '["a:1", "b:1"]'),
    ],
)
def test_an_environment_by_which_no_processes_meet_is_told(tmp_path, rank, hosts):
    file = tmp_path / "hosts.json"
    if hosts:
        file.write_text(hosts)
    env = os.environ | {"MLX_RANK": rank, "MLX_HOSTFILE": str(file)}
    code = "import sys, bdh_lib.training.distributed as d\n"
    code += "try: d.World()\nexcept d.UserError as error: sys.exit(f'error: {error}')"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True)
    assert done.stderr.decode().startswith(f"error: MLX_RANK is {rank} and MLX_HOSTFILE {file}, ")


def test_sums_are_evaluated_before_anything_reads_them(monkeypatch):
    """Else a GPU would wait for the slowest process, which macOS allows for seconds only."""
    done = []
    world = distributed.World()
    world.size = 2
    # The other process gives the same
    monkeypatch.setattr(
        mx.distributed, "all_sum", lambda array, **_: done.append("sum") or 2 * array
    )
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda array: done.append("eval") or evaluate(array))
    loss, gradients = world.all_reduce_sum((mx.array(1.0), {"a": mx.ones(3), "b": mx.zeros(2)}))
    assert done == ["sum", "eval"] * 3
    assert loss.item() == 2 and mx.all(gradients["a"] == 2).item()


def test_the_launcher_of_mlx_starts_them(tmp_path):
    """It returns 0 whatever happened: the run folder says."""
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring"]
    launch += ["-p", str(free_ports(1)[0]), "--", sys.executable, *SCRIPT]
    ran = subprocess.run(
        [*launch, "--checkpoint-dir", str(tmp_path), "--max-iters", "2"],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "iterations: 2" in ran.stdout, ran.stderr
    assert json.loads((tmp_path / "full" / "config.json").read_text())["settings"]["PROCESSES"] == 2


@pytest.mark.parametrize("action", ["--plan", "--tune", "--selfcheck"])
def test_what_one_process_does_is_refused_under_mlx_launch(tmp_path, monkeypatch, action):
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="take one process: leave out"):
        train_mlx.main([action])
