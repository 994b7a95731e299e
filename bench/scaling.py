"""Scaling of data-parallel training: bytes/s of 1 and of more processes, the same batch for each.

    python bench/scaling.py                  # 1 and 2 processes on this machine, a small model
    python bench/scaling.py --gpu            # the guide's model and shape, on 1 and 2 GPUs
    python bench/scaling.py --gpu --most 8

Each case trains for some iterations on the embedded data in processes that mlx.launch starts (NCCL
with CUDA, else the ring), and reads the speed from the run's metrics.jsonl, the first two lines
left out. Prints one JSON line per case; efficiency is bytes/s over those of one process times n.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU = "--n-layer 4 --n-embd 64 --mlp-internal-dim-multiplier 32 --block-size 1024 --batch-size 1"
GPU = "--block-size 4096 --batch-size 2"
COMMON = (
    "--dataset sample --training-mode full --epochs none --log-freq 5 --sample-bytes 0 "
    "--eval-bytes 2 --eval-freq 100000 --save-freq 100000"
)


def speed(n: int, args: argparse.Namespace, folder: str) -> float:
    """Median bytes/s of a run on n processes."""
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(n), "-p", str(args.port)]
    launch += ["--backend", args.backend or ("nccl" if args.gpu else "ring"), "--"]
    command = [sys.executable, str(ROOT / "train_mlx.py"), *COMMON.split()]
    command += [*(GPU if args.gpu else CPU).split(), "--max-iters", str(args.iterations)]
    command += ["--checkpoint-dir", folder, "--run-name", f"on-{n}"]
    ran = subprocess.run(
        (launch if n > 1 else []) + command,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        lines = (Path(folder) / f"on-{n}" / "metrics.jsonl").read_text().splitlines()
        speeds = [m["bytes_per_s"] for m in map(json.loads, lines) if "bytes_per_s" in m]
        return statistics.median(speeds[2:])
    except (OSError, statistics.StatisticsError):
        sys.exit(f"{n} processes did not train:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="the guide's shape, one GPU each")
    parser.add_argument("--most", type=int, default=2, help="1, 2, 4 .. processes up to this (2)")
    parser.add_argument("--iterations", type=int, default=40, help="of each case (40)")
    parser.add_argument("--backend", help="of mlx.launch: ring, nccl, mpi, jaccl")
    parser.add_argument("--port", type=int, default=32423, help="first port of a ring (32423)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = [1 << i for i in range(args.most.bit_length()) if 1 << i <= args.most]
        speeds = {n: speed(n, args, folder) for n in counts}
    for n, bytes_per_s in speeds.items():
        efficiency = round(bytes_per_s / (n * speeds[1]), 3)
        print(json.dumps({"processes": n, "bytes/s": round(bytes_per_s), "efficiency": efficiency}))


if __name__ == "__main__":
    main()
