"""Generation: ours against recomputing the whole prefix for every byte, and the prompt's speed.

    python bench/generate_speed.py                    # 6 layers on a CPU, under 2 minutes
    python bench/generate_speed.py --gpu              # on a GPU, under 2 minutes
    python bench/generate_speed.py --only profile     # a CUDA GPU's time by kernel; needs PyTorch
    python bench/generate_speed.py --positions checkpoints_mlx/full text.txt    # loss by position

Each case runs in a process of its own, one after the other, so that one that fails costs its rows
only. Only that process imports MLX or PyTorch; so imports stand in the functions. It prints a JSON
line per measurement, then a table; `ratio` is the recomputation's time per byte at that context
divided by the row's.

Weights are random, which leaves half of the neurons active, more than in a trained model.
`--model RUN` takes a checkpoint's weights, `--text FILE` prompts of the kind that it knows. On a
CPU a context is a state of random synapses at that position: a byte costs the same whatever they
hold.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STRETCH = 64  # bytes written in one go: as many as a buffer holds
CPU = [
    {"kind": "stream", "contexts": [1, 128, 1024, 8192], "bytes": 128},
    {"kind": "prefill", "lengths": [1024]},
    {"kind": "recompute", "contexts": [128, 1024], "bytes": 1},
    {"kind": "error"},
]
SINGLE = {"kind": "stream", "contexts": [1, 128, 8192, 65536], "bytes": 512}
GPU = [
    SINGLE | {"dtype": "bfloat16"},
    SINGLE | {"dtype": "float32"},
    {"kind": "stream", "contexts": [512], "B": 64, "dtype": "bfloat16", "bytes": 512},
    {"kind": "prefill", "lengths": [4096, 65536, 1_000_000], "dtype": "bfloat16"},
    {"kind": "prefill", "lengths": [65536], "dtype": "float32"},
    {"kind": "recompute", "contexts": [128, 1024, 8192], "bytes": 3},
    {"kind": "error", "dtype": "float32"},
    {"kind": "error", "dtype": "bfloat16"},
    {"kind": "error", "dtype": "bfloat16", "B": 3},
]
PROFILE = [
    {"kind": "profile", "context": 512, "dtype": "bfloat16", "B": 64},
    {"kind": "profile", "context": 512, "dtype": "bfloat16"},
    {"kind": "profile", "context": 512, "dtype": "float32"},
]


def build(case: dict):
    """Return the model, and a function that makes a prompt (B, T) of --text or of random bytes."""
    import bdh_mlx  # isort: skip
    import mlx.core as mx
    import numpy as np

    mx.random.seed(0)
    model = bdh_mlx.load_model(case["model"]) if case["model"] else bdh_mlx.BDH(bdh_mlx.BDHConfig())
    dtype = getattr(mx, case.get("dtype", "float32"))
    model.compute = replace(model.compute, dtype=dtype)
    mx.eval(model.parameters())
    if not case["text"]:
        return model, lambda B, T: mx.random.randint(0, 256, (B, T))
    text = np.fromfile(case["text"], np.uint8).astype(np.int32)

    def prompt(B, T):
        starts = len(text) // B * np.arange(B)[:, None]
        return mx.array(text[(starts + np.arange(T)) % len(text)])

    return model, prompt


def opened(model, prompt, context: int, B: int):
    """Return a stream of B rows at a context, past the first bytes and folds, which compile."""
    import mlx.core as mx
    import numpy as np

    from bdh_lib.compute.state import State, prefill
    from bdh_lib.generation.decoding import Decoding, read_prompt, stream
    from bdh_lib.generation.sampling import Sampling

    L = model.config.n_layer
    (H, D, N) = model.encoder.shape
    on_gpu = mx.default_device() == mx.gpu
    if on_gpu:
        _, state = prefill(model, prompt(B, context))
    else:
        synapses = tuple(mx.random.normal((H, 1, N, D)) for _ in range(L))
        state = State(context, synapses=synapses if context > 1 else ())
    mx.eval(state)
    sampling = Sampling(temperature=0.8)  # what generate.py takes where no flag says otherwise
    idx = np.array(prompt(B, 1))
    decoding = Decoding(model, sampling, mx.random.key(1))
    stream = stream(decoding, *read_prompt(model, idx, state), idx)
    del state
    for _ in islice(stream, (2 if on_gpu else 1) * STRETCH + 4):
        pass
    return stream


def measure_stream(case: dict):
    """Yield the seconds per step of writing at each context, with sampling, after a warm-up.

    They are medians of stretches that the contexts take in turns, so that a machine's slow minutes
    meet all alike.
    """
    model, prompt = build(case)
    import mlx.core as mx

    B = case.get("B", 1)
    streams = {}
    mx.eval(model.read(prompt(1, 1)))  # lays out the weights
    weights = mx.get_active_memory()
    for context in case["contexts"]:
        mx.reset_peak_memory()
        others = mx.get_active_memory() - weights
        stream = opened(model, prompt, context, B)
        streams[context] = stream, [], (mx.get_peak_memory() - others) / 1e9
    for _ in range(case["bytes"] // STRETCH):
        for stream, seconds, _ in streams.values():
            start = time.perf_counter()
            for _ in islice(stream, STRETCH):
                pass
            seconds.append((time.perf_counter() - start) / STRETCH)
    for context, (_, seconds, peak) in streams.items():
        yield {"context": context, "B": B, "seconds": median(seconds), "peak_gb": peak}


def measure_profile(case: dict):
    """Yield the microseconds of a step by kernel, over as many steps as there are between folds."""
    model, prompt = build(case)
    import mlx.core as mx
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")  # the profiler needs CUDA to be started
    B = case.get("B", 1)
    stream = opened(model, prompt, case["context"], B)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in islice(stream, STRETCH):
            pass
        mx.synchronize()
    kernels = [(k.self_device_time_total, k.count, k.key) for k in profiler.key_averages()]
    yield {"B": B, "kernel": "all", "us": sum(k[0] for k in kernels) / STRETCH, "launches": ""}
    for us, count, name in sorted(kernels, reverse=True)[:8]:
        name = name.rsplit("custom_kernel_")[-1].removeprefix("void ")[:32]
        yield {"B": B, "kernel": name, "us": us / STRETCH, "launches": f"{us / count:.1f} each"}


def measure_prefill(case: dict):
    """Yield the seconds per byte of reading prompts of each length."""
    model, prompt = build(case)
    import mlx.core as mx

    from bdh_lib.compute.state import prefill

    for length in case["lengths"]:
        idx = prompt(1, length)
        mx.eval(idx, prefill(model, idx[:, : 4096 if length > 4096 else 256]))
        mx.reset_peak_memory()
        start = time.perf_counter()
        mx.eval(prefill(model, idx))
        seconds = (time.perf_counter() - start) / length
        yield {"context": length, "B": 1, "seconds": seconds,
               "peak_gb": mx.get_peak_memory() / 1e9}  # fmt: skip


def measure_recompute(case: dict):
    """Yield the seconds per byte where each reads the whole prefix again, as without a state."""
    model, prompt = build(case)
    import mlx.core as mx

    for context in case["contexts"]:
        idx = prompt(1, context)
        mx.eval(model.quadratic(idx[:, :64] if mx.default_device() == mx.cpu else idx))
        start = time.perf_counter()
        for _ in range(case["bytes"]):
            token = mx.argmax(model.quadratic(idx)[0][:, -1:], -1)
            idx = mx.concatenate([idx[:, 1:], token], 1)
            mx.eval(idx)
        seconds = (time.perf_counter() - start) / case["bytes"]
        yield {"context": context, "B": 1, "seconds": seconds,
               "peak_gb": mx.get_peak_memory() / 1e9}  # fmt: skip


def measure_error(case: dict):
    """Yield the largest and mean error of 512 logits: 256 bytes read at once, 256 one by one."""
    model, prompt = build(case)
    import mlx.core as mx

    B = case.get("B", 1)
    out = []
    idx = prompt(B, 512)
    exact = model.quadratic(idx)[0]
    state = None
    for piece in mx.split(idx, list(range(256, 512)), 1):
        logits, state = model.read(piece, state)
        mx.eval(logits, state)
        out.append(logits)
    off = mx.abs(mx.concatenate(out, 1) - exact)
    yield {"context": 512, "B": B, "largest": mx.max(off).item(), "mean": mx.mean(off).item(),
           "logits": mx.std(exact).item()}  # fmt: skip


def positions(run: str, file: str, window: int | None, B: int = 32) -> None:
    """Print the loss by position up to 8 * BLOCK_SIZE, with and without windows, over B texts."""
    import bdh_mlx  # isort: skip
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    from bdh_lib.compute.state import State
    from bdh_lib.units import bits_per_byte

    model, text = bdh_mlx.load_model(run), np.fromfile(file, np.uint8)
    block = model.trained_length
    if not block:
        raise bdh_mlx.UserError(f"{run} does not say its BLOCK_SIZE (config.json)")
    length = 8 * block
    starts = np.linspace(0, len(text) - length - 1, B).astype(int)
    rows = mx.array(text[starts[:, None] + np.arange(length + 1)].astype(np.int32))
    edges = [0, block // 2, *(block * 2**i for i in range(4))]
    print(f"{run}: BLOCK_SIZE {block}; bits per byte of {B} texts of {length:,} bytes in {file}")
    print(f"{'window':>8}" + "".join(f"{f'{a}-{b}':>13}" for a, b in pairwise(edges)))
    for W in (None, window) if window else (None, block // 2, block, 2 * block):
        state = State(window=W)
        losses = []
        for begin in range(0, length, block):
            piece = rows[:, begin : begin + block + 1]
            logits, state = model.read(piece[:, :-1], state)
            losses.append(nn.losses.cross_entropy(logits, piece[:, 1:]).mean(0))
            mx.eval(losses[-1], state)
        bits = bits_per_byte(np.array(mx.concatenate(losses)))
        cells = (bits[a:b].mean() for a, b in pairwise(edges))
        print(f"{W or 'none':>8}" + "".join(f"{cell:>13.3f}" for cell in cells), flush=True)


def run(case: dict, timeout: int) -> list[dict]:
    """Return the lines of one case's process; a failure is a line, too."""
    env = os.environ | ({"MLX_ENABLE_TF32": "0"} if case["kind"] == "error" else {})
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    from bdh_lib.progress import heartbeat

    failed = None
    output = ""
    try:
        with redirect_stdout(sys.stderr), heartbeat(case["kind"]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
        output = done.stdout
        if done.returncode:
            failed = (done.stderr.strip().splitlines() or ["killed"])[-1][:200]
    except subprocess.TimeoutExpired as error:
        failed = f"over {timeout} s"
        output = (error.stdout or b"").decode()
    lines = [case | json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return lines + ([case | {"failed": failed}] if failed else [])


def table(results: list[dict]) -> str:
    """Return the table of all measurements."""
    rows = [
        f"{'system':<34}{'B':>4}{'context':>9}{'bytes/s':>11}{'ms/byte':>10}{'GB':>7}{'ratio':>9}"
    ]
    peers = {r["context"]: r["seconds"] for r in results if r["kind"] == "recompute" and "B" in r}
    for r in results:
        name = f"{r['kind']} {r.get('dtype', 'float32')}"
        if "failed" in r:
            rows.append(f"{name:<34}  failed: {r['failed']}")
        elif "kernel" in r:
            rows.append(f"{name:<34}{r['B']:>4}  {r['kernel']:<34}{r['us']:>10,.1f} us a step"
                        f"  {r['launches']}")  # fmt: skip
        elif "largest" in r:
            rows.append(f"{name:<34}{r['B']:>4}  logits (spread {r['logits']:.2f}) off by "
                        f"{r['largest']:.1e} at most, {r['mean']:.1e} on average")  # fmt: skip
        else:
            each = r["seconds"] / r["B"]
            peer = peers.get(r["context"])
            ratio = f"{peer / each:,.1f}" if peer and r["kind"] == "stream" else ""
            rows.append(f"{name:<34}{r['B']:>4}{r['context']:>9,}{1 / each:>11,.1f}"
                        f"{each * 1e3:>10,.4f}{r['peak_gb']:>7.2f}{ratio:>9}")  # fmt: skip
    single = {(r.get("dtype"), r["context"]): r["seconds"] for r in results
              if r["kind"] == "stream" and r.get("B") == 1}  # fmt: skip
    for (dtype, context), seconds in single.items():
        if context == 8192 and (dtype, 128) in single:
            ratio = seconds / single[dtype, 128]
            rows.append(f"time per byte at 8,192 / at 128, {dtype or 'float32'}: {ratio:.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the cases of a GPU")
    parser.add_argument("--model", help="run, checkpoint or weights (random, default shape)")
    parser.add_argument("--text", help="file whose bytes are the prompts (random bytes)")
    parser.add_argument("--positions", nargs=2, metavar=("RUN", "FILE"), help="loss by position")
    parser.add_argument("--window", type=int, help="of --positions, bytes (BLOCK_SIZE * 1/2, 1, 2)")
    parser.add_argument(
        "--only", help="cases of this kind: stream, prefill, recompute, error or profile"
    )
    parser.add_argument("--timeout", type=int, default=120, help="seconds a process may take (120)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.positions:
        return positions(*args.positions, args.window)
    if args.case:
        for line in globals()["measure_" + args.case["kind"]](args.case):
            print(json.dumps(line), flush=True)
        return
    results = []
    cases = PROFILE if args.only == "profile" else GPU if args.gpu else CPU
    if not (cases := [c for c in cases if args.only in (None, c["kind"])]):
        parser.error(f"--only {args.only!r} is not a kind of case")
    for case in cases:
        for line in run(case | {"model": args.model, "text": args.text}, args.timeout):
            results.append(line)
            print(json.dumps(line), flush=True)
    print(table(results))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from bdh_lib.script import start

    start.run(__file__)
