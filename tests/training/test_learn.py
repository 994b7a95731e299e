"""What a run tells of its learning: fields, patience, phases, advice, activity."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from helpers import arrays, metrics, same, train

import bdh_mlx
import train_mlx
from bdh_lib import files, runs
from bdh_lib.compute.layer import ln
from bdh_lib.compute.rope import rotate
from bdh_lib.data.formats import FIELDS, REQUIRED_FIELDS
from bdh_lib.generation import export, trace
from bdh_lib.training import batches, checkpoints, phases, report
from bdh_lib.training.advice import advise, byte_baselines, first_counted, order_0, order_n
from bdh_lib.training.dataset import Split
from bdh_lib.training.evaluation import evaluate, neuron_activity
from bdh_lib.training.step import byte_losses
from bdh_mlx import UserError

RESPONSE = FIELDS.index("response")


# ---------------------------------------------------------------------------- loss on the responses


def settings(*args):
    small = "--block-size 8 --batch-size 2 --grad-accum 2 --training-mode full --loss-on response"
    return train_mlx.settings([*small.split(), *args])


def test_the_weights_count_response_targets_alone_and_sum_to_one_over_an_update():
    fields = np.random.default_rng(0).permutation(np.repeat([0, RESPONSE], [90, 10])).astype("u1")
    s, split = settings(), Split(fields, fields, np.arange(5, 105, 5))  # bytes as their own fields
    assert s.SHUFFLE_RECORDS
    for step in range(5):
        count = batches.n_targets_in_step(split, step, s)
        update = [batches.get_batch(split, 2 * step + i, s, count) for i in (0, 1)]
        weights = np.array([batch.weights for batch in update])
        targets = np.array([batch.targets for batch in update])
        assert np.array_equal(weights > 0, targets == RESPONSE)
        assert weights.sum() == pytest.approx(1 if weights.any() else 0, rel=1e-5)
        assert len(np.unique(weights[weights > 0])) <= 1  # unequal batches, equal bytes
    every = settings("--loss-on", "all")
    count = batches.n_targets_in_step(split, 0, every)
    update = [batches.get_batch(split, i, every, count) for i in (0, 1)]
    assert np.all(np.array([batch.weights for batch in update]) == np.float32(1 / 32))


def test_accumulated_batches_of_unequal_counts_equal_one_large_batch(tmp_path):
    for accum in (1, 4):
        train(tmp_path / str(accum), "--loss-on", "response", "--dropout", 0, "--max-iters", 2,
              "--batch-size", 4 // accum, "--grad-accum", accum)  # fmt: skip
    one, four = (arrays(tmp_path / str(n), 2) for n in (1, 4))
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=0, atol=1e-5)


def test_an_update_without_a_counted_byte_is_no_nan(tmp_path, monkeypatch):
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


def test_training_on_responses_learns_responses_alone(tmp_path):
    """Its gradient ignores the other bytes: the model stays bad at them, and good at its own."""
    of = {}
    for on in ("all", "response"):
        args = ["--max-iters", 60, "--eval-freq", 60, "--save-freq", 60, "--log-freq", 60]
        args.append("--no-shuffle-records")
        train(tmp_path / on, "--loss-on", on, "--learning-rate", 1e-2, *args)
        of[on] = metrics(tmp_path / on)[-2]["val_loss_fields"]
    untrained = metrics(tmp_path / "response")[0]["val_loss_fields"]
    assert of["response"]["response"] < untrained["response"] - 1
    gap = {field: of["response"][field] - of["all"][field] for field in untrained}
    assert gap["headers"] > 10 * abs(gap["response"])  # it never trained on headers
    best = checkpoints.read_best(tmp_path / "response" / "full")
    last = metrics(tmp_path / "response")[-2]
    assert (
        best["monitored_loss"]
        == last["monitored_loss"]
        == of["response"]["response"]
        != last["val_loss"]
    )
    shown = best["monitored_loss"] / math.log(2)  # in the report and on the card as well
    assert report.best(metrics(tmp_path / "response"))["monitored_bpb"] == shown
    result, _ = export.facts(tmp_path / "response" / "full" / best["checkpoint"])
    assert result["validation"] == f"{shown:.4f} bits per byte, of response bytes"


@pytest.mark.parametrize("mode", ["system", "instruction", "both"])
def test_modes_without_responses_refuse_a_loss_on_them(tmp_path, mode):
    with pytest.raises(UserError, match=f"LOSS_ON is 'response'.*{mode}.* has none"):
        train(tmp_path, "--loss-on", "response", "--training-mode", mode)


def test_data_without_responses_refuses_a_loss_on_them(tmp_path):
    (tmp_path / "d.txt").write_text("\n\n".join(f"{i} paragraph of plain text" for i in range(30)))
    with pytest.raises(UserError, match=r"LOSS_ON is 'response'.*training bytes"):
        train(tmp_path, "--loss-on", "response", "--dataset", tmp_path / "d.txt")


# ---------------------------------------------------------------------------- validation by field


def test_an_evaluation_tells_each_field_and_they_add_up(tmp_path):
    train(tmp_path, "--max-iters", 1, "--eval-bytes", "none")
    last = metrics(tmp_path)[-2]  # before the samples
    of = last["val_loss_fields"]
    assert of.keys() == {"headers", "system", "instruction", "response"}
    labels = np.fromfile(next((tmp_path / ".data").glob("*/val.fields")), np.uint8)[1:]
    share = {f: np.mean(labels == FIELDS.index(f.replace("headers", ""))) for f in of}
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
    _, of = evaluate(losses, val, fields, 1, 8)
    assert of == pytest.approx({"system": each[:3].mean(), "response": each[3:].mean()}, rel=1e-6)


# ---------------------------------------------------------------------------------------- patience


OVER = ["--eval-freq", "2", "--save-freq", "5", "--max-iters", "40"]


@pytest.fixture
def worse_after_6(monkeypatch):
    """Validation that is best after update 6, as a function of the training alone."""
    step = iter(())

    def evaluate(*_, **__):
        return next(step), {}

    def begin(first):
        nonlocal step
        step = iter([abs(6 - i) + 1.0 for i in range(first, 99, 2)])

    monkeypatch.setattr(train_mlx, "evaluate", evaluate)
    return begin


def test_a_run_out_of_patience_stops_early_and_says_where_its_best_is(
    tmp_path, worse_after_6, capsys
):
    worse_after_6(0)
    assert train(tmp_path, *OVER, "--patience", 3) == 0
    out = capsys.readouterr().out
    assert "iterations: 12\n" in out and "best_step: 6\n" in out and "ended: early" in out
    assert checkpoints.steps(tmp_path / "full")[-1] == 12  # saved, though no SAVE_FREQ is due
    assert checkpoints.read_best(tmp_path / "full")["step"] == 6

    assert train(tmp_path, *OVER, "--patience", 3) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "its best is of 6; to go on, raise PATIENCE (3)" in out
    worse_after_6(14)
    assert train(tmp_path, *OVER, "--patience", 4) == 0
    assert metrics(tmp_path)[-1]["step"] == 14


def test_a_resumed_run_keeps_the_count_and_ends_in_the_same_bits(tmp_path, worse_after_6):
    worse_after_6(0)
    train(tmp_path / "a", *OVER, "--patience", 3)
    worse_after_6(0)
    train(tmp_path / "b", *OVER, "--patience", 3, "--max-iters", 10)
    worse_after_6(12)
    train(tmp_path / "b", *OVER, "--patience", 3)
    for folder in ("a", "b"):
        steps = [m["step"] for m in metrics(tmp_path / folder) if "val_loss" in m]
        assert steps == [0, 2, 4, 6, 8, 10, 12]
    assert same(arrays(tmp_path / "a", 12), arrays(tmp_path / "b", 12))


def test_without_patience_a_run_goes_to_its_end(tmp_path, worse_after_6):
    worse_after_6(0)
    train(tmp_path, *OVER, "--patience", "none", "--max-iters", 20)
    assert json.loads((tmp_path / "full" / "best.json").read_text())["step"] == 6
    assert metrics(tmp_path)[-1]["step"] == 20


# ------------------------------------------------------------------------------------------ phases


CHAIN = ["--phases", "system:0.02,instruction:0.03@2e-3,full:0.01", "--max-iters", 9]


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chained")
    assert train(folder, *CHAIN) == 0
    return folder


RUNS = ["phases-1-system", "phases-2-instruction", "phases-3-full"]


def config(folder, run):
    best = json.loads((folder / run / "best.json").read_text())
    return json.loads((folder / run / best["checkpoint"] / "config.json").read_text())


def test_a_chain_starts_each_phase_from_the_best_weights_before_and_keeps_the_ancestry(chained):
    assert sorted(f.name for f in chained.iterdir() if f.name != ".data") == RUNS
    ancestors = []
    for run, mode, rate in zip(
        RUNS, ("system", "instruction", "full"), (1e-3, 2e-3, 1e-3), strict=True
    ):
        found = config(chained, run)
        assert found["ancestry"] == ancestors
        assert found["settings"]["TRAINING_MODE"] == mode
        assert found["settings"]["LEARNING_RATE"] == rate
        file = runs.find_weights(chained / run)
        ancestors = [*ancestors, {"weights": str(file), "sha256": files.sha256_file(file)}]
    assert len(ancestors) == 3


def test_a_phase_that_max_iters_cuts_short_says_so(tmp_path, capsys):
    train(tmp_path, "--phases", "system:0.01,full:1", "--max-iters", 9, "--eval-freq", 9)
    one, two = capsys.readouterr().out.split("held out, ")[:2]
    assert "ended: by EPOCHS" in one and "MAX_ITERS ends it" not in one
    assert "MAX_ITERS ends it before EPOCHS (1)" in two and "ended: by MAX_ITERS" in two


def test_each_phase_is_judged_on_every_mode(chained):
    for run in RUNS:
        modes = json.loads((chained / run / "modes.json").read_text())
        assert modes["val_bpb"].keys() == modes["val_bpb_fields"].keys() == REQUIRED_FIELDS.keys()
        best = checkpoints.read_best(chained / run)
        own = modes["val_bpb"][run.split("-")[-1]]
        assert own == pytest.approx(best["monitored_loss"] / math.log(2), rel=1e-5)


def test_a_finished_chain_is_skipped_and_tells_the_same_table(chained, capsys, monkeypatch):
    monkeypatch.setattr(phases, "evaluate", lambda *a: pytest.fail("evaluated again"))
    assert train(chained, *CHAIN) == 0
    out = capsys.readouterr().out
    assert out.count("finished: ") == 3 and out.count("held out, bits per byte:") == 3


def test_a_phase_is_judged_anew_where_the_data_are_others(chained):
    file = chained / RUNS[0] / "modes.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"data": "others", "val_bpb": {}}))
    assert train(chained, *CHAIN) == 0
    assert json.loads(file.read_text()) == result


def test_a_chain_stopped_within_a_phase_ends_in_the_same_bits(tmp_path, chained, monkeypatch):
    real, calls = train_mlx.get_batch, iter(range(99))

    def interrupted(*args):
        if next(calls) == 12:  # within the second phase
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_mlx, "get_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *CHAIN)
    assert not (tmp_path / RUNS[2]).exists()
    assert train(tmp_path, *CHAIN) == 0
    for run in RUNS:
        last = checkpoints.steps(chained / run)[-1]
        assert same(arrays(tmp_path, last, run), arrays(chained, last, run))


def test_a_phase_is_not_continued_on_other_weights_than_it_started_from(tmp_path):
    train(tmp_path, "--phases", "system:none,full:none", "--max-iters", 2)
    with pytest.raises(UserError, match=r"started from .*phases-1-system.* are others now"):
        train(tmp_path, "--phases", "system:none,full:none", "--max-iters", 12)


def test_a_phase_goes_on_without_the_checkpoints_of_its_parent(tmp_path):
    train(tmp_path, "--training-mode", "system", "--max-iters", 2)
    train(tmp_path, "--init-from", "system", "--max-iters", 2)
    for step in (tmp_path / "system").glob("step-*"):
        shutil.rmtree(step)
    assert train(tmp_path, "--init-from", "system", "--max-iters", 4) == 0
    kept = json.loads((tmp_path / "full" / "config.json").read_text())["ancestry"]
    assert len(kept) == 1 and "system" in kept[0]["weights"]


def test_the_table_tells_what_was_forgotten():
    from bdh_lib.training.phases import forgetting_table

    output = forgetting_table(
        {"a": {"x": 2.0, "y": 3.0}, "b": {"x": 2.5, "y": 1.0}, "c": {"x": 2.25, "y": 1.0}}
    )
    lines = [line.split() for line in output.splitlines()[1:]]
    assert lines == [
        ["run", "x", "y"],
        ["a", "2.0000", "3.0000"],
        ["b", "2.5000", "(+0.5000)", "1.0000"],
        ["c", "2.2500", "(+0.2500)", "1.0000"],
    ]


@pytest.mark.parametrize("text", ["system", "system:", "system:x", "system:1@", "full:0", "all:1"])
def test_wrong_phases_are_refused_before_anything_is_trained(tmp_path, text):
    with pytest.raises(UserError, match=r"PHASES has|EPOCHS is 0|TRAINING_MODE is 'all'"):
        train(tmp_path, "--phases", f"system:1,{text}")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- activity


@pytest.mark.parametrize("T", [40, 300, 999])
def test_activity_is_the_share_of_neurons_not_zero_in_each_layer(T):
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(3, 8, 0.5, 2, 4))
    val = np.random.default_rng(0).integers(0, 256, 600, dtype=np.uint8)
    counts = np.zeros((2, 3))
    for begin in range(0, 600, T):  # each block at once, by the equations of the model's docstring
        v = ln(model.embed(mx.array(val[None, begin : begin + T].astype(np.int32))))
        for i in range(3):
            x = mx.maximum(v @ model.encoder, 0)  # (H, T, N)
            a = bdh_mlx.attention_quadratic(rotate(x[:, None]), v)[:, 0]
            y = mx.maximum(ln(a) @ model.encoder_v, 0) * x
            counts[:, i] += [mx.sum(x > 0).item(), mx.sum(y > 0).item()]
            v = model.quadratic_layer(v)
    shares = counts / (600 * 32)
    found = neuron_activity(model, val, T)
    np.testing.assert_allclose([found["active_x"], found["active_y"]], shares, atol=2e-4)
    assert np.all(shares[0] > shares[1]) and np.all(shares > 0)


def test_neurons_that_no_byte_excites_in_any_layer_are_dead():
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(3, 8, 0.5, 2, 4))
    val, ever, last, fired = np.frombuffer(b"dead?", np.uint8), False, False, False
    for begin in (0, 3):  # blocks of T
        for layer in trace.layers(model, val[begin : begin + 3].tobytes()):
            last = np.array(mx.any(layer.x > 0, 1))
            ever, fired = ever | last, fired | np.array(mx.any(layer.y > 0, 1))
    assert 0 < np.sum(~ever) < min(np.sum(~last), np.sum(~fired))
    assert neuron_activity(model, val, 3)["dead"] == np.sum(~ever)


def test_activity_takes_no_more_memory_for_more_bytes():
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(2, 64, 0.5, 2, 32))
    val, peaks = np.arange(4096, dtype=np.uint8), []
    for n in (512, 4096):
        mx.reset_peak_memory()
        neuron_activity(model, val[:n], 256)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.2 * peaks[0]


def test_activity_is_logged_at_each_evaluation_and_summed_up(tmp_path, capsys):
    train(tmp_path, "--max-iters", 5)
    evaluated = [m for m in metrics(tmp_path) if "val_loss" in m]
    assert all(len(m["active_x"]) == len(m["active_y"]) == 2 for m in evaluated)
    x = " ".join(f"{share:.1%}" for share in evaluated[-1]["active_x"])
    assert f"active_x: {x}\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ advice


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
    s = train_mlx.settings(["--learning-rate", "1e-3", "--warmup-iters", "10", *args])
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
    assert by_epochs.endswith("Double EPOCHS (10)")


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
    assert every == (order_0(train), order_n(train, train, 1))
    assert answers == (order_0(train[1::2]), order_n(train[1::2], train[1::2], 1))
    never_seen = np.array([1, 9], np.uint8), fields[:2]
    assert byte_baselines("all", Split(train, fields), Split(*never_seen))[1] > 10


def test_the_order_0_entropy_is_that_of_the_byte_frequencies():
    assert order_0(np.arange(256, dtype=np.uint8)) == pytest.approx(math.log(256))
    assert order_0(np.array([7, 7, 9, 9, 9, 9], np.uint8)) == pytest.approx(
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


# ------------------------------------------------------------------------- settings beside others


def test_without_clipping_the_advice_still_comes(tmp_path):
    assert train(tmp_path, "--max-iters", 10, "--grad-clip", "none") == 0
    evaluations = [m for m in metrics(tmp_path) if "val_loss" in m]
    assert len(evaluations) > 1 and all("advice" in m for m in evaluations)


def test_an_average_starts_at_the_weights_of_another_run(tmp_path):
    train(tmp_path, "--max-iters", 10, "--run-name", "base")
    for name, extra in (("plain", ()), ("averaged", ("--ema-decay", 0.9))):
        train(tmp_path, "--max-iters", 1, "--run-name", name, "--init-from", "base", *extra)
    first = [metrics(tmp_path, name)[0]["val_loss"] for name in ("plain", "averaged")]
    assert first[0] == first[1]


def test_what_validation_means_cannot_change_within_a_run(tmp_path):
    train(tmp_path, "--max-iters", 5)
    for change in ("--loss-on response", "--eval-bytes 100", "--init-from full"):
        with pytest.raises(UserError):
            train(tmp_path, "--max-iters", 10, *change.split())


def test_counting_reads_the_first_million_of_the_bytes_that_count():
    """A book of more than a million bytes stands before the first response."""
    book, answers = np.full(1_500_000, 65, np.uint8), np.frombuffer(b"abcabd" * 50, np.uint8)
    stream = np.concatenate([book, answers])
    fields = np.repeat(np.array([4, 3], np.uint8), [len(book), len(answers)])
    side = (stream, fields)
    expected = (order_0(answers), order_n(answers, answers, 1))
    assert byte_baselines("response", Split(*side), Split(*side)) == expected
    assert len(first_counted("response", np.tile(answers, 5000), np.full(1_500_000, 3))) == 10**6


@pytest.mark.parametrize("n_train", [0, 1, 2, 3, 4, 50])
@pytest.mark.parametrize("n_val", [0, 1, 2, 3, 4, 50])
def test_streams_shorter_than_the_order_are_counted_too(n_train, n_val):
    train, val = (np.arange(n, dtype=np.uint8) for n in (n_train, n_val))
    for order in range(4):
        nats = order_n(train, val, order)
        assert math.isfinite(nats) and nats > 0
        uniform = math.log(256)
        assert nats == pytest.approx(uniform) or (n_train and n_val > order), "all bytes as likely"
    labels = [np.full(n, 3) for n in (n_train, n_val)]
    assert np.isfinite(
        byte_baselines("response", Split(train, labels[0]), Split(val, labels[1]))
    ).all()
