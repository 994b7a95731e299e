"""The model is the official BDH: its numbers, its parameters, and one function in three forms."""

import math
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

import bdh_mlx
from bdh_mlx import BDH, BDHConfig, UserError

GOLDEN = Path(__file__).parent / "golden_bdh.safetensors"  # computed with the official PyTorch code
SMALL = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)


@pytest.fixture(scope="module")
def golden():
    return mx.load(str(GOLDEN))


@pytest.fixture
def official(golden, tmp_path):
    """The golden weights as PyTorch would save them: a buffer, and the prefix of torch.compile."""
    _, header = mx.load(str(GOLDEN), return_metadata=True)
    arrays = {f"_orig_mod.{k[6:]}": v for k, v in golden.items() if k.startswith("param.")}
    arrays["_orig_mod.attn.freqs"] = mx.zeros((1, 1, 1, 128))
    mx.save_safetensors(str(tmp_path / "official.safetensors"), arrays, metadata=header)
    return bdh_mlx.load_model(tmp_path / "official.safetensors")


def random_model(config=SMALL, seed=0, scale=10):
    """Weights larger than at initialisation, so that logits are far from uniform."""
    mx.random.seed(seed)
    model = BDH(config)
    model.update({k: v * scale for k, v in model.parameters().items() if isinstance(v, mx.array)})
    return model


def random_bytes(B, T, seed=1):
    return mx.random.randint(0, 256, (B, T), key=mx.random.key(seed))


def furthest(a, b):
    return mx.max(mx.abs(a - b)).item()


def test_logits_and_loss_equal_the_official_ones(golden, official):
    logits, loss = official(golden["idx"][0], golden["targets"][0])
    assert furthest(logits, golden["logits"]) < 1e-4
    assert abs(loss.item() - golden["loss"].item()) < 1e-5


def test_every_gradient_equals_the_official_one(golden, official):
    gradient = nn.value_and_grad(official, lambda *batch: official(*batch)[1])
    _, gradients = gradient(golden["idx"][0], golden["targets"][0])
    for name, g in tree_flatten(gradients):
        scale = mx.max(mx.abs(golden[f"grad.{name}"])).item()
        assert furthest(g, golden[f"grad.{name}"]) < 1e-5 * scale, name


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
    loss = BDH(SMALL)(random_bytes(4, 64), random_bytes(4, 64, seed=2))[1]
    assert abs(loss.item() - math.log(256)) < 0.1


def test_a_byte_changes_no_logits_before_it():
    model, idx = random_model(), random_bytes(1, 50)
    before = model(idx)[0]
    for t in (0, 20, 49):
        changed = mx.array(idx)
        changed[0, t] = (idx[0, t] + 1) % 256
        after = model(changed)[0]
        assert furthest(before[:, :t], after[:, :t]) == 0 if t else True
        assert furthest(before[:, t], after[:, t]) > 1e-3


def test_dropout_acts_only_with_a_key_and_depends_on_it():
    model, batch = random_model(), (random_bytes(2, 32), random_bytes(2, 32, seed=2))
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
    assert furthest(loaded(idx)[0], model(idx)[0]) == 0


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
    ],
)
def test_a_wrong_configuration_names_its_field(field, value):
    with pytest.raises(UserError, match=f"^{field} is"):
        BDHConfig(**{field: value})


def test_an_odd_number_of_neurons_per_head_is_refused():
    with pytest.raises(UserError, match="N must be even"):
        BDHConfig(n_embd=6, n_head=2, mlp_internal_dim_multiplier=1)


# --------------------------------------------------------------------------------- order of imports


@pytest.mark.parametrize("first", ["bdh_mlx", "train_mlx", "generate", "report"])
def test_what_a_program_begins_with_loads_the_fast_blas_before_mlx(first):
    tell = "m = list(sys.modules); print(m.index('fast_blas') < m.index('mlx.core'))"
    assert python(f"import sys, {first}; {tell}") == "True\n"


def test_data_and_flags_need_no_mlx():
    assert python("import sys, data, flags; print('mlx.core' in sys.modules)") == "False\n"


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
