"""What several test modules use: small models, short runs, and what runs leave."""

import hashlib
import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import train_mlx
from bdh_lib.compute import layer
from bdh_lib.compute.rope import rotate
from bdh_lib.data import prepare as preparing
from bdh_lib.data.prepare import DataSettings
from bdh_lib.generation.decoding import Decoding, generate_batch
from bdh_lib.generation.sampling import Sampling
from bdh_mlx import BDH, BDHConfig, attention_quadratic, save_model

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden_bdh.safetensors")  # test_model.py says how it was made
CONFIG = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)
MODEL = "--n-layer 2 --n-embd 16 --n-head 2 --mlp-internal-dim-multiplier 8 --dropout 0.2"
SMALL = (
    f"{MODEL} --dataset sample --training-mode full --block-size 64 --batch-size 2 --epochs none"
)
QUIET = "--sample-bytes 0 --eval-bytes 500 --log-freq 1 --eval-freq 5 --save-freq 4"
OFFICIAL = "--ema-decay 0 --weight-decay 0.1 --beta2 0.999"  # an average needs a longer run
ARGS = (
    f"{SMALL} {QUIET} {OFFICIAL} --warmup-iters 2 --lr-decay-iters 20 --learning-rate 1e-3".split()
)
# The first lines of a script that trains: reports would take a second at each evaluation
NO_REPORT = "import train_mlx\ntrain_mlx.redraw_report = lambda *_: None\n"
IMPORT_TRAINER = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{NO_REPORT}"
# The last lines, which start the trainer as its file does
RUN_TRAINER = "from bdh_lib.script import cli\ncli.run_main(train_mlx.main, 'train_mlx.py')\n"
TRAINER = ("-c", IMPORT_TRAINER + RUN_TRAINER)  # arguments of Python
GREEDY = Sampling(temperature=0)
KEY = mx.random.key(1)
COUNTING = [(b + 1) % 256 for b in range(256)]  # model_of it writes all byte values, over and over
RECORD = {"system": "Be kind.", "instruction": "Greet.", "response": "Hello, wörld"}


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


def equal_arrays(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def metrics(folder, run="full"):
    return [json.loads(x) for x in (folder / run / "metrics.jsonl").read_text().splitlines()]


def model_of(following):
    """A model that writes following[b] after the byte b, at any temperature: its layer adds nothing
    to the embedding, which is one number per byte value."""
    model = BDH(BDHConfig(n_layer=1, n_embd=256, n_head=1, mlp_internal_dim_multiplier=1))
    zero = mx.zeros((1, 256, 256))
    model.update({"encoder": zero, "encoder_v": zero, "decoder": zero[0]})
    model.embed.weight = mx.eye(256)
    model.lm_head = 100 * mx.eye(256)[mx.array(following)]
    return model


def saved(model, folder, mode="full", **settings):
    """A run folder with one checkpoint of this model."""
    at = folder / "run" / "step-000001"
    at.mkdir(parents=True)
    save_model(model, at / "model.safetensors")
    settings = {"TRAINING_MODE": mode, "BLOCK_SIZE": 64, "BATCH_SIZE": 2} | settings
    (at / "config.json").write_text(json.dumps({"step": 1, "settings": settings}))
    return folder / "run"


def greedy(model, prompt, n):
    """The n bytes that the model writes after a prompt, each the likeliest one."""
    return next(generate_batch(Decoding(model, GREEDY, KEY, [], n), [prompt]))[1]


def prepared_folder(source, cache, mode="full", val_fraction=0.1, seed=1, columns=None):
    """The folder of prepared data."""
    settings = DataSettings(str(source), mode, val_fraction, seed, columns)
    return preparing.prepare(settings, cache)


def prepare(source, cache, *args, **kwargs):
    """The report, and the bytes of both sides."""
    folder = prepared_folder(source, cache, *args, **kwargs)
    sides = {side: (folder / f"{side}.bin").read_bytes() for side in ("train", "val")}
    return json.loads((folder / "data.json").read_text()), sides["train"], sides["val"]


def write_jsonl(path, records):
    """The path of a file that holds these records, or lines that are none."""
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def numbered(n, **extra):
    """As many records, no two alike."""
    return [{k: f"{v} {i}" for k, v in (RECORD | extra).items()} for i in range(n)]


def loss_and_gradients(model, forward, batch):
    def loss(idx, targets):
        return nn.losses.cross_entropy(forward(idx), targets, reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(*batch)
    return {"loss": value} | dict(tree_flatten(gradients))


def max_relative_error(a, b):
    """Largest difference of any array, relative to that array's largest number."""
    return max(max_abs_error(a[k], b[k]) / (mx.max(mx.abs(b[k])).item() + 1e-12) for k in b)


def masked_quadratic(mask):
    """A layer as it is defined, with its dropout as a product by `mask`, (H, B, T, N); cubed."""

    def quadratic(v, Dx, Dy, E):
        x = nn.relu(v[None] @ Dx[:, None])
        a = attention_quadratic(rotate(x), v)
        y = nn.relu(layer.ln(a) @ Dy[:, None]) * x * mask
        return (layer.add_and_norm(v, (y @ E[:, None]).sum(0)) ** 3).sum()

    return quadratic


def write_best(run, **best):
    """Write a best.json that its sha256 fits."""
    best["sha256"] = hashlib.sha256(json.dumps(best).encode()).hexdigest()
    (run / "best.json").write_text(json.dumps(best))
