"""The measurements of bench/, each once and tiny; their queue of jobs and the baselines."""

import json
import math
import sys
from functools import partial

import matplotlib.axes
import numpy as np
import pytest
from helpers import CONFIG, ROOT

sys.path.insert(0, str(ROOT / "bench"))
import experiments
import generate_speed
import job_queue
import train_speed

import bdh_mlx
from bdh_lib.training import advice

SCRIPT = "import json, sys, time; time.sleep({}); print(json.dumps({{'result': {}}})); sys.exit({})"


def spread(tmp_path, pending, minutes=1.0, gpus=2, per_gpu=1):
    def command(job):
        return [
            sys.executable,
            "-c",
            SCRIPT.format(job.get("sleep", 0), job["result"], job.get("rc", 0)),
        ]

    return job_queue.spread(pending, command, gpus, per_gpu, minutes, tmp_path / "rows.jsonl")


def test_jobs_leave_a_row_each_and_are_not_done_twice(tmp_path):
    pending = [{"name": f"job: {i}", "seconds": 1, "result": i, "rc": i % 2} for i in range(4)]
    rows = spread(tmp_path, pending)
    assert {row["name"]: row["result"] for row in rows} == {f"job: {i}": i for i in range(4)}
    assert [row["name"] for row in rows if "failed" in row] == ["job: 1", "job: 3"]
    assert {row["gpu"] for row in rows} == {0, 1}
    spread(tmp_path, [job | {"rc": 0} for job in pending])
    lines = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 6  # the two that failed ran again
    assert not [row for row in job_queue.rows(tmp_path / "rows.jsonl") if "failed" in row]


def test_a_job_that_cannot_end_in_time_is_left_out_and_a_slow_one_stopped(tmp_path, capsys):
    pending = [{"name": "slow", "seconds": 0.5, "result": 1, "sleep": 60},
               {"name": "long", "seconds": 100, "result": 2}]  # fmt: skip
    rows = spread(tmp_path, pending, minutes=(job_queue.GRACE + 2) / 60)
    assert "the time was up: long" in capsys.readouterr().out
    assert [(row["name"], row["cut"], "failed" in row) for row in rows] == [("slow", True, True)]


def test_the_order_3_model_is_a_distribution_and_knows_its_text():
    train = np.frombuffer(b"abracadabra, said the magician, abracadabra" * 20, np.uint8)
    context = np.frombuffer(b"cad", np.uint8)
    nats = [
        advice.ngram_cross_entropy(train, np.append(context, b).astype(np.uint8))
        for b in range(256)
    ]
    assert sum(math.exp(-x) for x in nats) == pytest.approx(1)
    assert nats[ord("a")] == min(nats) < 0.35
    assert (
        math.log(256) < advice.ngram_cross_entropy(train, np.full(9, 200, np.uint8)) < 14
    )  # not impossible


def test_the_records_held_out_are_the_same_in_each_mode(tmp_path):
    lines = [{"system": "s", "instruction": f"i{i % 40}", "response": f"r{i}"} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sides = experiments.split_records(tmp_path / "d.jsonl", tmp_path / "out", share=0.25)
    train, val = ({r["instruction"] for r in sides[side]} for side in ("train", "val"))
    assert len(val) == 10 and not train & val and len(train | val) == 40
    for mode in experiments.MODES:
        text, fields = (
            (tmp_path / "out" / mode / f"val.{k}").read_bytes() for k in ("bin", "fields")
        )
        assert len(text) == len(fields)
    assert b"### Response:\nr" in text and text.endswith(b"\n---\n\n")


def test_a_kind_of_task_is_held_out_whole(tmp_path):
    lines = [
        {"system": f"s{i % 10}", "instruction": "\u2028", "response": f"r{i}"} for i in range(60)
    ]
    (tmp_path / "d.jsonl").write_text(
        "\n".join(map(partial(json.dumps, ensure_ascii=False), lines))
    )
    folder = experiments.hold_out_systems(tmp_path / "d.jsonl", tmp_path / "out", n_records=13)
    with (folder / "train.jsonl").open() as train, (folder / "validation.jsonl").open() as val:
        sides = [[json.loads(line) for line in side] for side in (train, val)]
    assert [len(side) for side in sides] == [42, 18]  # three kinds of six records
    kinds = [{record["system"] for record in side} for side in sides]
    assert [len(side) for side in kinds] == [7, 3] and not kinds[0] & kinds[1]


def test_less_data_are_judged_on_the_same_records(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"response": "r{i:02}"}}\n' for i in range(60)))
    sides = {}
    for n_bytes in (100, 700):
        folder = experiments.take_records(tmp_path / "d.jsonl", tmp_path / str(n_bytes), n_bytes)
        for side in ("train", "validation"):
            sides[n_bytes, side] = (folder / f"{side}.jsonl").read_text().splitlines()
    assert sides[100, "validation"] == sides[700, "validation"]
    assert {key: len(lines) for key, lines in sides.items() if "train" in key} == {
        (100, "train"): 5, (700, "train"): 35}  # fmt: skip
    assert not {*sides[700, "train"]} & {*sides[700, "validation"]}


def test_a_flat_model_costs_eight_bits_a_byte():
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 256, (2, 20_000), dtype=np.uint8)
    assert advice.ngram_cross_entropy(train, val, 0) == pytest.approx(8 * math.log(2), abs=0.03)
    assert math.isclose(
        experiments.compression_baselines(bytes(val), bytes(val))["xz"], 8, rel_tol=0.02
    )


@pytest.mark.parametrize(
    ("script", "flags", "complaint"),
    [
        (experiments, "bogus", "'bogus' is none of parity"),
        (experiments, "parity", "parity needs a file --text"),
        (experiments, "modes --records /no/such", "modes needs a file --records"),
        (experiments, "plot /no/such a.png", "plot needs a file of rows"),
        (train_speed, "--only bogus", "no step to time"),
        (train_speed, "--steps 0", "no step to time"),
        (generate_speed, "--only bogus", "'bogus' is not a kind of case"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused(script, flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


# ------------------------------------------------------------------------- each measurement, tiny

SAMPLE = str(ROOT / "bdh_lib/data/sample.jsonl")


def test_an_experiment_runs_to_its_table(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    flags = f"recipe --text {SAMPLE} --only base --seeds 1 --smoke 2 --work {tmp_path}/work"
    monkeypatch.setattr(sys, "argv", ["experiments.py", *flags.split(), "--out", str(rows)])
    experiments.main()
    (row,) = job_queue.rows(rows)
    assert row.get("failed") is None and [step for step, _ in row["curve"]] == [0, 2]
    assert row["best"] < math.log(256) + 0.1 and row["exit_code"] == 0
    table = capsys.readouterr().out.splitlines()[-1]
    assert table.split()[:4] == ["recipe:", "base", "1", f"{row['best']:.4f}"]


def test_a_job_on_records_answers_what_it_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "N_ANSWERS", 1)
    flags = f"{experiments.RECORDS} {experiments.QUIET} --dataset {SAMPLE} {experiments.TINY}"
    job = {"in": "records", "name": "one", "phases": [f"{flags} --max-iters 1"]}
    result = experiments.train(job, tmp_path)
    assert result["answers"]["n"] == 1 and result["best_bits"].keys() >= {"whole", "response"}


def test_curves_of_jobs_of_one_phase_are_drawn_over_bytes(tmp_path, monkeypatch):
    row = {"in": "parity", "of": "ours", "curve": [(0, 5.0), (10, 3.0), (20, 2.0)]}
    rows = [row | {"phases": ["--block-size 500 --batch-size 100"]}, row | {"phases": ["", ""]}]
    drawn = []
    plot_line = matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda axes, x, y, **kwargs: (
        drawn.append((list(x), list(y))) or plot_line(axes, x, y, **kwargs)))  # fmt: skip
    experiments.plot(rows, str(tmp_path / "curves.png"))
    assert drawn == [([0.5, 1.0], [3.0, 2.0])]  # MB
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("system", ["ours, fast", "ours, not compiled", "quadratic"])
def test_a_training_step_is_timed_and_stands_in_the_table(system):
    model = {"n_layer": 1, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 4}
    case = {"system": system, "B": 1, "T": 64, "model": model | {"dropout": 0.0}}
    row = case | train_speed.run_ours(case, steps=1)
    assert row["seconds"] > 0 and (row["estimate_gb"] is None) == (system != "ours, fast")
    product = train_speed.run_product({"n": 64}, 1)
    assert train_speed.table([row], product).splitlines()[1].startswith(system)


def test_each_case_of_generation_gives_its_row(tmp_path):
    bdh_mlx.save_model(bdh_mlx.BDH(CONFIG), tmp_path / "m.safetensors")
    rows = []
    for case in ({"kind": "stream", "contexts": [1, 32], "bytes": 64}, {"kind": "error"},
                 {"kind": "prefill", "lengths": [64]},
                 {"kind": "recompute", "contexts": [32], "bytes": 1}):  # fmt: skip
        case |= {"model": str(tmp_path / "m.safetensors"), "text": SAMPLE}
        measure = getattr(generate_speed, f"measure_{case['kind']}")
        rows += [case | row for row in measure(case)]
    assert [row["context"] for row in rows] == [1, 32, 512, 64, 32]
    assert rows[2]["largest"] < 1e-3 * rows[2]["logits"]
    ratio = generate_speed.table(rows).splitlines()[2].split()[-1]  # against the recomputation
    assert float(ratio) == pytest.approx(rows[4]["seconds"] / rows[1]["seconds"], abs=0.06)
