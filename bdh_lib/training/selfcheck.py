"""`python train_mlx.py --selfcheck` tests model and trainer on this machine and backend.

It prints a table with a line for each check, and its exit code is 1 if one failed, else 0.

Errors are relative to the largest number compared. Tolerances allow for another order of
summation. Two checks take training's shapes and precision, because kernels have been wrong for
large shapes alone. On CUDA, products of float32 have all their bits here; training leaves TF32 to
MLX.
"""

import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

import bdh_mlx
from bdh_lib.compute import elementwise, elementwise_cuda, memory
from bdh_lib.errors import escape_controls
from bdh_lib.progress import heartbeat
from bdh_lib.settings import Settings
from bdh_lib.training import checkpoints
from bdh_lib.training.step import compile_steps
from bdh_lib.training.train_state import TrainState

CONFIG = bdh_mlx.BDHConfig(n_layer=3, n_embd=32, n_head=2, mlp_internal_dim_multiplier=16)
B, T, SEED = 2, 96, 1
UPDATES = Settings(BYTE_NOISE=0, GRAD_CLIP=1.0, EMA_DECAY=0)
RATE = 0.3  # of dropout
PARAMETERS = {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head"}
CPU_TOLERANCE, GPU_TOLERANCE = 1e-4, 2e-2  # relative
LAYER = replace(bdh_mlx.BDHConfig(), n_layer=1)  # a layer of the default shape
LAYER_BYTES, MAX_ROWS = 1024, 8192  # MAX_ROWS: the bytes of a batch of the 64 GB presets
ROWS_APART = 31  # prime: each tile of a kernel has such a row, at any place in it
PRODUCT_ROUNDING = {mx.float32: 1e-4, mx.bfloat16: 2e-2}  # of GEMMs, relative
# of a gradient's norm; on a CPU 2e-4 and 4.7e-2, as neurons near 0 fire in one precision alone
LAYER_ROUNDING = {mx.float32: 2e-3, mx.bfloat16: 1e-1}
WAY_ON = (
    "what to do: train and generate with --dtype float32, or update macOS (with CUDA the driver), "
    "and check again"
)


class Skipped(Exception):
    """A check that this machine cannot make."""


def random_model() -> bdh_mlx.BDH:
    """Return a model whose weights are larger than at first, so that its logits differ."""
    mx.random.seed(SEED)
    model = bdh_mlx.BDH(CONFIG)
    model.update({k: 8 * v for k, v in model.parameters().items() if isinstance(v, mx.array)})
    return model


def random_batch(step: int, B: int = B, T: int = T) -> tuple[mx.array, mx.array]:
    """Return the bytes and the ones that follow them, (B, T) each."""
    block = np.random.default_rng([SEED, step]).integers(0, 256, (B, T + 1), dtype=np.int32)
    return mx.array(block[:, :-1]), mx.array(block[:, 1:])


def relative_error(one: mx.array, other: mx.array) -> float:
    """Return the largest difference relative to the largest number of `one`."""
    return (mx.max(mx.abs(one - other)) / mx.max(mx.abs(one))).item()


def norm_error(one: mx.array, other: mx.array) -> float:
    """Return the norm of the difference relative to the norm of `one`."""
    return (mx.linalg.norm(one - other) / mx.linalg.norm(one)).item()


def tolerance() -> float:
    """Return the relative error that float32 sums of the default device may have."""
    return GPU_TOLERANCE if memory.on_gpu() else CPU_TOLERANCE


# -------------------- the checks: each takes DTYPE and returns the measured error and its tolerance


def check_arrays(_) -> tuple[float, float]:
    """Count the parameters that a BDH lacks or has too many."""
    names = {name for name, _ in tree_flatten(bdh_mlx.BDH(CONFIG).trainable_parameters())}
    return len(names ^ PARAMETERS), 0


def nan_max(differences) -> float:
    """Return the largest number, or NaN if there is one; Python's max would drop it."""
    return float(np.max([*differences]))


def check_definition(_) -> tuple[float, float]:
    """Compare loss and gradients, computed in chunks of several lengths, with the definition's."""
    model = random_model()
    batch = random_batch(0)
    losses = []
    for chunk in (None, 7, 32, T):
        model.compute = replace(model.compute, chunk=chunk or T)
        call = model if chunk else model.quadratic
        gradient = nn.value_and_grad(model, lambda *a, call=call: call(*a)[1])
        losses.append([array for _, array in tree_flatten(gradient(*batch))])
    pairs = (pair for other in losses[1:] for pair in zip(losses[0], other, strict=True))
    return nan_max(relative_error(a, b) for a, b in pairs), tolerance()


def check_byte_by_byte(_) -> tuple[float, float]:
    """Compare the logits of a text that is read byte by byte with those of the whole text."""
    model, (idx, _) = random_model(), random_batch(0)
    state = None
    logits = []
    for t in range(T):
        out, state = model.read(idx[:, t : t + 1], state)
        mx.eval(out)
        logits.append(out)
    return relative_error(model(idx)[0], mx.concatenate(logits, 1)), tolerance()


def check_save_and_load(_) -> tuple[float, float]:
    """Compare the losses of a model and of its copy that was saved and loaded."""
    model = random_model()
    batch = random_batch(0)
    with tempfile.TemporaryDirectory() as folder:
        bdh_mlx.save_model(model, Path(folder) / "model.safetensors")
        loaded = bdh_mlx.load_model(Path(folder) / "model.safetensors")
    return abs(model(*batch)[1].item() - loaded(*batch)[1].item()), 0


def check_resume(_) -> tuple[float, float]:
    """Compare the parameters after six steps with those of a run resumed after three.

    They are equal on a CPU. A GPU adds up the gradient of the embedding in no fixed order, and Adam
    amplifies the difference.
    """
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        straight = train_and_save(Path(one), 0, 6)
        train_and_save(Path(other), 0, 3)
        again = train_and_save(Path(other), 3, 6)
    pairs = zip(tree_flatten(straight), tree_flatten(again), strict=True)
    error = nan_max(relative_error(a, b) for (_, a), (_, b) in pairs)
    return error, GPU_TOLERANCE if memory.on_gpu() else 0


def train_and_save(run: Path, first: int, last: int) -> dict:
    """Train from checkpoint `first` to `last` and save one; return the parameters.

    `first` 0 starts a new model.
    """
    mx.random.seed(SEED)
    state = TrainState(bdh_mlx.BDH(CONFIG), optim.AdamW(1e-3, bias_correction=True), {})
    state.optimizer.init(state.model.trainable_parameters())
    if first:
        checkpoints.load(run, first, state)
    micro_step, apply_update = compile_steps(state, UPDATES)
    for step in range(first, last):
        batch = random_batch(step)
        weights = mx.full((B, T), 1 / (B * T))
        mx.eval(apply_update(*micro_step(*batch, weights, mx.random.key(step))), state.trees())
    checkpoints.save(run, last, state, {})
    return state.model.parameters()


def devices() -> tuple[mx.DeviceType, mx.DeviceType] | None:
    """Return the GPU and the CPU, or None if there is no GPU."""
    return (mx.gpu, mx.cpu) if memory.on_gpu() else None


def check_gpu(_) -> tuple[float, float]:
    """Compare loss and gradients on both; with dropout except on CUDA, which draws other masks."""
    if not (both := devices()):
        raise Skipped("no GPU that MLX uses")
    before = mx.default_device()
    results = []
    key = None if elementwise_cuda.is_available() else mx.random.key(SEED)
    try:
        for device in both:
            mx.set_default_device(device)
            model, batch = random_model(), random_batch(0)
            gradient = nn.value_and_grad(model, lambda *a, model=model: model(*a)[1])
            results.append(tree_flatten(gradient(*batch, key)))
            mx.eval(results)
    finally:
        mx.set_default_device(before)
    error = nan_max(relative_error(b, a) for (_, a), (_, b) in zip(*results, strict=True))
    return error, GPU_TOLERANCE


def plain_mask(mask: elementwise.Mask, shape: tuple[int, ...]) -> elementwise.Mask:
    """Return a mask of elementwise_cuda in the form that elementwise.py takes."""
    ones = mx.ones(shape)
    y, _ = elementwise_cuda.gate(ones, ones, mask)
    return y > 0, True, 1 / (1 - mask[1] / elementwise_cuda.STEPS)


def run_elementwise(
    module: ModuleType,
    mask: elementwise.Mask | None,
    position: int,
    B: int,
    arrays: Sequence[mx.array],
) -> tuple[mx.array, ...]:
    """Return q, y, dg and dh by elementwise or elementwise_cuda; `arrays` are h, g, dy and dq.

    All are (H, B*T, N).
    """
    h, g, dy, dq = arrays
    x, q = module.encode(h, position, B)
    _, gated = module.gate(x, g, mask)
    y, dg, residuals = module.gate_gradients(x, gated, dy, mask)
    return q, y, dg, module.encode_gradient(residuals, dq, position, B)


def check_fused_kernels(dtype: str) -> tuple[float, float]:
    """Compare relu, rotation, gate, dropout and their gradients in CUDA kernels with plain MLX."""
    if not elementwise_cuda.is_available():
        raise Skipped("no CUDA GPU")
    dtype = memory.compute_for(LAYER, "fast", dtype).dtype
    shape = LAYER.n_head, B * T, LAYER.neurons_per_head
    arrays = [mx.random.normal(shape, dtype, key=mx.random.key(i)) for i in range(4)]
    mask = elementwise_cuda.dropout_mask(mx.random.key(SEED), RATE, shape)
    kernels = run_elementwise(elementwise_cuda, mask, T, B, arrays)
    exact = [array.astype(mx.float32) for array in arrays]
    exact = run_elementwise(elementwise, plain_mask(mask, shape), T, B, exact)
    return nan_max(map(relative_error, exact, kernels)), PRODUCT_ROUNDING[dtype]


def check_products(dtype: str) -> tuple[float, float]:
    """Compare the products of a segment, in training's shapes and precision, with exact ones."""
    compute = memory.compute_for(LAYER, "fast", dtype)
    H, D, N = LAYER.n_head, LAYER.n_embd, LAYER.neurons_per_head
    rows = min(compute.segment_rows, MAX_ROWS)
    shapes = [(1, rows, D), (H, D, N), (H, rows, N), (H, N, D)]
    v, Dx, y, E = (
        mx.random.normal(shape, compute.dtype, key=mx.random.key(i))
        for i, shape in enumerate(shapes)
    )
    pairs = [(v, Dx), (y, E), (v.swapaxes(1, 2), y), (v, E.swapaxes(1, 2))]
    return nan_max(product_error(*pair) for pair in pairs), PRODUCT_ROUNDING[compute.dtype]


def product_error(left: mx.array, right: mx.array) -> float:
    """Compare a product, (1 or H, rows, K) by (H, K, columns), with NumPy's in float64.

    Every ROWS_APART-th row is compared.
    """
    product = np.array(mx.matmul(left, right)[:, ::ROWS_APART].astype(mx.float32))
    left = left[:, ::ROWS_APART].astype(mx.float32)
    errors = []
    for head, result in enumerate(product):
        factors = (left[head % len(left)], right[head].astype(mx.float32))
        exact = np.matmul(*(np.array(factor).astype(np.float64) for factor in factors))
        errors.append(np.max(np.abs(result - exact)) / np.max(np.abs(exact)))
    return nan_max(errors)


def check_layer(dtype: str) -> tuple[float, float]:
    """Compare loss and gradients of a layer in training's precision with the definition's.

    The definition is computed in float32, on a Mac by the CPU. On CUDA the GPU computes it, since
    the CPU's library there is slow.
    """
    mx.random.seed(SEED)
    model, batch = bdh_mlx.BDH(LAYER), random_batch(0, 1, LAYER_BYTES)
    model.compute = memory.compute_for(LAYER, "fast", dtype)
    mx.eval(model.parameters())
    results = []
    for call, device in ((model, None), (model.quadratic, mx.metal.is_available() and mx.cpu)):
        with mx.stream(device or mx.default_device()):
            gradient = nn.value_and_grad(model, lambda *a, call=call: call(*a)[1])
            results.append([array for _, array in tree_flatten(gradient(*batch))])
            mx.eval(results)
    errors = (norm_error(exact, array) for array, exact in zip(*results, strict=True))
    return nan_max(errors), LAYER_ROUNDING[model.compute.dtype]


AS_TRAINED = {
    "products as trained = exact ones": check_products,
    "layer as trained = the definition": check_layer,
}
CHECKS = {
    "exactly five trainable arrays": check_arrays,
    "in chunks = the definition": check_definition,
    "read byte by byte = at once": check_byte_by_byte,
    "saved and loaded: the same loss": check_save_and_load,
    "stopped and resumed = straight": check_resume,
    "GPU = CPU": check_gpu,
    "fused kernels = plain operations": check_fused_kernels,
} | AS_TRAINED


def run_checks(dtype: str = "auto") -> int:
    """Run the checks for this DTYPE and print their table; return 1 if one failed, else 0."""
    os.environ["MLX_ENABLE_TF32"] = "0"  # CUDA: products of all bits; read at the first product
    print(f"{mx.default_device()}, " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if sys.platform == "darwin":
        print(about_mac(platform.mac_ver()[0], mx.device_info(mx.gpu).get("device_name", "no GPU")))
    failed = []
    start = time.perf_counter()
    for name, check in CHECKS.items():
        try:
            with heartbeat(name):
                measured, allowed = check(dtype)
            good = measured <= allowed
            result = f"{'ok' if good else 'FAILED':<8}{measured:.1e} (at most {allowed:.0e})"
        except Skipped as reason:
            good, result = True, f"skipped {reason}"
        except Exception as error:  # a check that breaks has failed, whatever the error
            good, result = False, f"FAILED  {type(error).__name__}: {escape_controls(str(error))}"
        failed += [] if good else [name]
        print(f"{name:<34}{result}")
    if memory.on_gpu() and AS_TRAINED.keys() & failed:
        print(WAY_ON)
    verdict = f"{len(failed)} of {len(CHECKS)} FAILED" if failed else "all hold"
    print(f"{verdict}, in {time.perf_counter() - start:.1f} s")
    return int(bool(failed))


def about_mac(release: str, chip: str) -> str:
    """Describe a Mac in words, with a warning where MLX's wheel is built for a newer macOS."""
    about = f"macOS {release}, {chip}"
    if "M5" in chip and re.match(r"(26|16)\.[01]\b", release):  # an older Python sees 16 for 26
        about += "\nwarning: MLX for an M5 is built for macOS 26.2; update macOS, or it may fail"
    return about


def versions() -> dict[str, str]:
    """Return the versions that the table's first line shows."""
    all_versions = checkpoints.versions()
    return {k: all_versions[k] for k in ("mlx", "python", "machine")}
