"""Chains of runs, each from the best weights of the one before."""

import json
import math
import shutil

import pytest
from helpers import arrays, equal_arrays, metrics, train

from bdh_lib import files, runs
from bdh_lib.data.formats import REQUIRED_FIELDS
from bdh_lib.training import batches, phases
from bdh_mlx import UserError

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
        best = runs.read_best(chained / run)
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
    for text in (json.dumps(result | {"data": "others", "val_bpb": {}}), "[]", "{"):
        file.write_text(text)
        assert train(chained, *CHAIN) == 0
        assert json.loads(file.read_text()) == result


@pytest.mark.parametrize("text", ["", "[]", '"x"', "{}", '{"ancestry": null}', '{"ancestry": 3}'])
def test_weights_of_others_have_no_ancestors(tmp_path, text):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    (tmp_path / "config.json").write_text(text)
    (only,) = phases.ancestry(weights)
    assert only["weights"] == str(weights)


def test_a_chain_stopped_within_a_phase_ends_in_the_same_bits(tmp_path, chained, monkeypatch):
    real = batches.get_batch
    calls = iter(range(99))

    def interrupted(*args):
        if next(calls) == 12:  # within the second phase
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(batches, "get_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *CHAIN)
    assert not (tmp_path / RUNS[2]).exists()
    assert train(tmp_path, *CHAIN) == 0
    for run in RUNS:
        last = runs.steps(chained / run)[-1]
        assert equal_arrays(arrays(tmp_path, last, run), arrays(chained, last, run))


def test_a_phase_is_not_continued_on_other_weights_than_it_started_from(tmp_path):
    first = ("--training-mode", "system", "--max-iters")
    train(tmp_path, *first, 2)
    train(tmp_path, "--init-from", "system", "--max-iters", 2)
    train(tmp_path, *first, 12)
    with pytest.raises(UserError, match=r"started from .* are others now.* RUN_NAME to full"):
        train(tmp_path, "--init-from", "system", "--max-iters", 4)
    assert train(tmp_path, "--run-name", "full", "--max-iters", 4) == 0


def test_a_phase_is_not_trained_on_where_the_next_one_took_its_weights(tmp_path):
    chain = ("--phases", "system:none,full:none", "--max-iters")
    train(tmp_path, *chain, 2)
    with pytest.raises(UserError, match=r"1-system would train for longer now, and .*2-full st"):
        train(tmp_path, *chain, 12)
    assert max(runs.steps(tmp_path / RUNS[0])) == 2
    assert train(tmp_path, *chain, 2) == 0


def test_a_phase_goes_on_without_the_checkpoints_of_its_parent(tmp_path):
    train(tmp_path, "--training-mode", "system", "--max-iters", 2)
    train(tmp_path, "--init-from", "system", "--max-iters", 2)
    for step in (tmp_path / "system").glob("step-*"):
        shutil.rmtree(step)
    assert train(tmp_path, "--init-from", "system", "--max-iters", 4) == 0
    kept = json.loads((tmp_path / "full" / "config.json").read_text())["ancestry"]
    assert len(kept) == 1 and "system" in kept[0]["weights"]


def test_the_table_tells_what_was_forgotten():
    output = phases.forgetting_table(
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


def test_an_average_starts_at_the_weights_of_another_run(tmp_path):
    train(tmp_path, "--max-iters", 10, "--run-name", "base")
    for name, extra in (("plain", ()), ("averaged", ("--ema-decay", 0.9))):
        train(tmp_path, "--max-iters", 1, "--run-name", name, "--init-from", "base", *extra)
    first = [metrics(tmp_path, name)[0]["val_loss"] for name in ("plain", "averaged")]
    assert first[0] == first[1]
