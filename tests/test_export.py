"""An exported folder holds the official names, loads there, and says where it comes from."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_model import GOLDEN, random_model
from test_train import train

import bdh_mlx
import generate
import train_mlx
from bdh_lib.generation import export
from bdh_mlx import UserError


def test_names_and_shapes_are_the_official_ones(tmp_path):
    golden = {k[6:]: v for k, v in mx.load(str(GOLDEN)).items() if k.startswith("param.")}
    mx.save_safetensors(str(tmp_path / "golden.safetensors"), golden)
    assert (
        generate.main([str(tmp_path / "golden.safetensors"), "--export", str(tmp_path / "x")]) == 0
    )
    found = mx.load(str(tmp_path / "x" / "model.safetensors"))
    assert found.keys() == golden.keys()
    assert all(mx.array_equal(found[k], golden[k]) for k in golden)


def test_the_card_tells_where_a_run_comes_from(tmp_path):
    assert train(tmp_path, "--max-iters", 5) == 0
    folder = tmp_path / "shared"
    assert generate.main([str(tmp_path / "full"), "--export", str(folder)]) == 0
    card = (folder / "README.md").read_text()
    best = json.loads((tmp_path / "full" / "best.json").read_text())
    for needed in (
        "license: other", "| data | sample |", "| mode | full |", "| iterations | 5 |",
        f"| validation | {best['monitored_loss'] / 0.693147:.4f} bits per byte, of all bytes |",
        "14,336 parameters", "generate.py model.safetensors --mode full --prompt",
    ):  # fmt: skip
        assert needed in card, needed
    command = next(line for line in card.splitlines() if line.startswith("python train_mlx"))
    again = vars(train_mlx.settings(shlex.split(command)[2:]))
    ours = json.loads((tmp_path / "full" / "config.json").read_text())["settings"]
    config = vars(again.pop("BDH_CONFIG"))
    skipped = {"CHECKPOINT_DIR", "RUN_NAME", "PROCESSES"}
    assert all((again | config)[k] == v for k, v in ours.items() if k not in skipped)
    assert json.loads((folder / "config.json").read_text()) | {"dropout_v": 0.0} == config
    assert "dropout_v" not in card.split("BDHConfig(")[1].split(")")[0]  # not official
    one, two = bdh_mlx.load_model(tmp_path / "full"), bdh_mlx.load_model(folder)
    pairs = zip(tree_flatten(one.parameters()), tree_flatten(two.parameters()), strict=True)
    assert one.config == two.config and all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_nothing_is_written_over(tmp_path):
    bdh_mlx.save_model(random_model(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not empty"):
        generate.main([str(tmp_path / "model.safetensors"), "--export", str(tmp_path)])


@pytest.mark.parametrize("fails", ["model.safetensors", "config.json", "README.md"])
@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_nothing_and_can_be_made_again(
    fails, there, tmp_path, monkeypatch
):
    bdh_mlx.save_model(random_model(), tmp_path / "m.safetensors")
    folder, replace = tmp_path / "new" / "ex", Path.replace
    if there:
        folder.mkdir(parents=True)

    def full(self, to):
        if to.name == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, to)

    command = [str(tmp_path / "m.safetensors"), "--export", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match=f"{fails} cannot be written: No space left"):
            generate.main(command)
    left = [f.name for f in tmp_path.rglob("*")]
    assert sorted(left) == (["ex", "m.safetensors", "new"] if there else ["m.safetensors"])
    assert generate.main(command) == 0 and len([*folder.iterdir()]) == 3


@pytest.mark.parametrize("name", ["file/ex", "loop/ex", "x" * 300, "new/" + "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_line(name, tmp_path):
    bdh_mlx.save_model(random_model(), tmp_path / "m.safetensors")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((UserError, OSError), match=name) as told:
        generate.main([str(tmp_path / "m.safetensors"), "--export", str(tmp_path / name)])
    assert "\n" not in str(told.value)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "loop", "m.safetensors"]


@pytest.mark.parametrize(
    "config",
    [b"\xff", b"[" * 10**5, b"null", b'{"settings": 5}', b'{"settings": {}, "step": [1]}',
     b'{"settings": {"TRAINING_MODE": ["full"], "DATASET": 3}, "step": "x", "data": null}'],
)  # fmt: skip
@pytest.mark.parametrize("best", [b"[]", b'{"step": 5, "monitored_loss": NaN}', b"{" * 10**5])
def test_a_model_of_a_damaged_run_is_exported(config, best, tmp_path):
    step = tmp_path / "step-000005"
    step.mkdir()
    bdh_mlx.save_model(random_model(), step / "model.safetensors")
    (step / "config.json").write_bytes(config)
    (tmp_path / "best.json").write_bytes(best)
    assert generate.main([str(tmp_path), "--export", str(tmp_path / "ex")]) == 0
    assert "shape | n_layer 2" in (tmp_path / "ex" / "README.md").read_text()


def test_a_hostile_data_name_stays_in_its_cell():
    told = {"data": "a|b\n# heading <script>"}["data"].translate(export.CELL)
    assert told == r"a\|b # heading &lt;script>"


OFFICIAL = """
import importlib.util, json, sys
import numpy as np, torch
folder, file = sys.argv[1:]
spec = importlib.util.spec_from_file_location("official_bdh", file)
official = importlib.util.module_from_spec(spec)
spec.loader.exec_module(official)
model = official.BDH(official.BDHConfig(**json.load(open(folder + "/config.json")))).eval()
arrays = {k: torch.from_numpy(v) for k, v in np.load(folder + "/arrays.npz").items()}
lacking = model.load_state_dict(arrays, strict=False)
assert lacking.missing_keys == ["attn.freqs"] and not lacking.unexpected_keys, lacking
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(folder + "/idx.npy")))[0]
np.save(folder + "/logits.npy", logits.numpy())
"""


@pytest.mark.skipif("BDH_OFFICIAL" not in os.environ, reason="names no official bdh.py")
def test_the_official_code_computes_the_same(tmp_path):
    """BDH_OFFICIAL=bdh.py, pathwaycom/bdh's file; BDH_PYTHON=an interpreter with PyTorch."""
    ours = random_model(scale=4)
    bdh_mlx.save_model(ours, tmp_path / "m.safetensors")
    folder = tmp_path / "x"
    generate.main([str(tmp_path / "m.safetensors"), "--export", str(folder)])
    arrays = mx.load(str(folder / "model.safetensors"))
    np.savez(folder / "arrays.npz", **{k: np.array(v) for k, v in arrays.items()})
    idx = np.random.default_rng(0).integers(0, 256, (2, 50))
    np.save(folder / "idx.npy", idx)
    python = os.environ.get("BDH_PYTHON", sys.executable)  # in a process without MLX
    subprocess.run([python, "-c", OFFICIAL, folder, os.environ["BDH_OFFICIAL"]], check=True)
    got, expected = np.array(ours(mx.array(idx))[0]), np.load(folder / "logits.npy")
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
