"""Does it learn? Curves beside the official model, recipes, and which mode to take, measured.

    python bench/experiments.py parity --official bdh.py --text tinyshakespeare.txt
    python bench/experiments.py recipe --text tinyshakespeare.txt
    python bench/experiments.py modes --records instructions_5mb.jsonl
    python bench/experiments.py records unseen --records instructions_5mb.jsonl --only "recipe"
    python bench/experiments.py parity recipe --official bdh.py --text ... --gpus 2 --minutes 8
    python bench/experiments.py plot results.jsonl curves.png [parity]

Each job trains in a process of its own, ours with the trainer itself; rows go to --out, a JSON
line a job, and a second call continues with the jobs not done. --smoke: tiny models, on a CPU.
"""

import argparse
import contextlib
import gzip
import importlib.util
import json
import lzma
import math
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import job_queue  # noqa: E402

from bdh_lib.training.advice import ngram_cross_entropy  # noqa: E402
from train_mlx import PRESET_BASE, PRESETS  # noqa: E402

SEEDS = 3
QUIET = (
    "--sample-bytes 0 --save-freq 1000000 --save-minutes none --keep-checkpoints 1 "
    "--eval-bytes none --epochs none"
)
# Parity: what the official train.py does, and every byte block the same on both sides. No
# schedule, no clipping; validation every 100 iterations over all validation bytes.
PARITY = PRESET_BASE + (  # later flags beat those of PRESET_BASE
    "--block-size 512 --batch-size 32 --max-iters 700 --learning-rate 1e-3 --weight-decay 0.1 "
    "--dropout 0.1 --warmup-iters 0 --min-lr-ratio 1 --grad-clip none --eval-freq 100 "
    "--patience none"
)

# A megabyte of text: the flags below, to which each arm of SWEEP adds its own.
RECIPE = PRESET_BASE + (
    "--mlp-internal-dim-multiplier 32 --dropout 0.5 --weight-decay 0.3 --block-size 512 "
    "--batch-size 32 --max-iters 1500 --learning-rate 1e-3 --min-lr-ratio 0.1 "
    "--warmup-iters 100 --grad-clip 1 --eval-freq 100 --patience 3"
)
# Longer blocks and smaller batches than RECIPE's
SMALL_BATCH = (
    "--byte-noise 0.05 --dropout-v 0.1 --weight-decay 1 --ema-decay 0.99 --patience none "
    "--beta2 0.95 --block-size 2048 --batch-size 2 --max-iters 6000 --eval-freq 250 "
)
SMALL_DATA = PRESETS["small-data"] + " --patience none "
LAST_TENTH = "--ema-decay 0.9999 --min-lr-ratio 0.2 "  # an average of the last tenth of a run
SWEEP = {
    "base": "",
    "noise": "--byte-noise 0.1",
    "decay 1": "--weight-decay 1",
    "average": "--ema-decay 0.99",
    "average, decay 1": "--weight-decay 1 --ema-decay 0.99 --max-iters 2000",
    "small-data until 2026-11-27": "--byte-noise 0.05 --dropout-v 0.1 --weight-decay 1 "
    "--ema-decay 0.99 --max-iters 2000",
    "multiplier 64": "--mlp-internal-dim-multiplier 64 --dropout 0.65",
    "layers 4": "--n-layer 4",
    "rate 2e-3": "--learning-rate 2e-3",
    "small batch": SMALL_BATCH,
    "small batch, layers 4": SMALL_BATCH + "--n-layer 4",
    "small batch, layers 4, multiplier 64": SMALL_BATCH
    + "--n-layer 4 --dropout 0.6 --mlp-internal-dim-multiplier 64",
    "small-data": SMALL_DATA,
    "small-data, 8 x 512": SMALL_DATA + "--block-size 512 --batch-size 8",
    "small-data, 2 x 2048": SMALL_DATA + "--block-size 2048 --batch-size 2",
    "small-data, 1 x 4096": SMALL_DATA + "--block-size 4096 --batch-size 1",
    "small-data, dropout 0.6": SMALL_DATA
    + "--block-size 2048 --batch-size 2 --dropout 0.6 --max-iters 14000",
    "small-data, average of the last tenth": SMALL_DATA + LAST_TENTH,
    "small-data, longer, average of the last tenth": SMALL_DATA + LAST_TENTH + "--max-iters 16000",
    "small-data, 8 x 512, average of the last tenth": SMALL_DATA
    + LAST_TENTH
    + "--block-size 512 --batch-size 8",
}

# A few MB of records: the flags below, to which each arm of RECORDS_SWEEP adds its own. "recipe"
# has the settings of train_mlx.py, in mode full and without PATIENCE.
RECORDS = (
    "--training-mode full --n-layer 6 --dropout 0.3 --block-size 2048 --batch-size 2 "
    "--max-iters 2400 --learning-rate 1e-3 --min-lr-ratio 0.1 --weight-decay 0.5 --beta2 0.999 "
    "--ema-decay 0.99 --shuffle-records --eval-freq 500 --patience none"
)
AVERAGE_998 = "--beta2 0.95 --ema-decay 0.998 --min-lr-ratio 0.02 "
RECORDS_SWEEP = {
    "recipe": LAST_TENTH + "--n-layer 3 --max-iters 13300 --beta2 0.95",
    "recipe until 2026-11-28": "--n-layer 4 --beta2 0.95 --max-iters 10000",
    "average 0.998, layers 4": AVERAGE_998 + "--n-layer 4 --max-iters 10000",
    "average 0.998, layers 3": AVERAGE_998 + "--n-layer 3 --max-iters 13300",
    "average 0.998, layers 2": AVERAGE_998 + "--n-layer 2 --max-iters 20000",
    "average 0.998, layers 3, dropout 0.4": AVERAGE_998
    + "--n-layer 3 --max-iters 13300 --dropout 0.4 --eval-freq 1000",
    "average of the last tenth, layers 4": LAST_TENTH
    + "--n-layer 4 --max-iters 10000 --beta2 0.95 --eval-freq 1000",
    "half as long": "--n-layer 4 --beta2 0.95 --max-iters 5000",
    "layers 3": "--n-layer 3 --beta2 0.95 --max-iters 6600",
    "layers 4": "--n-layer 4 --max-iters 3600",
    "multiplier 64": "--mlp-internal-dim-multiplier 64 --max-iters 4400",
    "beta2 0.95": "--beta2 0.95",
    "layers 6": "",
    "batch 1": "--batch-size 1 --max-iters 4800",
    "rate 2e-3": "--learning-rate 2e-3",
    "blocks of 4096, in one order": "--block-size 4096 --no-shuffle-records",
    "blocks of 4096": "--block-size 4096",
}

# "recipe" of RECORDS_SWEEP with other amounts of training data, by their size in KB.
SIZES = {
    100: {"20 epochs": "--epochs 20"}
    | {f"60 epochs, dropout {p}": f"--epochs 60 --dropout {p}" for p in (0.3, 0.5)},
    500: {"10 epochs": "--epochs 10"}
    | {f"25 epochs, dropout {p}": f"--epochs 25 --dropout {p}" for p in (0.3, 0.5)},
    50_000: {
        f"0.4 epochs, dropout {p}": f"--epochs 0.4 --eval-bytes 500000 --dropout {p}"
        for p in (0.3, 0.1)
    },
}
N_ANSWERS = 200  # to held-out records, of the jobs that train on records

# The modes at equal bytes, with the model of the presets and one rate for all; then the presets for
# 64 and 16 GB with their own settings, one seed each.
MODES_BASE = PRESET_BASE + "--block-size 4096 --batch-size 2"
RATE = "--learning-rate 1e-3"
ARMS = {  # name: phases of (mode, share of --iterations that MAX_ITERS of flags replaces, flags)
    "both": [("both", 1, RATE)],
    "phased": [("system", 0.13, RATE), ("instruction", 0.87, RATE)],
    "full": [("full", 1, RATE)],
    "full, loss on response": [("full", 1, f"{RATE} --loss-on response")],
    "full, then on response": [("full", 0.7, RATE), ("full", 0.3, f"{RATE} --loss-on response")],
    "instruction": [("instruction", 1, RATE)],
    "both-64gb": [("both", 1, PRESETS["both-64gb"])],
    "full-64gb": [("full", 1, PRESETS["full-64gb"])],
    "phase1-64gb, phase2-64gb": [
        ("system", 1, PRESETS["phase1-64gb"] + " --epochs 3"),
        ("instruction", 1, PRESETS["phase2-64gb"] + " --epochs 3"),
    ],
    "both-16gb": [("both", 1, PRESETS["both-16gb"])],
}
MODES = ("system", "instruction", "both", "full")


# --smoke: flags put after all others.
TINY = "--n-layer 2 --n-embd 32 --n-head 2 --mlp-internal-dim-multiplier 8 --block-size 128 "
TINY += "--batch-size 4 --eval-freq 10 --eval-bytes 20000"


# -------------------------------------------------------------------------------------------- data


def split_text(text: Path, folder: Path) -> Path:
    """A ready split by bytes: the first 90 % to train on, the rest to validate."""
    stream = np.fromfile(text, np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    cut = int(0.9 * len(stream))
    stream[:cut].tofile(folder / "train.bin")
    stream[cut:].tofile(folder / "val.bin")
    return folder


def split_records(file: Path, folder: Path, share: float = 0.1) -> dict[str, list]:
    """A ready split for each mode, folder/MODE, the same records held out in all; the two sides.

    Records of the same instruction go to the same side, so that no held-out one was trained on.
    """
    from bdh_lib.data import columns, sources
    from bdh_lib.data.formats import FIELDS, SEPARATOR, field_pieces, to_turns

    found = [r for r in sources.read_records(str(file)) if isinstance(r, dict)]
    records = [dict(columns.parse_record(record).turns) for record in found]
    records = [r for r in records if r.keys() == {"system", "instruction", "response"}]
    instructions = list(dict.fromkeys(r["instruction"] for r in records))
    order = np.random.default_rng(0).permutation(len(instructions))
    held_out = {instructions[i] for i in order[: round(share * len(instructions))]}
    sides = {side: [r for r in records if (r["instruction"] in held_out) == (side == "val")]
             for side in ("train", "val")}  # fmt: skip
    for mode in MODES:
        (folder / mode).mkdir(parents=True, exist_ok=True)
        for side, side_records in sides.items():
            pieces = []
            for record in side_records:
                pieces += [*field_pieces(to_turns(record), mode), ("", SEPARATOR)]
            parts = [(FIELDS.index(field), text.encode()) for field, text in pieces]
            (folder / mode / f"{side}.bin").write_bytes(b"".join(text for _, text in parts))
            labels = b"".join(bytes([field]) * len(text) for field, text in parts)
            (folder / mode / f"{side}.fields").write_bytes(labels)
    return sides


def hold_out_systems(file: Path, folder: Path, n_records: int = 600) -> Path:
    """A folder with a given split: whole system texts, of n_records records or more, validate.

    So no validation record is of a kind of task that training saw. The draw is seeded.
    """
    lines = read_lines(file)
    systems = [json.loads(line)["system"] for line in lines]
    kinds, counts = np.unique(systems, return_counts=True)
    order = np.random.default_rng(0).permutation(len(kinds))
    n_kinds = int(np.searchsorted(np.cumsum(counts[order]), n_records)) + 1
    held_out = np.isin(systems, kinds[order[:n_kinds]])
    sides = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
    return write_sides(lines, sides, folder)


def take_records(file: Path, folder: Path, n_bytes: int, share: float = 0.1) -> Path:
    """Make a folder with a given split, of about n_bytes of records to train on.

    A tenth of all records is to validate, the same ones for each n_bytes.
    """
    lines = read_lines(file)
    order = np.random.default_rng(0).permutation(len(lines))
    n_val = round(share * len(lines))
    sizes = np.cumsum([len(lines[i].encode()) for i in order[n_val:]])
    n_train = int(np.searchsorted(sizes, n_bytes)) + 1
    sides = {"train": order[n_val : n_val + n_train], "validation": order[:n_val]}
    return write_sides(lines, sides, folder)


def read_lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as opened:
        return list(opened)  # str.splitlines would cut a record at U+2028


def write_sides(lines: list[str], sides: dict[str, np.ndarray], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for side, chosen in sides.items():
        text = "".join(lines[i] for i in chosen)
        (folder / f"{side}.jsonl").write_text(text, encoding="utf-8")
    return folder


# -------------------------------------------------------------------------------------------- jobs


def seconds(flags: str) -> float:
    """What a training run takes on an H100, roughly: 0.1 s for 16,384 bytes of 25.3M parameters."""
    import train_mlx

    s = train_mlx.read_settings(flags.split())
    c, B, T = s.BDH_CONFIG, s.BATCH_SIZE, s.BLOCK_SIZE
    size = c.n_embd**2 * c.mlp_internal_dim_multiplier / 256 / 32768 * c.n_layer / 6
    iters = s.MAX_ITERS or math.inf
    if s.EPOCHS:
        files = [f for f in Path(s.DATASET).glob("train.*") if f.suffix != ".fields"]
        n_bytes = sum(file.stat().st_size for file in files)
        iters = min(iters, s.EPOCHS * n_bytes / (B * T))
    return 25 + iters * (0.008 + (0.1 if T <= 512 else 0.15) * size * B * T / 16384)


def parity_jobs(args) -> list[dict]:
    data = split_text(args.text, args.work / "text")
    jobs = []
    for seed in range(args.seeds):
        flags = f"{PARITY} {QUIET} --dataset {data} --seed {seed}"
        duration = seconds(flags)
        if args.official:
            jobs.append({"name": f"official, seed {seed}", "of": "official", "do": "official",
                          "phases": [flags], "seconds": 1.25 * duration + 45})  # fmt: skip
        jobs.append({"name": f"ours, seed {seed}", "of": "ours", "phases": [flags],
                      "seconds": duration})  # fmt: skip
    return [job | {"in": "parity", "large": True} for job in jobs]


def recipe_jobs(args) -> list[dict]:
    return sweep_jobs("recipe", RECIPE, SWEEP, split_text(args.text, args.work / "text"), args)


def records_jobs(args) -> list[dict]:
    # a seed also draws the records that validate: the first one is the trainer's own
    return sweep_jobs("records", RECORDS, RECORDS_SWEEP, args.records.resolve(), args, 1337)


def unseen_jobs(args) -> list[dict]:
    folder = hold_out_systems(args.records, args.work / "unseen")
    return sweep_jobs("unseen", RECORDS, RECORDS_SWEEP, folder, args)


def sizes_jobs(args) -> list[dict]:
    """The recipe on a part of the records, over several numbers of epochs."""
    jobs = []
    for kilobytes, sweep in SIZES.items():
        if 1000 * kilobytes > args.records.stat().st_size:
            continue
        folder = take_records(args.records, args.work / f"{kilobytes}KB", 1000 * kilobytes)
        sweep = {f"{kilobytes} KB, {name}": flags for name, flags in sweep.items()}
        base = f"{RECORDS} {RECORDS_SWEEP['recipe']} --max-iters none "
        base += f"--eval-freq {max(100, kilobytes // 50)}"
        jobs += sweep_jobs("sizes", base, sweep, folder, args)
    return jobs


def sweep_jobs(
    what: str, base: str, sweep: dict[str, str], data: Path, args, first_seed: int = 0
) -> list[dict]:
    """The jobs of a sweep, or those that --only names, with all seeds."""
    jobs = []
    for name, flags in sweep.items():
        if args.only and name not in args.only:
            continue
        name = f"{name} {args.flags}".strip()
        for seed in range(first_seed, first_seed + (args.seeds if args.only else 1)):
            flags_of = f"{base} {QUIET} --dataset {data} {flags} {args.flags} --seed {seed}"
            jobs.append({"in": what, "name": f"{what}: {name}, seed {seed}", "of": name,
                          "phases": [flags_of],
                          "seconds": seconds(flags_of) * (0.4 + 0.6 * args.per_gpu)})  # fmt: skip
    return jobs


def modes_jobs(args) -> list[dict]:
    folder = args.work / "records"
    sides = split_records(args.records, folder)
    sizes = (f"{len(records):,} {side} records" for side, records in sides.items())
    print(f"modes: {', '.join(sizes)}")
    jobs = []
    for seed in range(min(args.seeds, 2)):
        for name, arm in ARMS.items():
            if (args.only and name not in args.only) or (seed and "gb" in name):
                continue
            phases = []
            for mode, share, flags in arm:
                iters = max(1, round(share * args.iterations))
                phases.append(
                    f"{MODES_BASE} {QUIET} --dataset {folder / mode} --training-mode {mode} "
                    f"--max-iters {iters} --warmup-iters {min(100, iters // 5)} {flags} "
                    f"--seed {seed}"
                )
            duration = sum(seconds(phase) for phase in phases) + 15
            job = {"in": "modes", "name": f"modes: {name}, seed {seed}", "of": name}
            job |= {"phases": phases, "judge": str(folder), "large": True, "seconds": duration}
            jobs.append(job)
    return jobs


JOBS = {
    "parity": parity_jobs,
    "recipe": recipe_jobs,
    "modes": modes_jobs,
    "records": records_jobs,
    "unseen": unseen_jobs,
    "sizes": sizes_jobs,
}


# ---------------------------------------------------------------------------------- inside of a job


def train(job: dict, work: Path) -> dict:
    """The trainer, phase after phase; the curve of validation nats by iteration over all phases."""
    from mlx.utils import tree_flatten

    import bdh_mlx
    import train_mlx

    runs = work / "runs" / job_queue.slug(job["name"])
    shutil.rmtree(runs, ignore_errors=True)
    curve = []
    speeds = []
    offset = 0
    trained = 0
    for i, flags in enumerate(job["phases"]):
        argv = [*flags.split(), "--checkpoint-dir", str(runs), "--run-name", f"phase{i}"]
        argv += ["--init-from", f"phase{i - 1}"] if i else []
        s = train_mlx.read_settings(argv)
        with contextlib.redirect_stdout(sys.stderr):
            code = train_mlx.main(argv)
        lines = (runs / f"phase{i}" / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        curve += [(offset + m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
        speeds += [m["bytes_per_s"] for m in metrics if "bytes_per_s" in m]
        offset += metrics[-1]["step"]
        trained += metrics[-1]["step"] * s.BATCH_SIZE * s.GRAD_ACCUM * s.BLOCK_SIZE
        if code:
            break
    model = bdh_mlx.load_model(runs / f"phase{i}")
    result = curve_result(curve) | {"bytes": trained, "exit_code": code}
    result["bytes_per_s"] = round(statistics.median(speeds)) if speeds else None
    best = min((m for m in metrics if "val_loss" in m), key=lambda m: m["val_loss"])
    result["best_bits"] = {"whole": best["val_bpb"]} | best["val_bpb_fields"]  # the last phase's
    result["parameters"] = sum(p.size for _, p in tree_flatten(model.parameters()))
    if job["in"] == "recipe":
        result["nats_by_block"] = judge_blocks(model, Path(s.DATASET))
    if "judge" in job:
        result["bits"] = judge(model, Path(job["judge"]), s.BLOCK_SIZE)
    if job["in"] in ("records", "unseen"):
        result["answers"] = score_answers(runs / f"phase{i}", s.DATASET)
    shutil.rmtree(runs)
    return result


def score_answers(run: Path, data: str) -> dict:
    """The shares of answers that equal the true response and that contain it, and the mean chrF."""
    import generate
    from bdh_lib.generation.answers import read_results, scores

    file = run / "answers.jsonl"
    argv = f"{run} --evaluate {data} --answers {N_ANSWERS} --batch-size 64 --out {file}"
    with contextlib.redirect_stdout(sys.stderr):
        generate.main(argv.split())
    rows = read_results(file)
    names = ("equal", "contain", "chrf")
    return dict(zip(names, scores(rows), strict=True)) | {"n": len(rows)}


def curve_result(curve: list) -> dict:
    """The row's part that says how it went: the curve and its lowest point, the last phase's."""
    start = max(i for i in range(len(curve)) if i == 0 or curve[i][0] <= curve[i - 1][0])
    step, best = min(curve[start:], key=lambda point: point[1])
    return {"curve": [(s, round(v, 4)) for s, v in curve], "best": round(best, 4), "at": step}


def judge(model, folder: Path, T: int) -> dict:
    """Bits per byte of the held-out records in each mode's format, by field."""
    from bdh_lib.units import bits_per_byte

    bits = {}
    for mode in MODES:
        val = [np.fromfile(folder / mode / f"val.{kind}", np.uint8) for kind in ("bin", "fields")]
        mean, nats = val_losses(model, val, T)
        of = nats | {"all": mean}
        bits[mode] = {field: round(bits_per_byte(loss), 4) for field, loss in of.items()}
    return bits


def judge_blocks(model, folder: Path) -> dict[int, float]:
    """Nats per byte of the text that validates, read in blocks of each length."""
    val = np.fromfile(folder / "val.bin", np.uint8)
    lengths = (256, 512, 1024, 2048, 4096)
    return {T: round(val_losses(model, (val, np.zeros_like(val)), T)[0], 4) for T in lengths}


def val_losses(model, val, T: int) -> tuple[float, dict[str, float]]:
    """The mean nats per byte of val, its bytes and their fields, and those of each field."""
    from functools import partial

    from bdh_lib.compute import memory
    from bdh_lib.data.split import Split
    from bdh_lib.loss import byte_losses, evaluate

    model.compute = memory.compute_for(model.config, "fast", "auto")
    return evaluate(partial(byte_losses, model), Split(*val), (4, T))


def train_official(job: dict, path: str) -> dict:
    """The official model in PyTorch: bf16 autocast, torch.compile, and our order of the blocks."""
    import torch

    import train_mlx
    from bdh_lib.data.split import Split
    from bdh_lib.training.batches import batch_positions

    spec = importlib.util.spec_from_file_location("official_bdh", path)
    official_code = importlib.util.module_from_spec(spec)
    sys.modules["official_bdh"] = official_code
    spec.loader.exec_module(official_code)
    s = train_mlx.read_settings(job["phases"][0].split())
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    train, val = (
        np.fromfile(Path(s.DATASET, f"{side}.bin"), np.uint8) for side in ("train", "val")
    )
    split = Split(train, np.zeros_like(train))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(s.SEED)
    torch.set_float32_matmul_precision("high")
    shape = {k: v for k, v in vars(s.BDH_CONFIG).items() if k != "dropout_v"}
    model = official_code.BDH(official_code.BDHConfig(**shape)).to(device)
    step_model = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=s.LEARNING_RATE, weight_decay=s.WEIGHT_DECAY
    )
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")

    def blocks(stream, positions):
        rows = stream[positions].astype(np.int64)
        rows = torch.from_numpy(rows).to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        n = len(val) - 1
        T = s.BLOCK_SIZE
        nats = 0.0
        starts = T * np.arange(n // T)
        groups = [(starts[i : i + s.BATCH_SIZE], T) for i in range(0, len(starts), s.BATCH_SIZE)]
        for where, length in [*groups, (np.array([n - n % T]), n % T)]:
            if length:
                idx, targets = blocks(val, where[:, None] + np.arange(length + 1))
                with autocast:
                    nats += model(idx, targets)[1].item() * targets.numel()
        model.train()
        return nats / n

    curve, ticks = [], []
    for step in range(s.MAX_ITERS + 1):
        if step % s.EVAL_FREQ == 0 or step == s.MAX_ITERS:
            curve.append((step, evaluate()))
        if step == s.MAX_ITERS or stop:
            break
        tick = time.perf_counter()
        where = batch_positions(split, step, s)
        with autocast:
            loss = step_model(*blocks(train, where))[1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        ticks.append(time.perf_counter() - tick)
    bytes_per_s = s.BATCH_SIZE * s.BLOCK_SIZE / statistics.median(ticks)
    parameters = sum(p.numel() for p in model.parameters())
    return curve_result(curve) | {"bytes_per_s": round(bytes_per_s), "parameters": parameters}


# ------------------------------------------------------------------------------------------ results


def table(rows: list[dict]) -> str:
    """A line for each kind of job, over its seeds: the lowest validation loss and where it was."""
    kinds = list(dict.fromkeys((row["in"], row["of"]) for row in rows if "best" in row))
    lines = [f"{'':<34}{'seeds':>6}{'best nats':>11}{'spread':>8}  at step        parameters  s"]
    for kind in kinds:
        runs = [row for row in rows if (row["in"], row["of"]) == kind and "best" in row]
        best = [row["best"] for row in runs]
        lines.append(
            f"{': '.join(kind):<34}{len(runs):>6}{statistics.mean(best):>11.4f}"
            f"{max(best) - min(best):>8.4f}  {', '.join(str(r['at']) for r in runs):<14} "
            f"{runs[0]['parameters']:>10,}  {statistics.mean(r['seconds'] for r in runs):.0f}"
            + (" cut off" if any(r["cut"] for r in runs) else "")
        )
    lines += [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join(lines)


def parity_table(rows: list[dict]) -> str:
    """Whether the two curves agree within the seeds: means by step, and the spread of each."""
    curves = {of: [dict(r["curve"]) for r in rows if r["of"] == of] for of in ("official", "ours")}
    if not all(curves.values()):
        return "parity: one side is missing"
    steps = sorted(set.intersection(*(set(c) for side in curves.values() for c in side)))
    lines = [f"{'step':>6}{'official':>18}{'ours':>18}{'difference':>12}"]
    agrees = {}
    for step in steps:
        values = {of: [c[step] for c in side] for of, side in curves.items()}
        mean = {of: statistics.mean(v) for of, v in values.items()}
        spread = {of: max(v) - min(v) for of, v in values.items()}
        agrees[step] = abs(mean["ours"] - mean["official"]) <= max(spread.values())
        shown = "".join(f"{mean[of]:>10.4f} ±{spread[of] / 2:.4f}" for of in curves)
        lines.append(f"{step:>6}{shown}{mean['ours'] - mean['official']:>12.4f}")
    agree = sum(agrees.values())
    lines.append(
        f"The means differ by no more than the larger spread of the seeds at {agree} of "
        f"{len(steps)} steps."
    )
    return "\n".join(lines)


SHOWN = [("system", "system"), ("instruction", "instruction"), ("both", "instruction"),
         ("both", "system"), ("full", "system"), ("full", "instruction"),
         ("full", "response")]  # fmt: skip


def compression_baselines(train: bytes, val: bytes) -> dict[str, float]:
    """Return the bits per byte of val by gzip, by xz and by counting bytes.

    `xz after train` is what val adds to the packed train.
    """
    bits = {"gzip": 8 * len(gzip.compress(val, 9)) / len(val), "xz": 8 * _xz(val) / len(val)}
    bits["xz after train"] = 8 * (_xz(train + val) - _xz(train)) / len(val)
    return bits | {
        "order 3": ngram_cross_entropy(*(np.frombuffer(side, np.uint8) for side in (train, val)))
        / math.log(2)
    }


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def modes_table(rows: list[dict], folder: Path) -> str:
    """Bits per byte by field and format of each arm, over its seeds, beside the baselines."""
    from bdh_lib.data.formats import FIELDS

    title = "".join(f"{f'{field[:6]}/{mode[:6]}':>16}" for mode, field in SHOWN)
    lines = [
        "bits per byte of a field / in the format of a mode, held-out records",
        " " * 24 + title,
    ]
    means = {}
    for of in dict.fromkeys(row["of"] for row in rows if "bits" in row):
        runs = [row["bits"] for row in rows if row["of"] == of and "bits" in row]
        line = f"{of:<24}"
        for mode, field in SHOWN:
            bits = [b[mode][field] for b in runs]
            means[of, mode, field] = statistics.mean(bits)
            line += f"{means[of, mode, field]:>9.3f}" + (
                f" ±{(max(bits) - min(bits)) / 2:.3f}" if len(bits) > 1 else " " * 7
            )
        lines.append(line)
    read = {}
    for field, mode in (("system", "system"), ("instruction", "instruction"), ("response", "full")):
        sides = {}
        for side in ("train", "val"):
            stream = np.fromfile(folder / mode / f"{side}.bin", np.uint8)
            labels = np.fromfile(folder / mode / f"{side}.fields", np.uint8)
            sides[side] = stream[labels == FIELDS.index(field)].tobytes()
        read[field] = compression_baselines(sides["train"], sides["val"])
    for name in read["system"]:
        line = "".join(f"{read[field][name]:>9.3f}       " for _, field in SHOWN)
        lines.append(f"{name:<24}{line}")
    pairs = [
        ("both", "phased", "both", "instruction"),
        ("both", "phased", "instruction", "instruction"),
        ("full, loss on response", "full", "full", "response"),
    ]
    for first, second, mode, field in pairs:
        if (first, mode, field) in means and (second, mode, field) in means:
            a, b = means[first, mode, field], means[second, mode, field]
            lines.append(f"`{first}` against `{second}`: {field} in the format of {mode} takes "
                         f"{a:.3f} against {b:.3f} bits per byte, {(a - b) / b:+.1%}.")  # fmt: skip
    return "\n".join(lines)


def plot(rows: list[dict], file: str, experiment: str | None = None) -> None:
    """Validation curves of jobs of one phase: a line for each job, a colour for each kind."""
    import matplotlib

    import train_mlx

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "curve" in r and (not experiment or r["in"] == experiment)]
    rows = [r for r in rows if len(r["phases"]) == 1]
    kinds = list(dict.fromkeys(r["of"] for r in rows))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row in rows:
        s = train_mlx.read_settings(row["phases"][0].split())
        step_mb = s.BATCH_SIZE * s.BLOCK_SIZE * s.GRAD_ACCUM / 1e6
        steps, values = zip(*[p for p in row["curve"] if p[0]], strict=True)
        kind = kinds.index(row["of"])
        first = next(r for r in rows if r["of"] == row["of"]) is row
        axes.plot(
            step_mb * np.array(steps),
            values,
            color=f"C{kind % 10}",
            label=row["of"] if first else None,
        )
    axes.set(xlabel="bytes trained on, MB", ylabel="validation loss, nats per byte")
    low = min(v for r in rows for _, v in r["curve"])
    axes.set_ylim(low - 0.03, low + 0.6)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


# --------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="+", help=f"of {', '.join(JOBS)}; or: plot ROWS PICTURE [ONE]"
    )
    parser.add_argument("--text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--records", type=Path, help="a .jsonl of instruction records")
    parser.add_argument("--official", help="path of pathwaycom/bdh's bdh.py; needs PyTorch")
    parser.add_argument("--out", type=Path, default=Path("learn.jsonl"), help="file of the rows")
    parser.add_argument("--work", type=Path, default=Path("learn.work"), help="data and runs")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to spread over (0: a CPU)")
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs at once on each (1)")
    parser.add_argument("--minutes", type=float, default=600, help="when the last job must be over")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds of a job ({SEEDS})")
    parser.add_argument("--iterations", type=int, default=1000, help="of an arm of modes")
    parser.add_argument("--only", action="append", help="these recipes or arms, all seeds")
    parser.add_argument("--flags", default="", help="of the trainer, after those of each recipe")
    parser.add_argument("--smoke", type=int, nargs="?", const=20, help="tiny models, 20 iterations")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what[0] == "plot":
        if len(args.what) < 3 or not Path(args.what[1]).is_file():
            parser.error("plot needs a file of rows, and the name of a picture")
        return plot(job_queue.rows(Path(args.what[1])), args.what[2], *args.what[3:])
    if args.job:
        is_official = args.job.get("do") == "official"
        result = (
            train_official(args.job, args.official) if is_official else train(args.job, args.work)
        )
        print("\n" + json.dumps(result))
        return
    for what in args.what:
        if what not in JOBS:
            parser.error(f"{what!r} is none of {', '.join(JOBS)}, plot")
        needed = "text" if what in ("parity", "recipe") else "records"
        if not getattr(args, needed) or not getattr(args, needed).is_file():
            parser.error(f"{what} needs a file --{needed}")
    if args.flags and {*args.what} & {"parity", "modes"}:
        parser.error("--flags is for recipe, records, unseen and sizes")
    jobs = [job for what in args.what for job in JOBS[what](args)]
    if args.smoke:
        for job in jobs:
            job["phases"] = [f"{phase} {TINY} --max-iters {args.smoke}" for phase in job["phases"]]
            job["seconds"] = 5
    print(f"{len(jobs)} jobs, about {sum(job['seconds'] for job in jobs):.0f} s of one GPU")

    def command(job):
        rest = ["--work", str(args.work), *(["--official", args.official] if args.official else [])]
        return [sys.executable, __file__, "job", "--job", json.dumps(job), *rest]

    names = {job["name"] for job in jobs}
    rows = job_queue.spread(jobs, command, args.gpus, args.per_gpu, args.minutes, args.out)
    print(table([row for row in rows if row["name"] in names]))
    if "parity" in args.what:
        print(parity_table([r for r in rows if r["in"] == "parity" and "curve" in r]))
    if "modes" in args.what:
        print(modes_table([r for r in rows if r["in"] == "modes"], args.work / "records"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from bdh_lib.script import start

    start.run(__file__)
