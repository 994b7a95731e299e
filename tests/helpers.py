"""What several test modules use: small models, short runs, and what runs leave."""

import json
import re

import mlx.core as mx
import numpy as np
from conftest import ROOT

import train_mlx
from bdh_mlx import BDH, BDHConfig

GOLDEN = ROOT / "tests" / "golden_bdh.safetensors"  # computed with the official PyTorch code
CONFIG = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)
MODEL = "--n-layer 2 --n-embd 16 --n-head 2 --mlp-internal-dim-multiplier 8 --dropout 0.2"
SMALL = (
    f"{MODEL} --dataset sample --training-mode full --block-size 64 --batch-size 2 --epochs none"
)
QUIET = "--sample-bytes 1 --eval-bytes 500 --log-freq 1 --eval-freq 5 --save-freq 4"
OFFICIAL = "--ema-decay 0 --weight-decay 0.1 --beta2 0.999"  # a short run is no average
ARGS = (
    f"{SMALL} {QUIET} {OFFICIAL} --warmup-iters 2 --lr-decay-iters 20 --learning-rate 1e-3".split()
)


def random_model(config=CONFIG, seed=0, scale=10):
    """Weights larger than at initialisation, so that logits are far from uniform."""
    mx.random.seed(seed)
    model = BDH(config)
    model.update({k: v * scale for k, v in model.parameters().items() if isinstance(v, mx.array)})
    return model


def random_bytes(B, T, seed=1):
    return mx.random.randint(0, 256, (B, T), key=mx.random.key(seed))


def max_abs_error(a, b):
    return mx.max(mx.abs(a - b)).item()


def train(folder, *args):
    own = ARGS
    if "--phases" in args:  # which has modes and epochs of its own
        own = re.sub(r"--(training-mode|epochs) \S+", "", " ".join(ARGS)).split()
    return train_mlx.main([*own, "--checkpoint-dir", str(folder), *map(str, args)])


def arrays(folder, step, run="full"):
    """Every array of a checkpoint: parameters, optimizer state, raw weights beside an average."""
    at = folder / run / f"step-{step:06d}"
    names = ("model", "optimizer", "raw")
    names = [name for name in names if (at / f"{name}.safetensors").exists()]
    files = [mx.load(str(at / f"{name}.safetensors")) for name in names]
    return {f"{i}.{k}": np.array(v) for i, file in enumerate(files) for k, v in file.items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def metrics(folder, run="full"):
    return [json.loads(x) for x in (folder / run / "metrics.jsonl").read_text().splitlines()]
