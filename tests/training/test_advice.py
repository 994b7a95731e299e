"""Warning signs in the metrics of a run, and what counting bytes would know."""

import math
import re

import numpy as np
import pytest
from helpers import ROOT, metrics, train

import train_mlx
from bdh_lib.data.split import Split
from bdh_lib.training.advice import (
    advise,
    byte_baselines,
    epochs_note,
    first_counted,
    ngram_cross_entropy,
    unigram_entropy,
)


def series(val, loss, start=5.6, **of_lines):
    """Metrics of evaluations every 20 updates, four logged losses between two of them."""
    history = [{"step": 0, "monitored_loss": start}]
    for i, (v, interval) in enumerate(zip(val, loss, strict=True)):
        line = {"grad_norm": 0.5, "skipped": 0, "lr": 1e-3} | of_lines
        history += [
            {"step": 20 * i + 5 * (j + 1), "loss": x} | line for j, x in enumerate(interval)
        ]
        history.append({"step": 20 * (i + 1), "monitored_loss": v})
    return history


def advised(history, *args, total=1000):
    s = train_mlx.read_settings(["--learning-rate", "1e-3", "--warmup-iters", "10", *args])
    return advise(history, s, total, baselines=(3.25, 2.5))


FALLING = [[4.0, 3.0, 2.8, 2.7], [2.6, 2.5, 2.4, 2.4], [2.3, 2.3, 2.2, 2.2]]


def test_a_healthy_course_gets_no_advice():
    for n in (1, 2, 3):
        assert advised(series([2.7, 2.4, 2.2][:n], FALLING[:n])) == {}
    assert advised(series([2.7, 2.4, 2.415], FALLING)) == {}  # a rise as small as chance
    assert advised(series([2.7], FALLING[:1])[:1]) == {}  # before anything was trained


def test_validation_that_rises_while_training_falls_is_overfitting():
    output = advised(series([2.7, 2.4, 2.5], FALLING), "--dropout", "0.1")["overfitting"]
    assert "from iteration 40 to 60 validation went from 2.4000 to 2.5000" in output
    assert "training loss from 2.4750 to 2.2500" in output and "dropout from 0.1 to 0.3" in output
    for dropout in ("0.5", "0.6"):  # more would not help
        output = advised(series([2.7, 2.4, 2.5], FALLING), "--dropout", dropout)["overfitting"]
        assert "dropout" not in output and "take more data" in output


@pytest.mark.parametrize(
    ("val", "loss", "lines", "complaint"),
    [
        ([2.7, 2.9], [FALLING[0], [3.2, 3.3, 3.4, 3.5]], {}, "validation went from 2.7000 to 2.9"),
        ([2.7, 2.6], [FALLING[0], [2.6, 3.6, 2.5, 2.4]], {}, "jumped from 2.6000 to 3.6000"),
        ([2.7, 2.4], FALLING[:2], {"grad_norm": 25.0}, "norm is 25, and GRAD_CLIP 1"),
        ([9.0], [[6.0, 7.0, 8.0, 9.0]], {}, "validation went from 5.6000 to 9.0000"),
    ],
)
def test_oscillation_and_hard_clipping_are_a_rate_too_high(val, loss, lines, complaint):
    output = advised(series(val, loss, **lines))["too_high"]
    assert complaint in output and "Lower LEARNING_RATE from 0.001 to 0.0003" in output


def test_skipped_updates_are_a_rate_too_high_once():
    history = series([2.7, 2.4], FALLING[:2])
    history[8]["skipped"] = history[9]["skipped"] = 3
    assert "3 updates were skipped" in advised(history)["too_high"]
    later = [m | {"skipped": 3} for m in series([2.7, 2.4, 2.2], FALLING)]
    assert advised(later) == {}


def test_a_loss_that_does_not_move_is_a_rate_too_low():
    slow = [[5.6, 5.59, 5.59, 5.58], [5.58, 5.57, 5.57, 5.56]]
    assert "from 0.001 to 0.003" in advised(series([5.58, 5.56], slow))["stuck"]
    still = [[2.4] * 4, [2.4] * 4]
    assert "n_embd from 256 to 512" in advised(series([2.4, 2.4], still, start=2.4))["stuck"]
    assert advised(series([2.4, 2.4], still, lr=1e-4)) == {}  # the cosine's end is slow rightly
    assert "stuck" not in advised(series([5.58, 5.56], slow), "--warmup-iters", "30")


def test_text_no_better_than_its_byte_frequencies_is_not_yet_coherent():
    history = series([3.3], [[5.0, 4.0, 3.5, 3.4]])
    output = advised(history)["not_coherent"]
    assert "4.76 bits per byte" in output and "gives 4.69" in output and "Go on" in output
    at_the_end = advised(history, "--max-iters", "20", total=20)["not_coherent"]
    assert at_the_end.endswith("Double MAX_ITERS (20)")
    by_epochs = advised(history, "--max-iters", "21", total=20)["not_coherent"]
    assert by_epochs.endswith(f"Double EPOCHS ({train_mlx.EPOCHS})")


def test_to_know_no_more_than_pairs_of_bytes_late_in_a_run_is_slow():
    history = series([2.9, 2.7, 2.6], [*FALLING[:2], [2.4, 2.4, 2.3, 2.3]])
    low = "--learning-rate", "5e-5"
    output = advised(history, *low, total=200)["slow"]
    assert "3.75 bits per byte after 60 of 200" in output and "which gives 3.61" in output
    assert "Raise LEARNING_RATE from 5e-05 to 0.001" in output
    assert advised(history, *low, total=1000) == advised(history, total=200) == {}
    assert advised(history, *low, "--warmup-iters", "31", total=200) == {}


def test_what_counting_knows_is_that_of_the_bytes_that_count():
    train = np.array([1, 2, 1, 3] * 5000, np.uint8)  # after 1 two bytes are as likely
    fields = np.tile(np.array([0, 3], np.uint8), 10000)
    every, answers = (
        byte_baselines(on, Split(train, fields), Split(train, fields)) for on in ("all", "response")
    )
    assert every[1] == pytest.approx(math.log(2) / 2, abs=0.01)
    assert every == (unigram_entropy(train), ngram_cross_entropy(train, train, 1))
    assert answers == (
        unigram_entropy(train[1::2]),
        ngram_cross_entropy(train[1::2], train[1::2], 1),
    )
    never_seen = np.array([1, 9], np.uint8), fields[:2]
    assert byte_baselines("all", Split(train, fields), Split(*never_seen))[1] > 10


def test_the_unigram_entropy_is_that_of_the_byte_frequencies():
    assert unigram_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(math.log(256))
    assert unigram_entropy(np.array([7, 7, 9, 9, 9, 9], np.uint8)) == pytest.approx(
        -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    )


PROVOKE = (
    "--n-layer 2 --n-embd 32 --n-head 4 --mlp-internal-dim-multiplier 16 --batch-size 8 "
    "--eval-bytes 4000 --log-freq 5 --eval-freq 20 --save-freq 999 --warmup-iters 10 "
    "--lr-decay-iters 100 --patience none"
)


@pytest.mark.parametrize(
    ("args", "signs"),
    [
        ("--learning-rate 4e-3 --max-iters 100", {"not_coherent"}),  # early alone
        ("--learning-rate 1e-5 --max-iters 60", {"not_coherent", "stuck"}),
        ("--learning-rate 1 --max-iters 20", {"too_high"}),
        (
            "--learning-rate 9.9e-4 --max-iters 100 --n-embd 64 --eval-freq 50 "
            "--lr-decay-iters 2000 --block-size 64",
            {"slow"},
        ),
        ("--learning-rate 1e-2 --dropout 0 --max-iters 120 --dataset few", {"overfitting"}),
    ],
)
def test_runs_made_to_show_a_sign_are_told_so(tmp_path, capsys, args, signs):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((ROOT / "bdh_lib/data/sample.jsonl").read_text().splitlines()[:3]))
    train(tmp_path, *PROVOKE.split(), *args.replace("few", str(few)).split())
    result = [m["advice"] for m in metrics(tmp_path) if "val_loss" in m]
    assert result[0] == {} and signs <= {sign for advice in result for sign in advice}
    assert capsys.readouterr().out.count("advice: ") == sum(map(len, result))
    if "4e-3" in args:
        assert result[-1] == {} and {sign for advice in result for sign in advice} == signs


def test_without_clipping_the_advice_still_comes(tmp_path):
    assert train(tmp_path, "--max-iters", 10, "--grad-clip", "none") == 0
    evaluations = [m for m in metrics(tmp_path) if "val_loss" in m]
    assert len(evaluations) > 1 and all("advice" in m for m in evaluations)


def test_counting_reads_the_first_million_of_the_bytes_that_count():
    """A book of more than a million bytes stands before the first response."""
    book, answers = np.full(1_500_000, 65, np.uint8), np.frombuffer(b"abcabd" * 50, np.uint8)
    stream = np.concatenate([book, answers])
    fields = np.repeat(np.array([4, 3], np.uint8), [len(book), len(answers)])
    side = (stream, fields)
    expected = (unigram_entropy(answers), ngram_cross_entropy(answers, answers, 1))
    assert byte_baselines("response", Split(*side), Split(*side)) == expected
    assert len(first_counted("response", np.tile(answers, 5000), np.full(1_500_000, 3))) == 10**6


@pytest.mark.parametrize("n_train", [0, 1, 2, 3, 4, 50])
@pytest.mark.parametrize("n_val", [0, 1, 2, 3, 4, 50])
def test_streams_shorter_than_the_order_are_counted_too(n_train, n_val):
    train, val = (np.arange(n, dtype=np.uint8) for n in (n_train, n_val))
    for order in range(4):
        nats = ngram_cross_entropy(train, val, order)
        assert math.isfinite(nats) and nats > 0
        if not n_train or n_val <= order:
            assert nats == pytest.approx(math.log(256)), "all bytes are as likely"
    labels = [np.full(n, 3) for n in (n_train, n_val)]
    assert np.isfinite(
        byte_baselines("response", Split(train, labels[0]), Split(val, labels[1]))
    ).all()


@pytest.mark.parametrize(
    "n_bytes, flags, note",
    [
        (120_000, "", "13.1 epochs over 120,000 bytes; on 0.1 MB .* best after 12 epochs$"),
        (
            480_000,
            "--epochs 3",
            "3.0 epochs over 480,000 bytes; on 0.5 MB .* best after 9 to 10 epochs$",
        ),
        (40_960_000, "", "1.3 epochs over 40,960,000 bytes; on 46 MB .* --dropout 0.1 took [^;]*$"),
        (
            51_200_000,
            "",
            "1.1 epochs over 51,200,000 bytes; on 46 MB .*; more bytes were not measured",
        ),
        (4_200_000, "", None),
        (120_000, "--n-embd 64", None),
        (2_820, "--preset tiny", "409 epochs over 2,820 bytes may overfit; .*--epochs 10"),
        (77_946, "--preset tiny", "15 epochs over 77,946 bytes may overfit"),
        (96_000, "--preset tiny", None),  # 12 epochs
        (100_000, "--preset tiny --max-iters 9000", None),
        (2_820, "--preset tiny --epochs 10", None),
    ],
)
def test_the_best_epochs_of_other_sizes_of_data_are_said(n_bytes, flags, note):
    line = epochs_note(train_mlx.read_settings(flags.split()), n_bytes)
    assert re.match(note, line) if note else line is None
