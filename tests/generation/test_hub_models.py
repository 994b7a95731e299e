"""Models of others: from the hub, by its stand-in on 127.0.0.1, and from official checkpoints."""

import os
import re
import subprocess
import sys
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT, TRAINER
from hub_stub import COMMIT, serving

import bdh_mlx
from bdh_lib.generation.export import export_model

TINY = bdh_mlx.BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a hub with an exported model, one of pickles alone, and a gated one."""
    root = tmp_path_factory.mktemp("hub")
    models = root / "models" / "user"
    models.mkdir(parents=True)
    mx.random.seed(3)
    bdh_mlx.save_model(bdh_mlx.BDH(TINY), root / "weights.safetensors")
    export_model(str(root / "weights.safetensors"), models / "tiny")
    (models / "pickled").mkdir()
    (models / "pickled/pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (models / "gated").mkdir()
    (models / "gated/GATED").touch()
    with serving(root) as (address, requests):
        yield address, requests


def run(address, home, *command):
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "MLX_ENABLE_TF32": "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def generate(address, home, model, *flags):
    flags = flags or ("--prompt", "abc", "--temperature", "0", "--max-new-tokens", "8")
    return run(address, home, "generate.py", model, *flags)


def test_a_model_of_the_hub_is_fetched_once_and_usable_offline(hub, tmp_path):
    address, requests = hub
    online = generate(address, tmp_path, "hf:user/tiny")
    assert online.returncode == 0 and online.stdout.startswith("abc"), online.stderr
    fetched = [r for r in requests if r.startswith("GET") and r.endswith("model.safetensors")]
    assert len(fetched) == 1
    later = generate(NOWHERE, tmp_path, "hf:user/tiny")
    assert later.stdout == online.stdout
    pinned = generate(address, tmp_path, f"hf:user/tiny@{COMMIT}")
    assert pinned.stdout == online.stdout


ERRORS = {
    "hf:user/pickled": "hf:user/pickled has no model.safetensors",
    "hf:user/gated": "is gated: ask for access on its page",
    "hf:user/mispelt": "is not on the hub, or private there",
    "hf:a/b/c": "is not a name of a model, which looks like hf:user/name",
    "hf:": "is not a name of a model, which looks like hf:user/name",
}


@pytest.mark.parametrize("name", ERRORS)
def test_each_fault_of_a_model_on_the_hub_is_one_line(hub, tmp_path, name):
    done = generate(hub[0], tmp_path, name)
    assert done.returncode == 2 and ERRORS[name] in done.stderr.splitlines()[-1], done.stderr
    assert not [*tmp_path.rglob("*.bin")]  # nothing but safetensors is fetched


def test_a_model_that_is_not_in_the_cache_needs_the_hub(tmp_path):
    done = generate(NOWHERE, tmp_path, "hf:user/tiny")
    assert (
        done.returncode == 2 and "is not in the cache, and the hub is out of reach" in done.stderr
    )


def test_a_run_starts_from_a_model_of_the_hub_and_resumes_without_it(hub, tmp_path):
    flags = "--preset tiny --dataset sample --init-from hf:user/tiny --n-layer 2 --n-embd 16 "
    flags += "--n-head 2 --mlp-internal-dim-multiplier 8 --block-size 32 --batch-size 2 "
    flags += "--eval-bytes 100 --sample-bytes 0 --checkpoint-dir"
    command = [*TRAINER, *flags.split(), str(tmp_path / "runs"), "--max-iters"]
    first = run(hub[0], tmp_path / "hf", *command, "1")
    assert "start: weights of hf:user/tiny" in first.stdout, first.stderr
    resumed = run(NOWHERE, tmp_path / "hf", *command, "2")
    assert resumed.returncode == 0 and "after iteration 1" in resumed.stdout, resumed.stderr
    other = run(NOWHERE, tmp_path / "hf", *command, "3", "--init-from", "hf:user/other")
    assert other.returncode == 2 and "did not start from hf:user/other" in other.stderr
    pickled = run(hub[0], tmp_path / "hf", *command, "1", "--init-from", "hf:user/pickled",
                  "--run-name", "other")  # fmt: skip
    assert pickled.returncode == 2 and "has no model.safetensors" in pickled.stderr


class Tensor:
    """A stand-in for a tensor of PyTorch, as the snippet uses one."""

    def __init__(self, array):
        self.array = np.array(array)

    def float(self):
        return self

    def numpy(self):
        return self.array


def test_the_documented_snippet_converts_an_official_checkpoint(tmp_path, monkeypatch):
    mx.random.seed(4)
    model = bdh_mlx.BDH(TINY)
    weights = {"encoder": model.encoder, "encoder_v": model.encoder_v, "decoder": model.decoder}
    weights |= {"lm_head": model.lm_head, "embed.weight": model.embed.weight}
    weights["attn.freqs"] = mx.zeros((1, 1, 1, 8))
    saved = {
        "model": {f"_orig_mod.{name}": Tensor(array) for name, array in weights.items()},
        "config": {"n_layer": 2, "n_embd": 16, "n_head": 2, "dropout": 0.1, "vocab_size": 256}
        | {"mlp_internal_dim_multiplier": 8},
        "iters": 3000,
    }
    loaded = []
    torch = ModuleType("torch")
    torch.load = lambda path, **options: loaded.append((path, options)) or saved
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/generating.md").read_text()
    (snippet,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "torch" in code
    ]
    exec(snippet, {})
    assert loaded == [("checkpoint.pt", {"map_location": "cpu", "weights_only": True})]
    converted = bdh_mlx.load_model("model.safetensors")
    assert converted.config == bdh_mlx.BDHConfig(**saved["config"])
    idx = mx.array([[1, 2, 3, 200]])
    assert mx.array_equal(converted(idx)[0], model(idx)[0])


def test_a_model_that_cannot_be_stored_is_told_with_the_cure(hub, tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    done = generate(hub[0], tmp_path / "home", "hf:user/tiny")
    assert done.returncode == 2 and "needs a folder to write in" in done.stderr, done.stderr
    assert "set HF_HOME" in done.stderr and "out of reach" not in done.stderr
