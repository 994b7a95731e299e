"""Training speed and peak memory: ours, the quadratic form, and the official PyTorch model.

    python bench/train_speed.py                        # shapes for a CPU, about 3 minutes
    python bench/train_speed.py --official bdh.py      # beside pathwaycom/bdh; needs PyTorch
    python bench/train_speed.py --gpu --official bdh.py
    python bench/train_speed.py --gpu --memory         # measured and estimated peaks
    python bench/train_speed.py --gpu --elementwise    # relu, rotation, gate: fused, plain
    python bench/train_speed.py --curve text.txt       # fast and quadratic losses over a training

Each case is a full training step (loss, gradients, clipping, AdamW) on random bytes: two warm-up
steps, then the median of three times --steps in a row. As in training, the host submits a step
while a GPU computes the one before. Cases run one after the other, each in a process of its own,
and only that process imports MLX or PyTorch; so imports stand in the functions.

It prints a JSON line per case, then a table. `ratio` is bytes/s divided by those of the shape's
first row. `growth` is the time per byte divided by that of the same system at its smallest T.
`limit` is the share of the time that the products alone would take at the speed of a large product.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
CPU = (
    {"n_layer": 4, "n_embd": 64, "n_head": 4, "mlp_internal_dim_multiplier": 32},
    [(1, 1024), (1, 4096), (1, 16384)],  # B, T
)
GPU = (
    {"n_layer": 6, "n_embd": 256, "n_head": 4, "mlp_internal_dim_multiplier": 128},
    [(2, 4096), (1, 16384), (32, 512), (1, 65536)],
)
COMPUTES = [  # chunk, rows, saved_activations of layer.Compute, on the first three shapes of a GPU
    (512, 32768, 4),
    (512, 32768, 2),
    (512, 8192, 1),
    (512, 8192, 0),
    (512, 4096, 0),
]


def cases(args: argparse.Namespace) -> list[dict]:
    """List the cases: every system, on every shape that it can do in the time and memory."""
    model, shapes = GPU if args.gpu else CPU
    if args.memory:
        shared = {"system": "ours", "model": model | {"dropout": 0.0}}
        return [shared | {"B": B, "T": T, "compute": c} for B, T in shapes[:3] for c in COMPUTES]
    most_official, most_quadratic = (
        (16384, 4096) if args.gpu else (4096, 1024)
    )  # cost grows with T^2
    result = []
    for B, T in shapes:
        official = ["official compiled" if args.gpu else "official eager"]
        systems = official if args.official and most_official >= T else []
        ours = ["fast"] if most_official >= T else ["balanced" if args.gpu else "fast"]
        ours += ["fast, dropout 0.1", "balanced", "small"] if T == 4096 else []
        ours += ["not compiled"] if T == 4096 and not args.gpu else []
        systems = systems + [f"ours, {name}" for name in ours]
        systems += ["quadratic"] if most_quadratic >= T and T in (1024, 4096) else []
        for system in systems:
            dropout = 0.1 if "dropout" in system else 0.0
            result.append({"system": system, "B": B, "T": T, "model": model | {"dropout": dropout}})
    return sorted(result, key=lambda case: case["system"] == "quadratic")  # the slowest last


def timed(step, synchronize, steps: int) -> float:
    """Return the seconds of a step after two that warm up: the median of three times `steps`."""
    seconds = []
    for count in (2, steps, steps, steps):
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize()
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds[1:])


def build(
    system: str,
    shape: dict,
    B: int,
    T: int,
    compute: tuple[int, int, int] | None = None,
    rate: float = 1e-3,
) -> tuple[Callable, float | None]:
    """Return the trainer's step, compiled for a `system` and a shape, and its estimated peak bytes.

    With `compute` (chunk, segment_rows, saved_activations) MLX's limit is so low that it cannot run
    ahead, so the measured peak is what the step needs.
    """
    sys.path.insert(0, str(ROOT))
    import bdh_mlx  # isort: skip
    import mlx.core as mx
    import mlx.optimizers as optim

    from bdh_lib.compute import memory
    from bdh_lib.training.step import compile_steps, start_computing
    from bdh_lib.training.train_state import TrainState

    class Quadratic(bdh_mlx.BDH):
        """Scores T x T, gradients by MLX: what a plain port does."""

        def __call__(self, idx, targets=None, key=None):
            return self.quadratic(idx, targets)

    mx.random.seed(0)
    if system == "ours, not compiled":
        return build_by_hand(bdh_mlx.BDH(bdh_mlx.BDHConfig(**shape)), rate), None
    is_quadratic = system.startswith("quadratic")
    model = (Quadratic if is_quadratic else bdh_mlx.BDH)(bdh_mlx.BDHConfig(**shape))
    if "nudged" in system:
        model.encoder = model.encoder * (1 + 2**-23)
    peak = None
    if not is_quadratic:
        name = "fast" if compute else system.split(", ")[1]
        model.compute = memory.compute_for(model.config, name, "auto")
        if compute:
            chunk, rows, saved = compute
            model.compute = replace(
                model.compute, chunk=chunk, segment_rows=rows, saved_activations=saved
            )
        peak = memory.estimate_step_bytes(model.config, B, T, model.compute)
        mx.set_memory_limit(10**6) if compute else memory.set_mlx_memory_limit(peak, model.compute)
    optimizer = optim.AdamW(rate, weight_decay=0.1, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    s = SimpleNamespace(BYTE_NOISE=0, GRAD_CLIP=1.0, EMA_DECAY=0)
    state = TrainState(model, optimizer, {})
    micro_step, apply_update = compile_steps(state, s)
    submitted = []

    def step(idx, targets):
        weights = mx.full(idx.shape, 1 / idx.size)
        loss, gradients = micro_step(idx, targets, weights, mx.random.key(1))
        start_computing(state, apply_update(loss, gradients), finish=False)
        submitted.append(loss)
        if len(submitted) > 1:  # as Meter does: read once the next step is submitted
            submitted.pop(0).item()
        return loss

    return step, peak


def build_by_hand(model, rate: float) -> Callable:
    """Return the step that a user of the model alone writes: nn.value_and_grad and AdamW."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    optimizer = optim.AdamW(rate, weight_decay=0.1, bias_correction=True)
    value_and_grad = nn.value_and_grad(model, lambda idx, targets: model(idx, targets)[1])

    def step(idx, targets):
        loss, gradients = value_and_grad(idx, targets)
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(loss, model.state, optimizer.state)
        return loss

    return step


def flops(model: dict, B: int, T: int) -> float:
    """Return the operations of a step's products in chunks, if nothing is computed twice."""
    D, H = model["n_embd"], model["n_head"]
    N = model["mlp_internal_dim_multiplier"] * D // H
    chunk = min(T, max(128, 2 * D))
    wide = 15 if chunk < T else 9  # products of N by D; those of states only between chunks
    layer = 2 * H * (wide * N * D + 2 * N * chunk + 5 * chunk * D)
    return B * T * (model["n_layer"] * layer + 6 * D * 256)


def run_product(case: dict, steps: int) -> dict:
    """Measure a large product in the precision of training."""
    sys.path.insert(0, str(ROOT))
    import bdh_mlx  # isort: skip
    import mlx.core as mx

    from bdh_lib.compute import memory

    n, dtype = case["n"], memory.compute_for(bdh_mlx.BDHConfig(), "fast", "auto").dtype
    a, b = mx.random.normal((2, n, n)).astype(dtype)
    mx.eval(a, b)
    seconds = timed(lambda: mx.eval(a @ b), mx.synchronize, 10 * steps)
    return {"flops_per_second": 2 * n**3 / seconds, "device": str(mx.default_device())}


def fused_and_plain(gpu: bool, steps: int) -> None:
    """Print the time of each elementwise operation, and of a step, by CUDA's kernels and by MLX.

    GB/s count the arrays that a kernel moves, also where plain operations move more.
    """
    sys.path.insert(0, str(ROOT))
    import bdh_mlx  # isort: skip
    import mlx.core as mx

    from bdh_lib.compute import elementwise, elementwise_cuda, memory

    shape, ((B, T), *_) = GPU if gpu else CPU
    is_available = elementwise_cuda.is_available
    modules = {"plain": elementwise}
    if is_available():
        modules = {"fused": elementwise_cuda} | modules
    cases = list(itertools.product((0.0, 0.1), modules.items()))
    dtype = memory.compute_for(bdh_mlx.BDHConfig(**shape), "fast", "auto").dtype
    H = shape["n_head"]
    neurons = shape["mlp_internal_dim_multiplier"] * shape["n_embd"]
    print(f"{mx.default_device()}, B {B}, T {T}, {dtype}\n{'':<33}arrays       ms     GB/s")

    def row(name, call, steps, *arrays):
        seconds = timed(lambda: mx.eval(call(*arrays)), mx.synchronize, steps)
        moved = {"h + g": 3, "encode": 2, "gate": 3, "gate_gradients": 5, "encode_gradient": 3}
        count = moved.get(name.split(": ")[-1])
        speed = f"{count * B * T * neurons * dtype.size / seconds / 1e9:>9,.0f}" if count else ""
        print(f"{name:<33}{count or '':>6}{seconds * 1e3:>9.2f}{speed}", flush=True)

    def rows():
        size = (H, B * T, neurons // H)
        key = mx.random.key(0)
        h, g, dy, dq = (mx.random.normal(size, dtype, key=k) for k in mx.random.split(key, 4))
        row("h + g", mx.add, 5 * steps, h, g)
        for rate, (kind, m) in cases:
            mask = m.dropout_mask(key, rate, size)
            residuals = m.gate_gradients(h, g, dy, mask)[2]
            name = f"{kind}, dropout {rate:g}: "
            mx.eval(dq, mask, residuals)
            row(name + "mask", m.dropout_mask, 5 * steps, key, rate, size)
            row(name + "encode", m.encode, 5 * steps, h, 5, B)
            row(name + "gate", m.gate, 5 * steps, h, g, mask)
            row(name + "gate_gradients", m.gate_gradients, 5 * steps, h, g, dy, mask)
            row(name + "encode_gradient", m.encode_gradient, 5 * steps, residuals, dq, 5, B)

    rows()
    idx = mx.random.randint(0, 256, (2, B, T))
    for rate, (kind, _) in cases:
        elementwise_cuda.is_available = is_available if kind == "fused" else lambda: False
        step, _ = build("ours, fast", shape | {"dropout": rate}, B, T)
        row(f"{kind}, dropout {rate:g}: step", step, steps, *idx)
    elementwise_cuda.is_available = is_available


def run_ours(case: dict, steps: int) -> dict:
    """Time a step of ours: seconds, peak and estimate in GB."""
    step, estimate = build(*(case.get(k) for k in ("system", "model", "B", "T", "compute")))
    import mlx.core as mx

    batch = mx.random.randint(0, 256, (2, case["B"], case["T"]))
    start = time.perf_counter()
    step(*batch)  # compiles
    mx.synchronize()
    first = time.perf_counter() - start
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds = timed(lambda: step(*batch), mx.synchronize, steps)
    peak = mx.get_peak_memory() / 1e9
    estimate = estimate and estimate / 1e9
    device = str(mx.default_device())
    result = {"seconds": seconds, "first_seconds": first, "peak_gb": peak}
    return result | {"estimate_gb": estimate, "device": device}


def curve(file: str, rate: float, steps: int = 200, B: int = 2, T: int = 512) -> str:
    """Train the fast and the quadratic form on the same bytes; say how far their losses part.

    The yardstick is a second quadratic form whose weights differ by a rounding error: Adam makes as
    much of a gradient that is all rounding as of a large one.
    """
    shape = CPU[0] | {"dropout": 0.0}
    systems = ("quadratic", "ours, fast", "quadratic, nudged")
    runs = {system: build(system, shape, B, T, rate=rate)[0] for system in systems}
    import numpy as np

    from bdh_lib.data.split import Split
    from bdh_lib.training.batches import get_batch

    stream = np.fromfile(file, np.uint8)
    apart = {system: [] for system in systems}
    split = Split(stream, np.zeros_like(stream))
    s = SimpleNamespace(BATCH_SIZE=B, BLOCK_SIZE=T, SEED=0, SHUFFLE_RECORDS=False, LOSS_ON="all")
    for i in range(steps):
        batch = get_batch(split, i, s, B * T)
        losses = {name: step(batch.idx, batch.targets).item() for name, step in runs.items()}
        for system in systems:
            apart[system].append(abs(losses[system] - losses["quadratic"]))
    return "\n".join(
        f"{system}, rate {rate:g}: loss {losses[system]:.4f} after {steps} steps, at most "
        f"{max(apart[system][:50]):.1e} from the quadratic form in the first 50, "
        f"{max(apart[system]):.1e} in all"
        for system in systems
    )


def run_official(case: dict, steps: int, path: str) -> dict:
    """Time a step of the official model in the file `path`."""
    import torch

    spec = importlib.util.spec_from_file_location("official_bdh", path)
    official = importlib.util.module_from_spec(spec)
    sys.modules["official_bdh"] = official
    spec.loader.exec_module(official)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = official.BDH(official.BDHConfig(**case["model"])).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if "compiled" in case["system"]:
        model = torch.compile(model)
    batch = torch.randint(0, 256, (2, case["B"], case["T"]), device=device)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = model(*batch)[1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = timed(step, synchronize, steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"seconds": seconds, "peak_gb": peak, "device": device}


def run(case: dict, args: argparse.Namespace) -> dict:
    """Run one case in a process of its own, so that one out of memory costs its row only."""
    command = [sys.executable, __file__, "--case", json.dumps(case), "--steps", str(args.steps)]
    command += ["--official", args.official] if args.official else []
    from bdh_lib.progress import heartbeat

    try:
        with redirect_stdout(sys.stderr), heartbeat(case["system"]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
        result = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        result = {"failed": f"over {args.timeout} s"}
    except (IndexError, ValueError):
        result = {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    return case | result


def speed(result: dict) -> float:
    """Return the bytes trained on per second."""
    return result["B"] * result["T"] / result["seconds"]


def table(results: list[dict], product: dict) -> str:
    """Return the table of all cases; `product` is what run_product measured."""
    rows = [
        f"{'system':<24}{'B':>4}{'T':>7}{'bytes/s':>10}{'ms':>9}{'peak GB':>9}{'estimate':>9}"
        f"{'ratio':>7}{'growth':>8}{'limit':>7}"
    ]
    for r in results:
        if "failed" in r:
            rows.append(f"{r['system']:<24}{r['B']:>4}{r['T']:>7}  {r['failed']}")
            continue
        done = [p for p in results if "seconds" in p]
        peer = next(p for p in done if (p["B"], p["T"]) == (r["B"], r["T"]))
        first = min((p for p in done if p["system"] == r["system"]), key=lambda p: p["T"])
        gb = ["" if r.get(k) is None else f"{r[k]:.2f}" for k in ("peak_gb", "estimate_gb")]
        limit = flops(r["model"], r["B"], r["T"]) / product.get("flops_per_second", math.inf)
        name = r["system"] + (f", {r['compute']}" if "compute" in r else "")
        rows.append(
            f"{name:<24}{r['B']:>4}{r['T']:>7}{speed(r):>10,.0f}{r['seconds'] * 1e3:>9,.1f}"
            f"{gb[0]:>9}{gb[1]:>9}{speed(r) / speed(peer):>7.2f}{speed(first) / speed(r):>8.2f}"
            f"{limit / r['seconds']:>7.0%}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", help="path of pathwaycom/bdh's bdh.py; needs PyTorch")
    parser.add_argument("--gpu", action="store_true", help="the default model at GPU shapes")
    parser.add_argument("--memory", action="store_true", help="peaks, measured and estimated")
    parser.add_argument("--elementwise", action="store_true", help="each operation on activations")
    parser.add_argument(
        "--only", metavar="TEXT", help="rows such as 'ours, fast, T 4096' with TEXT in them"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a case (3)")
    parser.add_argument("--timeout", type=int, default=180, help="seconds a case may take (180)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument(
        "--curve", metavar="FILE", help="compare 200 steps of training on its bytes"
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of --curve (1e-3)")
    args = parser.parse_args()
    if args.elementwise:
        return fused_and_plain(args.gpu, args.steps)
    if args.curve:
        return print(curve(args.curve, args.rate))
    if args.case:
        if args.case["system"].startswith("official"):
            done = run_official(args.case, args.steps, args.official)
        else:
            done = (run_product if "n" in args.case else run_ours)(args.case, args.steps)
        print(json.dumps(done))
        return
    chosen = [c for c in cases(args) if (args.only or "") in f"{c['system']}, T {c['T']}"]
    if not chosen or args.steps < 1:
        parser.error(f"--only {args.only!r}, --steps {args.steps}: no step to time")
    product = run({"system": "one product of n by n", "n": 8192 if args.gpu else 2048}, args)
    print(json.dumps(product), flush=True)
    results = []
    for case in chosen:
        results.append(run(case, args))
        print(json.dumps(results[-1]), flush=True)
    print(table(results, product))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from bdh_lib.script import start

    start.run(__file__)
