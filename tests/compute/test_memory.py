"""What memory a run may take, in a container or a service with a limit of its own."""

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bdh_lib.compute import device, memory
from bdh_lib.compute.layer import segments
from bdh_mlx import BDHConfig

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Makes a tree of control groups: of each folder limit, use and page cache; gives the rooms."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def make(own, version, tree):
        (tmp_path / "own").write_text(own)
        limit, used, cached = memory.CGROUP_FILES[version]
        for folder, (most, now, cache) in tree.items():
            group = tmp_path / "cgroup" / folder
            group.mkdir(parents=True, exist_ok=True)
            (group / limit).write_text(f"{most}\n")
            (group / used).write_text(f"{now}\n")
            (group / "memory.stat").write_text(f"anon 5\n{cached} {cache}\nfile 7\n")
        return memory.cgroup_headroom(tmp_path / "own")

    return make


def test_the_tightest_limit_on_the_way_up_counts(groups):
    own = "0::/user.slice/job.scope\n"
    tree = {
        "user.slice/job.scope": ("max", 2 * GB, 0),
        "user.slice": (5 * GB, 3 * GB, 0),
        "user.slice/other.scope": (GB, GB, 0),  # of others
        ".": (64 * GB, 9 * GB, 0),
    }
    assert min(groups(own, 2, tree)) == 2 * GB
    tree["user.slice/job.scope"] = (4 * GB, 3 * GB, GB // 2)
    assert min(groups(own, 2, tree)) == 1.5 * GB  # page cache is given back when asked for


def test_version_1_and_a_container_that_sees_its_root_alone(groups):
    own = "5:devices:/x\n4:cpu,memory:/docker/123\n0::/\n"
    tree = {"memory": (4 * GB, GB, GB // 4)}  # no docker/123 below it
    assert min(groups(own, 1, tree)) == 3.25 * GB
    assert min(groups("5:devices:/x\n", 1, tree)) == math.inf


@pytest.mark.parametrize("content", ["", "max", "x y", "-"])
def test_what_cannot_be_read_is_no_limit(groups, tmp_path, content):
    assert min(groups("0::/", 2, {".": (content, 5, 5)})) == math.inf
    (tmp_path / "own").write_text("odd\n")
    assert memory.cgroup_headroom(tmp_path / "none") == [math.inf]
    assert memory.cgroup_headroom(tmp_path / "own") == [math.inf]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux alone has it")
def test_available_is_what_the_limit_leaves(monkeypatch):
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    monkeypatch.setattr(memory, "cgroup_headroom", lambda: [math.inf])
    free = memory.available_bytes()
    assert 0 < free < math.inf
    monkeypatch.setattr(memory, "cgroup_headroom", lambda: [math.inf, free / 2])
    assert memory.available_bytes() == pytest.approx(0.9 * free / 2)
    monkeypatch.setattr(memory, "cgroup_headroom", lambda: [math.inf, -5.0])
    assert memory.available_bytes() == 0


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3857.
Pages active:                            446206.
Pages inactive:                          443760.
Pages speculative:                         1075.
Pages throttled:                              0.
Pages wired down:                        181483.
Pages purgeable:                          17340.
"Translation faults":                8667427138.
File-backed pages:                       294894.
Pages occupied by compressor:            442179.
"""


@pytest.fixture
def mac(monkeypatch):
    """Stands for a Mac: gives the free bytes by what vm_stat prints, or an error of it."""

    def available(vm_stat, working_set=12e9):
        def run(command, **options):
            assert command == ["/usr/bin/vm_stat"] and not options["close_fds"]
            if isinstance(vm_stat, Exception):
                raise vm_stat
            return subprocess.CompletedProcess(command, 0, vm_stat, "")

        memory.mac_free_memory.cache_clear()
        monkeypatch.setattr(memory.sys, "platform", "darwin")
        monkeypatch.setattr(memory.subprocess, "run", run)
        info = {"max_recommended_working_set_size": working_set} if working_set else {}
        monkeypatch.setattr(memory.mx, "device_info", lambda: info)
        return memory.available_bytes()

    yield available
    memory.mac_free_memory.cache_clear()


def test_a_mac_has_what_other_programs_leave(mac):
    free = 0.9 * 16384 * (3857 + 443760 + 1075)  # 6.6 GB of 25
    assert mac(VM_STAT) == mac(VM_STAT, None) == pytest.approx(free)
    assert mac(VM_STAT, 5e9) == 5e9
    assert mac(VM_STAT.replace("443760", "999999")) == 12e9


@pytest.mark.parametrize(
    "fault",
    [OSError(), subprocess.TimeoutExpired("vm_stat", 10), "", VM_STAT.replace("free", "unused")],
)
def test_a_mac_whose_vm_stat_fails_has_a_share_of_its_memory(mac, fault):
    memory_size = memory.os.sysconf("SC_PHYS_PAGES") * memory.os.sysconf("SC_PAGE_SIZE")
    assert mac(fault, None) == 0.6 * memory_size
    assert mac(fault, 10**6) == 10**6


@pytest.mark.parametrize(
    ("on_gpu", "metal", "rows", "chunk"),
    [
        (True, True, 2048, 256),
        (True, False, 32768, 512),
        (False, True, 1024, 512),
        (False, False, 1024, 512),
    ],
)
def test_segments_and_chunks_are_short_on_metal_alone(monkeypatch, on_gpu, metal, rows, chunk):
    for module in (device, memory):
        monkeypatch.setattr(module, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(memory.mx.metal, "is_available", lambda: metal)
    config, compute = BDHConfig(), memory.compute_for(BDHConfig(), "fast", "bfloat16")
    assert (compute.segment_rows, compute.chunk) == (rows, chunk)
    parts = segments(2, 4096, compute)  # of the default batch
    assert max(end - begin for begin, end in parts) == min(4096, rows // 2)
    wide = replace(config, mlp_internal_dim_multiplier=4096)  # one array must fit into a buffer
    assert memory.compute_for(wide, "fast", "bfloat16").segment_rows == min(rows, 1024)
    assert memory.compute_for(BDHConfig(n_embd=64), "fast", "bfloat16").chunk == 128


@pytest.mark.parametrize(
    ("dtype", "metal", "before", "after"),
    [
        ("float32", True, {}, {"MLX_ENABLE_TF32": "0"}),
        ("float32", True, {"MLX_ENABLE_TF32": "1"}, {"MLX_ENABLE_TF32": "1"}),
        ("auto", True, {}, {}),
        ("bfloat16", True, {}, {}),
        ("float32", False, {}, {}),
    ],
)
def test_float32_on_metal_has_all_its_bits(monkeypatch, dtype, metal, before, after):
    monkeypatch.setattr(memory.os, "environ", before)
    monkeypatch.setattr(memory, "on_metal", lambda: metal)
    memory.keep_float32_exact(dtype)
    assert before == after


@pytest.mark.parametrize(
    ("on_gpu", "metal", "mode", "available", "limit"),
    [
        (True, True, "fast", 48, 15),  # GB, of a peak of 10
        (True, True, "small", 20, 14),
        (True, True, "fast", 11, 9.5),
        (True, False, "fast", 80, 30),
        (True, False, "fast", 48, 24),
        (True, False, "fast", 11, 9.5),
        (True, False, "small", 80, 9.5),
        (False, True, "fast", 48, 10 / memory.CPU_AHEAD),
        (False, False, "small", 48, 10 / memory.CPU_AHEAD),
    ],
)
def test_the_limit_leaves_room_to_run_ahead(monkeypatch, on_gpu, metal, mode, available, limit):
    limits = []
    for module in (device, memory):
        monkeypatch.setattr(module, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(memory.mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(memory, "available_bytes", lambda: available * GB)
    monkeypatch.setattr(memory.mx, "set_memory_limit", limits.append)
    memory.set_mlx_memory_limit(
        10 * GB, memory.Compute(saved_activations=memory.MODES[mode].saved_activations)
    )
    assert limits == [int(limit * GB)]
    memory.set_mlx_memory_limit(
        10 * GB, memory.Compute(saved_activations=memory.MODES[mode].saved_activations, groups=2)
    )
    assert len(limits) == 1 + on_gpu


@pytest.mark.parametrize(
    ("text", "is_fault"),
    [
        ("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInter", True),
        ("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)", True),
        ("Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPUCommand", True),
        ("Internal Error (0000000e:Internal Error)", True),
        ("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)", False),
    ],
)
def test_a_gpu_fault_is_told_from_exhausted_memory(text, is_fault):
    error = RuntimeError(f"[METAL] Command buffer execution failed: {text}")
    assert (memory.is_gpu_fault(error), memory.is_exhausted(error)) == (is_fault, not is_fault)
    assert not memory.is_gpu_fault(RuntimeError(text))
