"""The model is the official BDH: its numbers, its parameters, and one function in three forms.

golden_bdh.safetensors holds what the official code, bdh.py of pathwaycom/bdh at 714bc80, computed
with PyTorch 2.13.0 on a CPU, in float32 and without dropout; its header has the configuration
(3 layers, D 32, 4 heads of 128 neurons) and the settings of AdamW. The weights are 4 times the
usual initial ones, normal with a deviation of 0.08, so that logits are far from uniform. The seeds
of weights and bytes were not recorded; the file has the numbers themselves:

    param.*                              the five arrays under their official names
    idx, targets (20, 2, 80)             20 batches of random bytes
    logits, loss, grad.*                 of the first batch
    train.losses (20,), trained.*        20 steps of AdamW, a batch each, and the arrays after them
    generate.prompt, generate.greedy     8 bytes, and the same with 24 bytes by argmax after them
"""

import copy
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers import CONFIG, GOLDEN, ROOT, max_abs_error, random_bytes, random_model
from mlx.utils import tree_flatten

import bdh_mlx
from bdh_lib.compute import blas
from bdh_lib.compute.state import prefill
from bdh_lib.generation import decoding
from bdh_lib.generation.sampling import Sampling
from bdh_mlx import BDH, BDHConfig, UserError


@pytest.fixture(scope="module")
def golden():
    """What the official code computed, as the module's docstring says."""
    return mx.load(str(GOLDEN))


@pytest.fixture
def official(golden, tmp_path):
    """The golden weights as PyTorch would save them: a buffer, and the prefix of torch.compile."""
    _, header = mx.load(str(GOLDEN), return_metadata=True)
    arrays = {f"_orig_mod.{k[6:]}": v for k, v in golden.items() if k.startswith("param.")}
    arrays["_orig_mod.attn.freqs"] = mx.zeros((1, 1, 1, 128))
    mx.save_safetensors(str(tmp_path / "official.safetensors"), arrays, metadata=header)
    return bdh_mlx.load_model(tmp_path / "official.safetensors")


def test_logits_and_loss_equal_the_official_ones(golden, official):
    logits, loss = official(golden["idx"][0], golden["targets"][0])
    assert max_abs_error(logits, golden["logits"]) < 1e-4
    assert abs(loss.item() - golden["loss"].item()) < 1e-5


def test_every_gradient_equals_the_official_one(golden, official):
    gradient = nn.value_and_grad(official, lambda *batch: official(*batch)[1])
    _, gradients = gradient(golden["idx"][0], golden["targets"][0])
    for name, g in tree_flatten(gradients):
        scale = mx.max(mx.abs(golden[f"grad.{name}"])).item()
        assert max_abs_error(g, golden[f"grad.{name}"]) < 1e-5 * scale, name


def test_twenty_steps_of_adamw_equal_the_official_ones(golden, official):
    optimizer = optim.AdamW(1e-3, weight_decay=0.1, bias_correction=True)
    gradient = nn.value_and_grad(official, lambda *batch: official(*batch)[1])
    for idx, targets, expected in zip(
        golden["idx"], golden["targets"], golden["train.losses"].tolist(), strict=True
    ):
        loss, gradients = gradient(idx, targets)
        optimizer.update(official, gradients)
        assert abs(loss.item() - expected) < 5e-4  # Adam amplifies rounding: 1.2e-4 seen
    for name, p in tree_flatten(official.parameters()):  # without bias correction: 2e-2
        assert mx.mean(mx.abs(p - golden[f"trained.{name}"])).item() < 1e-4, name


def test_greedy_bytes_equal_the_official_ones(golden, official):
    out = official.generate(golden["generate.prompt"], 24, temperature=0)
    assert out.tolist() == golden["generate.greedy"].tolist()


def test_the_five_official_parameters_and_no_other():
    shapes = {name: p.shape for name, p in tree_flatten(BDH(BDHConfig()).parameters())}
    assert shapes == {
        "embed.weight": (256, 256),
        "encoder": (4, 256, 8192),
        "encoder_v": (4, 256, 8192),
        "decoder": (32768, 256),
        "lm_head": (256, 256),
    }
    assert sum(map(math.prod, shapes.values())) == 25_296_896
    assert shapes.keys() == dict(tree_flatten(BDH(BDHConfig()).trainable_parameters())).keys()


def test_first_loss_is_near_that_of_a_uniform_guess():
    loss = BDH(CONFIG)(random_bytes(4, 64), random_bytes(4, 64, seed=2))[1]
    assert abs(loss.item() - math.log(256)) < 0.1


def test_a_byte_changes_no_logits_before_it():
    model, idx = random_model(), random_bytes(1, 50)
    before = model(idx)[0]
    for t in (0, 20, 49):
        changed = mx.array(idx)
        changed[0, t] = (idx[0, t] + 1) % 256
        after = model(changed)[0]
        assert max_abs_error(before[:, t:], after[:, t:]) > 0
        if t:
            assert max_abs_error(before[:, :t], after[:, :t]) == 0
        assert max_abs_error(before[:, t], after[:, t]) > 1e-3


def test_dropout_acts_only_with_a_key_and_depends_on_it():
    model = random_model()
    batch = (random_bytes(2, 32), random_bytes(2, 32, seed=2))
    losses = [model(*batch, key=k)[1].item() for k in (None, None, *map(mx.random.key, (1, 1, 2)))]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len(set(losses)) == 3


def test_generate_follows_its_key_and_its_limits():
    model, prompt = random_model(), random_bytes(2, 5)
    first, again, other = (model.generate(prompt, 8, key=mx.random.key(k)) for k in (1, 1, 2))
    assert first.shape == (2, 13) and first[:, :5].tolist() == prompt.tolist()
    assert first.tolist() == again.tolist() != other.tolist()
    greedy = model.generate(prompt, 8, temperature=0)
    assert model.generate(prompt, 8, top_k=1).tolist() == greedy.tolist()
    for bad in ({"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            model.generate(prompt, 1, **bad)
    with pytest.raises(UserError, match="T at least 1"):
        model.generate(mx.zeros((1, 0), mx.int32), 1)


def test_a_saved_model_loads_with_the_same_logits(tmp_path):
    model, idx = random_model(), random_bytes(1, 20)
    bdh_mlx.save_model(model, tmp_path / "model.safetensors")
    loaded = bdh_mlx.load_model(tmp_path)
    assert loaded.config == model.config
    assert max_abs_error(loaded(idx)[0], model(idx)[0]) == 0


def test_files_that_hold_no_bdh_are_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    bdh_mlx.save_model(random_model(), file)
    arrays = mx.load(str(file))
    mx.eval(arrays)
    for broken, complaint in (
        ({k: v for k, v in arrays.items() if k != "decoder"}, "decoder"),
        (arrays | {"lm_gate": mx.zeros(1)}, "lm_gate"),
        (arrays | {"lm_head": mx.zeros((3, 3))}, "lm_head"),
        ({"other": mx.zeros(1)}, "no BDH"),
    ):
        mx.save_safetensors(str(file), broken)
        with pytest.raises(UserError, match=complaint):
            bdh_mlx.load_model(file)
    file.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        bdh_mlx.load_model(file)
    with pytest.raises(UserError, match="does not exist"):
        bdh_mlx.load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0),
        ("n_embd", -4),
        ("n_head", 3),
        ("n_head", 2.0),
        ("mlp_internal_dim_multiplier", 0),
        ("vocab_size", "256"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", "0.1"),
        ("dropout", math.nan),
        ("dropout_v", None),
        ("n_layer", True),
        ("n_embd", 4.0),
        ("n_layer", 1001),
        ("n_embd", 65537),
        ("n_head", 65537),
        ("vocab_size", 65537),
        ("mlp_internal_dim_multiplier", 10**30),
    ],
)
def test_a_wrong_configuration_names_its_field(field, value):
    with pytest.raises(UserError, match=f"^{field} is"):
        BDHConfig(**{field: value})


def test_more_neurons_than_an_array_has_places_are_refused():
    with pytest.raises(UserError, match="2,147,483,648; it must be below 2"):
        BDHConfig(n_embd=2**16, mlp_internal_dim_multiplier=2**15)
    assert BDHConfig(n_embd=2**16, mlp_internal_dim_multiplier=2**14).n_embd == 2**16


def test_an_unknown_field_is_named_with_the_one_that_is_meant():
    with pytest.raises(UserError) as error:
        BDHConfig(n_embd=64, layers=2)
    assert str(error.value) == "layers is not a field of BDHConfig; did you mean n_layer?"
    assert copy.copy(replace(BDHConfig(), n_layer=2)) == BDHConfig(n_layer=2)


def test_every_field_of_a_configuration_is_saved_and_loaded(tmp_path):
    """Also one that is added later: no array shows it, so that the header must."""
    other = {f.name: f.default * 2 if f.type is int else 0.25 for f in fields(BDHConfig)}
    config = BDHConfig(**other | {"n_embd": 16, "mlp_internal_dim_multiplier": 8})
    assert all(getattr(config, f.name) != f.default for f in fields(BDHConfig))
    bdh_mlx.save_model(BDH(config), tmp_path / "m.safetensors")
    assert bdh_mlx.load_model(tmp_path / "m.safetensors").config == config


@pytest.mark.parametrize("name", ["m", "absent/m.safetensors", "folder.safetensors", "\udcff"])
def test_a_model_that_cannot_be_saved_is_one_line_and_leaves_nothing(name, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"name a .safetensors|cannot be written|not UTF-8"):
        bdh_mlx.save_model(random_model(), f"{tmp_path}/{name}")
    assert [f.name for f in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_model_half_written_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    bdh_mlx.save_model(random_model(), file)
    before = file.read_bytes()

    def full(path, *_, **__):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(UserError, match=r"m.safetensors cannot be written: .*disk full"):
        bdh_mlx.save_model(random_model(seed=1), file)
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]


def header(about):
    text = json.dumps(about).encode() if isinstance(about, dict) else about
    return len(text).to_bytes(8, "little") + text


BYTE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not a .safetensors file"),
        (b"# A text\n" * 20, "not a .safetensors file"),
        (json.dumps({"checkpoint": "x"}).encode(), "not a .safetensors file"),
        (header({"a": BYTE})[:-1], "not a .safetensors file"),
        (header({"a": BYTE}), "cannot be read"),
        (header(b"{" * 20000), "cannot be read"),
        (header(b'{"a": \xff}'), "cannot be read"),
        (header({"a": []}), "cannot be read"),
        (header({"a": BYTE | {"shape": [-1]}}) + bytes(4), "cannot be read|no BDH"),
        (header({"embed.weight": BYTE | {"shape": []}}) + bytes(4), "holds no BDH"),
        (header({"a": BYTE | {"dtype": "NONE"}}) + bytes(4), "cannot be read"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(content, complaint, tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        bdh_mlx.load_model(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("scalar", ["embed.weight", "encoder"])
def test_an_array_of_no_dimension_is_no_model(scalar, tmp_path):
    file = tmp_path / "m.safetensors"
    arrays = dict(tree_flatten(random_model().parameters())) | {scalar: mx.array(1.0)}
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(UserError, match="holds no BDH"):
        bdh_mlx.load_model(file)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ({"n_layer": "1001"}, "n_layer is 1001"),
        ({"n_layer": "two"}, "in its header are not JSON"),
        ({"dropout": "NaN"}, "dropout is nan"),
        ({"n_layer": "[" * 10**5}, "in its header are not JSON"),
    ],
)
def test_a_header_with_an_impossible_setting_names_the_file(header, fault, tmp_path):
    file = tmp_path / "m.safetensors"
    arrays = dict(tree_flatten(random_model().parameters()))
    mx.save_safetensors(str(file), arrays, metadata=header)
    with pytest.raises(UserError, match=rf"m.safetensors: .*{fault}"):
        bdh_mlx.load_model(file)


def test_generate_writes_the_bytes_of_the_fast_writer():
    model, idx = random_model(scale=1), np.array(random_bytes(3, 20))
    begun = decoding.read_prompt(model, idx)
    greedy = decoding.Decoding(model, Sampling(temperature=0), mx.random.key(0))
    written = decoding.stream(greedy, *begun, idx)
    fast = np.array([token for token, _ in islice(written, 80)]).T
    plain = model.generate(idx, 80, temperature=0)  # NumPy's array, or MLX's
    assert plain.tolist() == np.concatenate([idx, fast], 1).tolist()


def test_generate_draws_among_the_likeliest_by_their_probability():
    model = random_model(scale=1)
    idx = random_bytes(1, 20)
    n = 4000
    logits = model.read(idx)[0][0, -1] / 2
    p = np.array(mx.softmax(mx.where(logits < mx.topk(logits, 5).min(), -mx.inf, logits)))
    drawn = model.generate(mx.repeat(idx, n, 0), 1, 2.0, 5, mx.random.key(0))[:, -1]
    share = np.bincount(np.array(drawn), minlength=256) / n
    assert set(share.nonzero()[0]) == set(p.nonzero()[0])
    assert np.abs(share - p).max() < 4 * math.sqrt(0.25 / n)  # four standard deviations


PROMPTS = [
    ([[1, 2]], "of type list"),
    (b"ab", "of type bytes"),
    (mx.array([1, 2]), r"shape \(2,\); it must be \(B, T\)"),
    (mx.zeros((1, 0), mx.int32), r"shape \(1, 0\)"),
    (mx.zeros((0, 2), mx.int32), r"shape \(0, 2\)"),
    (mx.array([[1.0, 2.0]]), "float32; it must be whole numbers"),
    (mx.array([[True]]), "bool; it must be whole numbers"),
    (np.array([["a"]]), "it must be whole numbers"),
    (np.array([[1.5]]), "it must be whole numbers"),
    (mx.array([[5, 256]]), "holds 256; it must be from 0 to 255"),
    (mx.array([[-1, 5]]), "holds -1"),
]


@pytest.mark.parametrize(("prompt", "complaint"), PROMPTS)
@pytest.mark.parametrize("how", ["read", "prefill", "generate"])
def test_a_prompt_that_no_model_can_read_is_refused(how, prompt, complaint):
    model = random_model()
    calls = {
        "read": model.read,
        "prefill": lambda idx: prefill(model, idx),
        "generate": lambda idx: model.generate(idx, 1),
    }
    with pytest.raises(UserError, match=complaint):
        calls[how](prompt)


@pytest.mark.parametrize("shape", [(2,), (1, 0), (0, 2), (1, 2, 3)])
def test_a_model_says_which_shape_it_takes(shape):
    with pytest.raises(UserError, match=r"it must be \(B, T\)"):
        random_model()(mx.zeros(shape, mx.int32))


@pytest.mark.parametrize("count", [-1, 1.5, "8", True])
def test_a_number_of_bytes_to_write_that_is_none_is_refused(count):
    with pytest.raises(UserError, match="max_new_tokens is"):
        random_model().generate(random_bytes(1, 3), count)


def test_an_odd_number_of_neurons_per_head_is_refused():
    with pytest.raises(UserError, match="N must be even"):
        BDHConfig(n_embd=6, n_head=2, mlp_internal_dim_multiplier=1)


# --------------------------------------------------------------------------------- order of imports


FIRST = ["bdh_mlx", "train_mlx", "generate", "bdh_lib.training.report", "bdh_lib.compute.state"]


@pytest.mark.parametrize("first", FIRST)
def test_what_a_program_begins_with_loads_the_fast_blas_before_mlx(first):
    code = "m = list(sys.modules); print(m.index('bdh_lib.compute.blas') < m.index('mlx.core'))"
    assert python(f"import sys, {first}; {code}") == "True\n"


@pytest.mark.skipif(not blas.is_wanted(), reason="a Mac and CUDA need no BLAS")
def test_mlx_imported_before_the_model_is_a_warning():
    code = "import sys; sys.stderr = sys.stdout; import mlx.core; import bdh_mlx"
    assert python(code) == "warning: slow matrix products; import bdh_mlx before mlx.core\n"


def test_data_and_flags_need_no_mlx():
    modules = "sys, bdh_lib.data.split, bdh_lib.script.flags"
    assert python(f"import {modules}; print('mlx.core' in sys.modules)") == "False\n"


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
