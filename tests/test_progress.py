"""Signs of life: a bar on a terminal, lines elsewhere."""

import fcntl
import io
import os
import struct
import termios
import time

import mlx.core as mx
import numpy as np
import pytest
from helpers import train

from bdh_lib import progress
from bdh_lib.data import parsers
from bdh_lib.data.split import Split
from bdh_lib.generation import samples
from bdh_lib.generation.decoding import Decoding, generate_batch, read_prompt
from bdh_lib.generation.sampling import Sampling
from bdh_lib.loss import evaluate
from bdh_lib.training import batches, evaluator
from bdh_mlx import BDH, BDHConfig


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A line for each update where there is no terminal."""
    monkeypatch.setattr(progress, "LINE_EVERY", -1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch):
    assert [*progress.counted("ab", "copying", "files")] == ["a", "b"]
    assert capsys.readouterr() == ("copying: 1 files ...\ncopying: 2 files ...\n", "")
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr(progress, "DELAY", 0)
    with progress.Progress("reading", 10, "bytes") as shown:
        shown.update(4)
        shown.bar.refresh()
        assert "reading:  40%" in shown.bar.fp.getvalue()
    assert capsys.readouterr().out == ""


def test_lines_on_a_terminal_that_tells_no_size(capsys, monkeypatch):
    main, end = os.openpty()  # of 0 columns
    with os.fdopen(end, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        assert [*progress.counted("a", "copying", "files")] == ["a"]
        assert capsys.readouterr().out == "copying: 1 files ...\n"
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        assert [*progress.counted("a", "copying", "files")] == ["a"]
        assert capsys.readouterr().out == ""
    os.close(main)


def test_what_is_quick_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 4)
    assert [*progress.counted("ab", "copying", "files")] == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_heartbeat_speaks_where_nothing_else_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)
    with progress.heartbeat("preparing"):
        for _ in range(30):  # pieces of work that are each too short for a line
            assert [*progress.counted("a", "copying", "files")] == ["a"]
            time.sleep(0.01)
    assert "preparing: 0 s ...\n" in capsys.readouterr().out
    monkeypatch.setattr(progress, "LINE_EVERY", 60)
    with progress.heartbeat("preparing"):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_a_line_puts_off_the_next_heartbeat():
    before = time.monotonic()
    assert [*progress.counted("a", "copying", "files")] == ["a"]
    assert progress.Progress.last_shown >= before


@pytest.mark.parametrize("item", ["{}", "1", "1.5", '"a"'])
def test_a_heartbeat_speaks_while_a_large_document_is_parsed(capsys, monkeypatch, item):
    monkeypatch.setattr(progress, "POLL", 0.001)
    with progress.heartbeat("parsing"):
        assert len(parsers.parse_exactly(f"[{f'{item},' * 1_500_000}{item}]")) == 1_500_001
    assert capsys.readouterr().out.count("parsing: 0 s ...\n") > 3


def test_a_long_prompt_a_batch_and_an_evaluation_show_how_far_they_are(capsys):
    model = BDH(BDHConfig(n_layer=1, n_embd=8, n_head=1, mlp_internal_dim_multiplier=2))
    read_prompt(model, np.zeros((1, 5000), np.int32))
    assert "reading the prompt: 1,024 of 5,000 bytes ...\n" in capsys.readouterr().err
    [*generate_batch(Decoding(model, Sampling(), mx.random.key(0), [], 6), [b"aaa", b"b"])]
    assert "writing a batch: 7 of 8 bytes each ...\n" in capsys.readouterr().err
    text = np.zeros(101, np.uint8)
    evaluate(lambda idx, targets: mx.zeros(idx.shape), Split(text, text), (2, 10))
    assert "evaluating: 20 of 100 bytes ...\n" in capsys.readouterr().out


def test_updates_are_told_up_to_the_first_line_of_the_log(tmp_path, capsys):
    train(tmp_path, "--max-iters", "6", "--log-freq", "3")
    out = capsys.readouterr().out
    assert "training: 1 of 6 iterations ...\ntraining: 2 of 6" in out
    assert "iter      3 |" in out and "training: 4 of 6" not in out


@pytest.fixture
def fast_heart(monkeypatch):
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.1)


def slowed(function):
    """The same function, but slower than a line of progress may be late."""

    def slow(*args, **options):
        time.sleep(0.3)
        return function(*args, **options)

    return slow


def test_a_slow_first_update_shows_life_up_to_the_first_line_of_the_log(
    tmp_path, capsys, monkeypatch, fast_heart
):
    monkeypatch.setattr(batches, "get_batch", slowed(batches.get_batch))
    train(tmp_path, "--max-iters", 4, "--log-freq", 2)
    before, after = capsys.readouterr().out.split("iter      2 | loss")
    assert "training: 0 s ..." in before and "training: 0 s ..." not in after


@pytest.mark.parametrize("name", ["evaluate", "neuron_activity", "complete_prompts"])
def test_each_slow_part_of_an_evaluation_shows_life(
    name, tmp_path, capsys, monkeypatch, fast_heart
):
    what = {"neuron_activity": "counting active neurons", "complete_prompts": "writing samples"}
    if name == "evaluate":
        losses = slowed(lambda idx, targets: mx.zeros(idx.shape))
        evaluate(losses, Split(*np.zeros((2, 9), np.uint8)), (1, 8))
    else:
        owner = samples if name == "complete_prompts" else evaluator
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
        train(tmp_path, "--max-iters", 1, "--sample-bytes", 1)
    assert f"{what.get(name, 'evaluating')}: 0 s ..." in capsys.readouterr().out
