"""Which MEMORY_MODE a run takes, and what is said where none fits or memory runs out."""

import pytest

import train_mlx
from bdh_lib.compute import memory
from bdh_lib.errors import UserError
from bdh_lib.training import memory_plan

SMALLER = (
    "BATCH_SIZE 1, GRAD_ACCUM 2 (with MEMORY_MODE small: 3.3 GB); BLOCK_SIZE 1024 (with "
    "MEMORY_MODE small: 3.4 GB); n_embd 128 (with MEMORY_MODE small: 1.4 GB)"
)


@pytest.fixture
def settings(monkeypatch):
    """Gives the default settings with a MEMORY_MODE, where so many GB are available."""

    def make(mode, gb):
        monkeypatch.setattr(memory, "on_gpu", lambda: False)
        monkeypatch.setattr(memory, "available_bytes", lambda: gb * 1e9)
        return train_mlx.read_settings(["--memory-mode", mode])

    return make


@pytest.mark.parametrize(("gb", "mode"), [(12, "fast"), (5, "balanced"), (4.1, "small")])
def test_auto_is_the_fastest_mode_that_fits(settings, gb, mode):
    assert memory_plan.select_mode(settings("auto", gb))[0] == mode


def test_what_does_not_fit_is_refused_with_what_would(settings):
    s = settings("auto", 2.4)
    with pytest.raises(UserError) as error:
        memory_plan.select_mode(s)
    assert str(error.value) == (
        "a step on 2 blocks of 2,048 bytes needs about 4.0 GB, 2.4 GB are available. What fits: "
        "BLOCK_SIZE 256 (with MEMORY_MODE small: 2.3 GB); BATCH_SIZE 1, BLOCK_SIZE 512 (with "
        "MEMORY_MODE small: 2.3 GB); n_embd 128 (with MEMORY_MODE small: 1.4 GB). "
        "--ignore-memory-check starts all the same"
    )
    s.IGNORE_MEMORY_CHECK = True
    assert memory_plan.select_mode(s)[0] == "small"


@pytest.mark.parametrize(
    ("mode", "gb", "fits"),
    [
        ("fast", 12, f"MEMORY_MODE small (4.0 GB); {SMALLER}"),
        ("auto", 12, f"MEMORY_MODE small (4.0 GB); {SMALLER}"),
        ("auto", 4.1, SMALLER),  # small is what auto took
        ("small", 12, SMALLER),
        ("small", 0.01, "nothing near"),
    ],
)
def test_small_is_no_advice_where_it_is_what_ran(settings, mode, gb, fits):
    assert memory_plan.what_fits(settings(mode, gb)) == f"What fits: {fits}"


@pytest.mark.parametrize(
    "text",
    [
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
        "[malloc] Unable to allocate 9 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:...)",
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
        "buffer size",
    ],
)
def test_running_out_of_memory_ends_in_what_fits(text, settings, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError(text)

    settings("small", 12)
    monkeypatch.setattr(train_mlx, "train", fails)
    with pytest.raises(UserError) as error:
        train_mlx.main(["--checkpoint-dir", str(tmp_path), "--memory-mode", "small"])
    assert str(error.value) == f"memory is out. What fits: {SMALLER}"


def test_arrays_that_no_gpu_addresses_are_refused_with_what_fits(monkeypatch):
    for module in (memory, memory_plan):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1e12)
    args = ["--batch-size", "128", "--block-size", "512"]
    with pytest.raises(UserError, match=r"needs arrays of 2\^31 elements.*BATCH_SIZE 64, GRAD_ACC"):
        memory_plan.select_mode(train_mlx.read_settings(args))
    ignored = train_mlx.read_settings([*args, "--ignore-memory-check"])
    _, compute, peak = memory_plan.select_mode(ignored)
    memory.set_mlx_memory_limit(peak, compute)  # sets none
