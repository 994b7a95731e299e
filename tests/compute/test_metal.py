"""Every operation that a Mac's GPU is asked for, its dtype and its size, against what Metal has.

The graphs are traced on this machine as a GPU would get them; nothing is computed and no test here
has run on a Mac. Some parts stand in, since they cannot be exported or are decomposed on a CPU:
`depends` is the identity, the two functions of `custom_function` are called one after the other,
and RoPE, whose kernels `make mac-audit` looks for, is erf. LayerNorm appears in its parts.
"""

import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import bdh_mlx
import train_mlx
from bdh_lib.compute import device, layer, memory, rope, state, step_cuda
from bdh_lib.generation.sampling import Sampling
from bdh_lib.training.step import compile_steps
from bdh_lib.training.train_state import init_train_state

# Each has an eval_gpu in mlx/backend/metal or mlx/backend/gpu of MLX 0.32 (commit 846d176). Look
# there before you add one. Inverse, Cholesky, SVD, QRF, LUF, Eig and Eigh have none.
METAL = """
Add AddMM Arange ArgReduce ArgSort AsType BitwiseBinary Broadcast Concatenate Cos Divide Equal Erf
ErfInv ExpandDims Flatten Floor Full Gather GatherAxis Greater GreaterEqual Less LessEqual LogSumExp
LogicalNot LogicalOr Matmul Maximum Minimum Multiply Negative NotEqual Power RandomBits Reduce
Remainder Reshape Scan Scatter ScatterAxis Select Sign Sin Slice Softmax Split Sqrt Square Squeeze
Subtract Transpose Unflatten View
"""
DTYPES = {mx.bfloat16, mx.float32, mx.bool_, mx.int32, mx.uint32, mx.uint8}
EIGHT_BYTES = {"Add", "Select"}  # of the optimizer's step, uint64; Metal scatters none


class CustomFunction:
    """The stand-in for mx.custom_function keeps both passes."""

    def __init__(self, forward):
        self.forward, CustomFunction.last = forward, self

    def __call__(self, *inputs):
        return self.forward(*inputs)

    def vjp(self, backward):
        self.backward = backward


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (device, rope, layer, memory, state, step_cuda):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    mac = {"max_recommended_working_set_size": 3 * 2**34}  # 48 of 64 GB: the largest pieces
    monkeypatch.setattr(mx, "device_info", lambda: mac)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "custom_function", CustomFunction)
    monkeypatch.setattr(mx, "depends", lambda arrays, on: arrays)
    monkeypatch.setattr(mx, "eval", lambda *arrays: None)
    monkeypatch.setattr(mx.fast, "rope", lambda x, dims, **options: mx.erf(x))
    mx.disable_compile()
    yield
    mx.enable_compile()


def check(function, *inputs):
    """Assert that Metal has what the graph of a function asks for; return how many operations."""
    entries = []
    mx.export_function(entries.append, function, *inputs)
    operations = [entry for entry in entries if entry["type"] == "primitive"]
    for operation in operations:
        name = operation["name"]
        assert name in METAL.split(), (
            f"{name}: does it have an eval_gpu in MLX's backend for Metal?"
        )
        for _, shape, dtype in operation["outputs"]:
            assert dtype in DTYPES or (dtype == mx.uint64 and name in EIGHT_BYTES), (name, dtype)
            assert math.prod(shape) * dtype.size <= memory.MAX_ARRAY_BYTES, (name, shape, dtype)
    return len(operations)


CONFIG = bdh_mlx.BDHConfig()
D, H, N = CONFIG.n_embd, CONFIG.n_head, CONFIG.neurons_per_head


@pytest.mark.parametrize(("B", "T"), [(2, 4096), (1, 65_536)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", memory.MODES)
def test_a_layer_forward_and_backward(mode, dtype, B, T):
    compute = memory.compute_for(CONFIG, mode, dtype)

    def both(v, Dx, Dy, E, key, cotangent):
        weights = Dx, Dy, E
        layer.layer(v, weights, compute, key, 0.1, 0.1)
        function = CustomFunction.last
        outputs = function.forward(v, *weights)
        return outputs[0], *function.backward((v, *weights), [cotangent], outputs)

    shapes = (B, T, D), (H, D, N), (H, D, N), (H, N, D)
    assert check(both, *map(mx.zeros, shapes), mx.random.key(1), mx.zeros((B, T, D))) > 300


def test_what_is_around_the_layers_of_a_training_step_and_the_update(monkeypatch):
    def a_layer(v, weights, *_):
        return v * sum(w.sum() for w in weights)

    monkeypatch.setattr(bdh_mlx, "layer", a_layer)
    flags = "--ema-decay 0.99 --dropout-v 0.1 --byte-noise 0.1"
    s = train_mlx.read_settings(flags.split())
    compute = memory.compute_for(CONFIG, "fast", "auto")
    trained = init_train_state(s, compute)
    micro_step, apply_update = compile_steps(trained, s)

    def update(idx, weights, key):
        norm = apply_update(*micro_step(idx, idx, weights, key))
        return norm, *(array for _, array in tree_flatten(trained.trees()))

    idx, weights = mx.zeros((2, 4096), mx.int32), mx.zeros((2, 4096))
    assert check(update, idx, weights, mx.random.key(1)) > 400


def test_reading_a_prompt_and_writing_bytes():
    model = bdh_mlx.BDH(CONFIG)
    model.compute = memory.compute_for(CONFIG, "fast", "auto")

    def read(prompt, byte):
        first, after = state.read_unchecked(model, prompt)
        logits = [first, state.read_unchecked(model, prompt, after)[0]]  # on from a state
        for _ in range(25):  # until the buffer is added to the synapses
            out, after = state.read_unchecked(model, byte, after)
            logits.append(out)
        return *logits, *after.synapses

    prompt, byte = mx.zeros((1, 32768), mx.int32), mx.zeros((1, 1), mx.int32)
    state.read_unchecked(model, byte)  # lays out the weights, by a copy that cannot be exported
    mx.async_eval(model.decode_step.weights)
    assert check(read, prompt, byte) > 10_000


FILTERS = {"utf8": True, "repetition_penalty": 1.2, "top_k": 5, "top_p": 0.9, "min_p": 0.1}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, FILTERS])
def test_drawing_a_byte(settings):
    logits, recent, u = mx.zeros((3, 256)), mx.zeros((3, 256), mx.int32), mx.zeros((3, 1))
    assert check(Sampling(**settings).draw, logits, recent, u) > 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: mx.linalg.inv(x, stream=mx.cpu),  # no eval_gpu
        mx.fft.fft,  # complex
        lambda x: x.astype(mx.float64),
        lambda x: mx.zeros((4, 4), mx.uint64).at[0].add(1),  # scatters 8 bytes
        lambda x: x + mx.zeros((2**16, 2**14 + 1, 1, 1)),  # larger than a buffer of Metal may be
    ],
)
def test_what_metal_lacks_is_seen(function):
    with pytest.raises(AssertionError):
        check(function, mx.zeros((4, 4)))
