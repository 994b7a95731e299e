"""Scaling of data-parallel training: bytes/s of 1 and of more processes, the same batch for each.

    python bench/scaling.py                  # 1 and 2 processes on this machine, a small model
    python bench/scaling.py --gpu            # the default model, blocks of 4,096, on 1 and 2 GPUs
    python bench/scaling.py --gpu --most 8
    python bench/scaling.py --busy           # one trainer alone, and two at once on the same cores

Each case trains for some iterations on the embedded data in processes that mlx.launch starts (NCCL
with CUDA, else the ring), and reads the speed from the run's metrics.jsonl without its first two
lines. It prints one JSON line per case; efficiency is bytes/s divided by n times those of one
process. With --busy each process trains the same model by itself, and share is the bytes/s of the
slowest divided by those of one alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU = "--n-layer 4 --n-embd 64 --mlp-internal-dim-multiplier 32 --block-size 1024 --batch-size 1"
GPU = "--block-size 4096 --batch-size 2"
COMMON = (
    "--dataset sample --training-mode full --epochs none --log-freq 5 --sample-bytes 0 "
    "--eval-bytes 2 --eval-freq 100000 --save-freq 100000"
)


def command(args: argparse.Namespace, folder: str, name: str) -> list[str]:
    """Return the command of a run."""
    result = [sys.executable, str(ROOT / "train_mlx.py"), *COMMON.split()]
    result += [*(GPU if args.gpu else CPU).split(), "--max-iters", str(args.iterations)]
    return [*result, "--checkpoint-dir", folder, "--run-name", name]


def start(command: list[str]) -> subprocess.Popen:
    """Start a process whose output can be read when it has ended."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, cwd=ROOT)


def speed(process: subprocess.Popen, run: Path) -> float:
    """Return the median bytes/s of a run that `process` computes, once it has ended."""
    from bdh_lib.progress import heartbeat

    with redirect_stdout(sys.stderr), heartbeat(f"training {run.name}"):
        output = process.communicate()[0]
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        speeds = [m["bytes_per_s"] for m in map(json.loads, lines) if "bytes_per_s" in m]
        return statistics.median(speeds[2:])
    except (OSError, statistics.StatisticsError):
        sys.exit(f"{run.name} logged fewer than three speeds:\n{output[-4000:]}")


def together(n: int, args: argparse.Namespace, folder: str) -> float:
    """Return the median bytes/s of a run on n processes."""
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(n), "-p", str(args.port)]
    launch += ["--backend", args.backend or ("nccl" if args.gpu else "ring"), "--"]
    run = (launch if n > 1 else []) + command(args, folder, f"on-{n}")
    return speed(start(run), Path(folder, f"on-{n}"))


def apart(n: int, args: argparse.Namespace, folder: str) -> float:
    """Return the median bytes/s of the slowest of n runs at once."""
    names = [f"{i}-of-{n}" for i in range(1, n + 1)]
    processes = [start(command(args, folder, name)) for name in names]
    return min(speed(p, Path(folder, name)) for p, name in zip(processes, names, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="blocks of 4,096, one GPU each")
    parser.add_argument("--busy", action="store_true", help="runs that do not share their work")
    parser.add_argument("--most", type=int, default=2, help="1, 2, 4 .. processes up to this (2)")
    parser.add_argument("--iterations", type=int, default=40, help="of each case (40)")
    parser.add_argument("--backend", help="of mlx.launch: ring, nccl, mpi, jaccl")
    parser.add_argument("--port", type=int, default=32423, help="first port of a ring (32423)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = [1 << i for i in range(args.most.bit_length()) if 1 << i <= args.most]
        speeds = {n: (apart if args.busy else together)(n, args, folder) for n in counts}
    for n, bytes_per_s in speeds.items():
        ratio = round(bytes_per_s / speeds[1] / (1 if args.busy else n), 3)
        name = "share" if args.busy else "efficiency"
        print(json.dumps({"processes": n, "bytes/s": round(bytes_per_s), name: ratio}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from bdh_lib.script import start

    start.run(__file__)
