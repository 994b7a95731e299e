"""Which bytes the loss counts, in training and in validation, and its mean by field."""

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import arrays, metrics, train

import bdh_mlx
import train_mlx
from bdh_lib import loss, runs
from bdh_lib.data.formats import FIELDS, LABEL_OF
from bdh_lib.data.split import Split
from bdh_lib.generation import export
from bdh_lib.loss import byte_losses, evaluate
from bdh_lib.training import batches, report
from bdh_mlx import UserError

RESPONSE = FIELDS.index("response")


def settings(*args):
    small = "--block-size 8 --batch-size 2 --grad-accum 2 --training-mode full --loss-on response"
    return train_mlx.read_settings([*small.split(), *args])


def test_the_weights_count_response_targets_alone_and_sum_to_one_over_a_step():
    fields = np.random.default_rng(0).permutation(np.repeat([0, RESPONSE], [90, 10])).astype("u1")
    s, split = settings(), Split(fields, fields, np.arange(5, 105, 5))  # bytes as their own fields
    assert s.SHUFFLE_RECORDS
    for step in range(5):
        count = batches.n_targets_in_step(split, step, s)
        micro_batches = [batches.get_batch(split, 2 * step + i, s, count) for i in (0, 1)]
        weights = np.array([batch.loss_weights for batch in micro_batches])
        targets = np.array([batch.targets for batch in micro_batches])
        assert np.array_equal(weights > 0, targets == RESPONSE)
        assert weights.sum() == pytest.approx(1 if weights.any() else 0, rel=1e-5)
        assert len(np.unique(weights[weights > 0])) <= 1  # unequal batches, equal bytes


def test_without_a_field_to_count_all_targets_have_one_weight():
    every = settings("--loss-on", "all")
    fields = np.random.default_rng(0).permutation(np.repeat([0, RESPONSE], [90, 10])).astype("u1")
    split = Split(fields, fields, np.arange(5, 105, 5))
    count = batches.n_targets_in_step(split, 0, every)
    micro_batches = [batches.get_batch(split, i, every, count) for i in (0, 1)]
    assert np.all(np.array([batch.loss_weights for batch in micro_batches]) == np.float32(1 / 32))


@pytest.mark.parametrize("loss_on", ["all", "response"])  # equal and unequal counts
def test_accumulated_batches_equal_one_large_batch(loss_on, tmp_path):
    for accum in (1, 4):
        train(tmp_path / str(accum), "--loss-on", loss_on, "--dropout", 0, "--max-iters", 3,
              "--batch-size", 4 // accum, "--grad-accum", accum)  # fmt: skip
    one, four = (arrays(tmp_path / str(n), 3) for n in (1, 4))
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=0, atol=1e-5)


def test_a_step_without_a_counted_byte_is_no_nan(tmp_path, monkeypatch):
    real = batches.target_mask

    def none_in_the_second(split, positions, s):
        is_second = np.array_equal(positions, batches.batch_positions(split, 1, s))
        return real(split, positions, s) & (not is_second)

    monkeypatch.setattr(batches, "target_mask", none_in_the_second)
    args = ("--loss-on", "response", "--no-shuffle-records", "--max-iters", 3)
    assert train(tmp_path, *args) == 0
    assert [m["step"] for m in metrics(tmp_path) if "loss" in m] == [1, 3]
    assert all(np.all(np.isfinite(a)) for a in arrays(tmp_path, 3).values())
    assert not any(m.get("skipped") for m in metrics(tmp_path))


@pytest.fixture(scope="module")
def loss_on_runs(tmp_path_factory):
    """The folders of two runs, by LOSS_ON, that differ in nothing else."""
    folder = tmp_path_factory.mktemp("loss_on")
    args = ["--max-iters", 60, "--eval-freq", 60, "--save-freq", 60, "--log-freq", 60]
    for on in ("all", "response"):
        train(folder / on, "--loss-on", on, "--learning-rate", 1e-2, "--no-shuffle-records", *args)
    return {on: folder / on for on in ("all", "response")}


def test_training_on_responses_learns_responses_alone(loss_on_runs):
    """Its gradient ignores the other bytes: the model stays bad at them, and good at its own."""
    of = {on: metrics(run)[-1]["val_loss_fields"] for on, run in loss_on_runs.items()}
    untrained = metrics(loss_on_runs["response"])[0]["val_loss_fields"]
    assert of["response"]["response"] < untrained["response"] - 1
    gap = {field: of["response"][field] - of["all"][field] for field in untrained}
    assert gap["headers"] > 10 * abs(gap["response"])  # it never trained on headers


def test_the_monitored_loss_is_that_of_the_counted_bytes(loss_on_runs):
    last = metrics(loss_on_runs["response"])[-1]
    assert last["monitored_loss"] == last["val_loss_fields"]["response"] != last["val_loss"]
    best = runs.read_best(loss_on_runs["response"] / "full")
    assert best["monitored_loss"] == last["monitored_loss"]


def test_report_and_model_card_show_the_monitored_loss(loss_on_runs):
    run = loss_on_runs["response"] / "full"
    best = runs.read_best(run)
    bits = best["monitored_loss"] / math.log(2)
    lines = metrics(loss_on_runs["response"])
    assert report.best_evaluation(lines)["monitored_bpb"] == bits
    result, _ = export.facts(run / best["checkpoint"])
    assert result["validation"] == f"{bits:.4f} bits per byte, of response bytes"


@pytest.mark.parametrize("mode", ["system", "instruction", "both"])
def test_modes_without_responses_refuse_a_loss_on_them(tmp_path, mode):
    with pytest.raises(UserError, match=f"LOSS_ON is 'response'.*{mode}.* has none"):
        train(tmp_path, "--loss-on", "response", "--training-mode", mode)


def test_data_without_responses_refuses_a_loss_on_them(tmp_path):
    (tmp_path / "d.txt").write_text("\n\n".join(f"{i} paragraph of plain text" for i in range(30)))
    with pytest.raises(UserError, match=r"LOSS_ON is 'response'.*training bytes"):
        train(tmp_path, "--loss-on", "response", "--dataset", tmp_path / "d.txt")


def test_an_evaluation_tells_each_field_and_they_add_up(tmp_path):
    train(tmp_path, "--max-iters", 1, "--eval-bytes", "none")
    last = metrics(tmp_path)[-1]
    of = last["val_loss_fields"]
    assert of.keys() == {"headers", "system", "instruction", "response"}
    labels = np.fromfile(next((tmp_path / ".data").glob("*/val.fields")), np.uint8)[1:]
    share = {LABEL_OF[name]: np.mean(labels == i) for i, name in enumerate(FIELDS)}
    whole = sum(of[f] * share[f] for f in of)
    assert whole == pytest.approx(last["val_loss"], rel=1e-9)
    for field, bpb in last["val_bpb_fields"].items():
        assert bpb == of[field] / math.log(2)


def test_a_field_is_the_mean_over_its_own_targets():
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0.0, 1, 4))
    rng = np.random.default_rng(0)
    val, fields = rng.integers(0, 256, 8, dtype=np.uint8), np.array([1] * 4 + [3] * 4, np.uint8)
    idx, targets = (mx.array(val[i : 7 + i].astype(np.int32))[None] for i in (0, 1))
    each = np.array(byte_losses(model, idx, targets))[0]
    losses = lambda *batch: byte_losses(model, *batch)  # noqa: E731
    _, of = evaluate(losses, Split(val, fields), (1, 8))
    assert of == pytest.approx({"system": each[:3].mean(), "response": each[3:].mean()}, rel=1e-6)


def test_a_loss_that_averages_is_refused(monkeypatch):
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0.0, 1, 4))
    mean = lambda *batch: byte_losses(*batch).mean()  # noqa: E731
    monkeypatch.setattr(loss, "byte_losses", mean)
    with pytest.raises(UserError, match=r"returns shape \(\); it must be \(2, 8\)"):
        loss.compile_evaluation(model, 17, (2, 8))


def test_what_validation_means_cannot_change_within_a_run(tmp_path):
    train(tmp_path, "--max-iters", 5)
    for change, reason in (
        ("--loss-on response", "LOSS_ON: there"),
        ("--eval-bytes 100", "EVAL_BYTES: there"),
        ("--init-from full", "did not start from"),
    ):
        with pytest.raises(UserError, match=reason):
            train(tmp_path, "--max-iters", 10, *change.split())
