"""An exported folder holds the official names, loads there, and says where it comes from."""

import errno
import json
import math
import shlex
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import GOLDEN, random_model, train
from mlx.utils import tree_flatten

import bdh_mlx
import generate
import train_mlx
from bdh_lib import files
from bdh_lib.data.sources import SAMPLE
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
        f"| validation | {best['monitored_loss'] / math.log(2):.4f} bits per byte, of all bytes |",
        "14,336 parameters", "generate.py model.safetensors --mode full --prompt",
    ):  # fmt: skip
        assert needed in card, needed
    command = next(line for line in card.splitlines() if line.startswith("python train_mlx"))
    again = vars(train_mlx.read_settings(shlex.split(command)[2:]))
    ours = json.loads((tmp_path / "full" / "config.json").read_text())["settings"]
    config = vars(again.pop("BDH_CONFIG"))
    skipped = {"CHECKPOINT_DIR", "RUN_NAME", "PROCESSES"}
    assert all((again | config)[k] == v for k, v in ours.items() if k not in skipped)
    assert json.loads((folder / "config.json").read_text()) | {"dropout_v": 0.0} == config
    assert "dropout_v" not in card.split("BDHConfig(")[1].split(")")[0]  # not official
    one, two = bdh_mlx.load_model(tmp_path / "full"), bdh_mlx.load_model(folder)
    pairs = zip(tree_flatten(one.parameters()), tree_flatten(two.parameters()), strict=True)
    assert one.config == two.config and all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_a_card_shows_no_folder_of_this_machine():
    settings = {"DATASET": "/home/me/data/d.jsonl", "INIT_FROM": "~/runs/secret", "RUN_NAME": "r"}
    command = export.training_command(settings)
    assert command == "python train_mlx.py --dataset d.jsonl --init-from secret"
    assert export.training_command({"INIT_FROM": None}).endswith("--init-from none")
    assert export.without_folders("user/name") == "user/name"


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
    folder = tmp_path / "new" / "ex"
    replace = Path.replace
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
    with pytest.raises((UserError, OSError), match=name) as error:
        generate.main([str(tmp_path / "m.safetensors"), "--export", str(tmp_path / name)])
    assert "\n" not in str(error.value)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "loop", "m.safetensors"]


@pytest.mark.parametrize(
    "config",
    [b"\xff", b"[" * 10**5, b"null", b'{"settings": 5}', b'{"settings": {}, "step": [1]}',
     b'{"settings": {"TRAINING_MODE": ["full"], "DATASET": 3}, "step": "x", "data": null}',
     json.dumps({"settings": {"DATASET": 3}, "step": 5, "versions": {}, "own": 5,
                 "data": files.seal({"train": {}})}).encode()],
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


def test_a_hostile_data_name_stays_in_its_cell(tmp_path):
    data = tmp_path / "a|b <script>.jsonl"
    shutil.copy(SAMPLE, data)
    assert train(tmp_path, "--max-iters", 1, "--dataset", data) == 0
    generate.main([str(tmp_path / "full"), "--export", str(tmp_path / "shared")])
    card = (tmp_path / "shared" / "README.md").read_text()
    assert r"| data | a\|b &lt;script>.jsonl |" in card.splitlines()
