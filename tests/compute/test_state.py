"""A state is what the bytes read have left: any way to read them, to keep it, to go on is equal."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import GOLDEN, max_abs_error, random_bytes, random_model

import bdh_mlx
from bdh_lib.compute import state, step_cpu, step_cuda, step_mlx
from bdh_lib.compute.state import (
    WINDOW_PARTS,
    State,
    fitting_window,
    flush_buffer,
    prefill,
    rotate_state,
)
from bdh_lib.compute.step_cpu import BUFFER_BYTES
from bdh_lib.generation import decoding, state_files
from bdh_lib.generation.decoding import Decoding, read_prompt, stream
from bdh_lib.generation.sampling import Sampling
from bdh_mlx import BDH, BDHConfig, UserError


@pytest.fixture(params=["numpy", "mlx", "in place"])
def step(request, monkeypatch):
    """The path a CPU takes, and those GPUs take, here on a CPU, where compiling them is slow."""
    if mx.default_device() == mx.gpu:
        return  # its own
    monkeypatch.setattr(mx, "compile", lambda step: step)
    monkeypatch.setattr(state, "on_gpu", lambda: request.param != "numpy")
    if request.param == "in place":
        late = Late()
        evaluate = mx.eval
        monkeypatch.setattr(step_cuda, "supports", lambda model: True)
        monkeypatch.setattr(step_cuda, "step", late.step)
        monkeypatch.setattr(mx, "eval", lambda *a: (evaluate(*a), [late.arrive(v) for v in a]))


class Late:
    """As with CUDA's kernels, arrays that states share change, but only once v is waited for."""

    def __init__(self):
        self.pending = {}

    def step(self, idx, weights, count, arrays):
        keys, values, begin, base_synapses, _, before = arrays
        self.arrive(before)
        embed, encoder, encoder_v, decoder, turns = weights
        transposed = (w.swapaxes(-1, -2) for w in (encoder, encoder_v, decoder))
        weights = embed, *transposed, turns
        (H, B, pairs, K, _), S = keys[0].shape, [S for S, _ in base_synapses]
        rows = [k.swapaxes(2, 3).reshape(H, B, K, 2 * pairs) for k in keys]
        v, *after = step_mlx.step(idx, weights, count, (rows, values, begin, S))
        mx.eval(v, after)
        self.pending[id(v)] = v, count.item(), keys, values, *after
        return v

    def arrive(self, v):
        _, n, keys, values, keys_after, values_after = self.pending.pop(id(v), [v, 0, *[()] * 4])
        for array, after in zip(keys, keys_after, strict=True):
            np.array(array, copy=False)[..., n, :] = np.array(after[..., n, :]).reshape(
                *array.shape[:3], 2
            )
        for array, after in zip(values, values_after, strict=True):
            np.array(array, copy=False)[:, n] = np.array(after[:, n])


def close(a, b):
    return max_abs_error(a, b) < 2e-5 * mx.max(mx.abs(b)).item()


def read_by(model, idx, cuts, state=None):
    out = []
    for piece in mx.split(idx, cuts, 1):
        logits, state = model.read(piece, state)
        out.append(logits)
    return mx.concatenate(out, 1), state


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "cuts", [[1, 2, 3], [40], list(range(1, 200)), [50, 51, 52, 150], [190, 195]]
)
def test_however_a_text_is_cut_the_logits_are_the_definition_s(step, cuts, sparse, monkeypatch):
    if sparse:
        monkeypatch.setattr(step_cpu, "GATHER", 1)
        monkeypatch.setattr(step_cpu, "GATHER_DY", 1)
    else:
        monkeypatch.setattr(step_cpu, "GATHER", 0)
        monkeypatch.setattr(step_cpu, "GATHER_DY", 0)
    model, idx = random_model(), random_bytes(2, 200)
    assert close(read_by(model, idx, cuts)[0], model.quadratic(idx)[0])


def test_logits_of_every_byte_and_greedy_bytes_equal_recomputation_on_trained_weights(step):
    golden = mx.load(str(GOLDEN))
    _, header = mx.load(str(GOLDEN), return_metadata=True)
    config = {k: int(v) for k, v in header.items() if k in ("n_layer", "n_embd", "n_head")}
    N = golden["trained.encoder"].shape[-1]
    multiplier = config["n_head"] * N // config["n_embd"]
    model = BDH(BDHConfig(**config, mlp_internal_dim_multiplier=multiplier))
    model.load_weights([(k[8:], v) for k, v in golden.items() if k.startswith("trained.")])
    idx = golden["idx"].reshape(1, -1)[:, :512]
    exact = model.quadratic(idx)[0]
    assert max_abs_error(read_by(model, idx, list(range(1, idx.shape[1])))[0], exact) < 2e-5

    out = idx[:, :32]
    for _ in range(40):
        out = mx.concatenate([out, mx.argmax(model.quadratic(out)[0][:, -1:], -1)], 1)
    assert model.generate(idx[:, :32], 40, temperature=0).tolist() == out.tolist()


@pytest.mark.parametrize("cut", [30, 100 + BUFFER_BYTES])
def test_a_kept_state_is_not_changed_by_going_on_from_it(step, cut):
    model, idx = random_model(), random_bytes(1, cut + 80)
    _, state = read_by(model, idx[:, :cut], list(range(cut - 10, cut)))
    first = read_by(model, idx[:, cut:], list(range(1, 80)), state)[0]
    other, again = random_bytes(1, 80, seed=7), list(range(1, 80))
    mx.eval(read_by(model, other, again, state))
    mx.eval(prefill(model, other, state))
    assert close(read_by(model, idx[:, cut:], again, state)[0], first)
    assert close(first, model.quadratic(idx)[0][:, cut:])


@pytest.mark.parametrize("cut", [1, 3])
def test_a_folded_state_is_not_changed_by_going_on_from_what_it_was(step, cut):
    model, idx, other = random_model(), random_bytes(1, 20), random_bytes(1, 20, seed=7)
    _, state = read_by(model, idx[:, :cut], list(range(1, cut)))
    folded = flush_buffer(state)
    mx.eval(read_by(model, other, [1, 2], state)[0])
    assert close(model.read(idx[:, cut:], folded)[0], model.quadratic(idx)[0][:, cut:])


@pytest.mark.parametrize("B", [1, 2])  # one row is written several bytes at once
@pytest.mark.parametrize("window", [None, 8])
def test_a_stream_is_gone_on_from_where_it_stopped(step, B, window, monkeypatch):
    """The state that is given with a byte, when the next ones have been computed already."""
    monkeypatch.setattr(decoding, "on_cuda", lambda: True)
    model, prompt = random_model(), np.array(random_bytes(B, 9))
    begun = read_prompt(model, prompt, State(window=window))
    steps = stream(Decoding(model, Sampling(), mx.random.key(1)), *begun, prompt)
    written = [next(steps) for _ in range(60)]
    drawn = mx.array([tokens for tokens, _ in written]).T
    more = random_bytes(B, 5)
    text = mx.concatenate([mx.array(prompt), drawn], 1)
    for end in range(-5, 0):
        again = prefill(model, text[:, : end + 1 or None], State(window=window))[1]
        wanted = model.read(more, again)[0]
        assert close(model.read(more, written[end][1])[0], wanted)


@pytest.mark.parametrize(("N", "parts"), [(64, 32), (48, 16), (10, 2)])
@pytest.mark.parametrize("rows", [1, 3])  # of the synapses, which a batch may share
def test_synapses_are_read_in_parts_of_the_neurons(N, parts, rows, monkeypatch):
    q = mx.random.normal((2, 3, 1, N), key=mx.random.key(0))
    S = mx.random.normal((2, rows, N, 5), key=mx.random.key(1))
    shapes = []
    product = mx.array.__matmul__
    monkeypatch.setattr(
        mx.array, "__matmul__", lambda a, b: (shapes.append(b.shape), product(a, b))[1]
    )
    read = step_mlx.recall(q, S)
    assert shapes == [(2, rows, parts, N // parts, 5)] and read.shape == (2, 3, 1, 5)
    exact = np.array(q, np.float64) @ np.array(S, np.float64)
    assert np.abs(np.array(read) - exact).max() < 1e-5


def test_the_decoder_of_a_gpu_s_step_has_its_neurons_last():
    model = random_model()
    decoder = step_mlx.DecodeStep(model).weights[3]
    assert decoder.tolist() == model.weights()[2].swapaxes(-1, -2).tolist()


def test_rows_of_a_batch_are_singles_and_share_a_state(step):
    model, prompt, idx = random_model(), random_bytes(1, 70), random_bytes(3, 90)
    _, state = read_by(model, prompt, [60])
    together, after = read_by(model, idx, [50, 51, 52], state)
    for row in range(3):
        alone, _ = read_by(model, idx[row : row + 1], [50, 51, 52], state)
        assert close(together[row], alone[0])
    more = random_bytes(3, 5, seed=3)
    texts = mx.concatenate([mx.repeat(prompt, 3, 0), idx, more], 1)
    assert close(model.read(more, after)[0], model.quadratic(texts)[0][:, -5:])
    with pytest.raises(UserError, match="has 3 rows and cannot read 2"):
        model.read(idx[:2], after)


@pytest.mark.parametrize("window", [4, 5, 9, 100, 129, 400])
@pytest.mark.parametrize("cuts", [[1, 2, 150], list(range(1, 300)), []])
def test_a_window_reads_what_recomputation_over_the_window_reads(step, window, cuts, monkeypatch):
    model, idx = random_model(), random_bytes(2, 300)
    windowed, _ = read_by(model, idx, cuts, State(window=window))
    t = np.arange(300)
    ends = np.arange(301) * window // WINDOW_PARTS
    newest = np.searchsorted(ends, t, "right") - 1  # the last part that is full
    begin = ends[np.maximum(0, newest - (WINDOW_PARTS - 1))]
    seen = mx.array((t < t[:, None]) & (t >= begin[:, None]))
    assert (seen.sum(1) <= window).all() and (seen.sum(1)[window:] >= window * 3 // 4).all()

    def attention(q, v):
        return (q @ q.swapaxes(-1, -2) * seen) @ v

    monkeypatch.setattr(bdh_mlx, "attention_quadratic", attention)
    assert close(windowed, model.quadratic(idx)[0])


@pytest.mark.parametrize(("length", "trained", "window"), [(9, 9, None), (10, 9, 9), (3, 2, 4)])
def test_a_text_past_the_blocks_has_a_window_of_a_byte_for_each_part(length, trained, window):
    assert fitting_window(length, trained) == window


@pytest.mark.parametrize("window", [4, 5, 9, 30])
def test_a_prompt_with_a_window_is_read_from_where_its_end_reaches(step, window):
    model, idx = random_model(), random_bytes(2, 300)
    L = model.config.n_layer
    read_bytes = []
    whole, after = read_by(model, idx, [7, 120], State(window=window))
    _, before = prefill(model, idx[:, :7], State(window=window))
    logits, state = prefill(model, idx[:, 7:], before, read_bytes.append)
    assert close(logits, whole[:, -1]) and sum(read_bytes) == 2 * 293
    assert L * window <= 293 - read_bytes[0] / 2 < (L + 1) * window
    more = random_bytes(2, 40, seed=3)
    assert state.position == 300 and close(model.read(more, state)[0], model.read(more, after)[0])


@pytest.mark.parametrize("window", [None, 64])
def test_a_state_file_goes_on_where_it_was_saved(step, window, tmp_path):
    model = random_model()
    idx = random_bytes(2, 150)
    file = tmp_path / "manual.safetensors"
    model.trained_length = 128
    _, state = read_by(model, idx[:, :100], [97, 98], State(window=window))
    state_files.save_state(file, model, state)
    loaded = state_files.load_state(file, model)
    assert (loaded.position, loaded.window) == (100, window)
    there, here = (
        read_by(model, idx[:, 100:], [1, 2], s)[0] for s in (loaded, flush_buffer(state))
    )
    assert max_abs_error(there, here) == 0
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_state_files_that_are_not_the_model_s_are_refused(tmp_path):
    model = random_model()
    file = tmp_path / "s.safetensors"
    _, state = model.read(random_bytes(1, 20))
    state_files.save_state(file, model, state)
    with pytest.raises(UserError, match="another model"):
        state_files.load_state(file, random_model(seed=1))
    arrays, header = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    for changed in ({"synapses.0": mx.zeros((1, 2))}, {"synapses.1": None}):
        kept = {k: v for k, v in (arrays | changed).items() if v is not None}
        mx.save_safetensors(str(file), kept, metadata=header)
        with pytest.raises(UserError, match="damaged"):
            state_files.load_state(file, model)
    state_files.save_state(file, model, state)
    whole = file.read_bytes()
    position = whole.index(b'"position":"20"') + len('"position":"')
    for flipped, output in (
        (len(whole) - 1, "has changed since it was written"),
        (len(whole) // 2, "has changed since it was written"),
        (position, "has changed since it was written"),  # 30 for 20
        (whole.index(b'"window":"null"') + 10, "not a state file"),
    ):
        changed = bytearray(whole)
        changed[flipped] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=output):
            state_files.load_state(file, model)
    header |= {"position": "20"}
    for name, wrong, output in (
        ("model", "null", "damaged"),
        ("position", "[" * 10**5, "not a state file"),
        ("parts", "1e999", "not a state file"),
        ("window", "true", "not a state file"),
    ):
        mx.save_safetensors(str(file), arrays, metadata=header | {name: wrong})
        with pytest.raises(UserError, match=output):
            state_files.load_state(file, model)
    bdh_mlx.save_model(model, file)
    with pytest.raises(UserError, match="not a state file"):
        state_files.load_state(file, model)
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        state_files.load_state(file, model)
    with pytest.raises(UserError, match="not saved"):
        state_files.save_state(tmp_path / "absent" / "s.safetensors", model, state)


@pytest.mark.parametrize("window", [-1, 0, 2, 1.5, "8", True, 2**41])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(UserError, match=r"^window is .*from 4 to 1,099,511,627,776"):
        prefill(random_model(), random_bytes(1, 20), State(window=window))


@pytest.mark.parametrize("length", [3, 40])  # read by bytes, with a buffer; read at once, without
def test_a_state_of_a_model_of_another_shape_is_refused(length, tmp_path):
    small, other = random_model(), bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0, 1, 4))
    _, state = prefill(other, random_bytes(1, length))
    shapes = r"\(layers, H, D, N\) = \(1, 1, 8, 32\), here \(2, 2, 16, 64\)"
    with pytest.raises(UserError, match=shapes):
        prefill(small, random_bytes(1, 3), state)
    with pytest.raises(UserError, match=shapes):
        state_files.save_state(tmp_path / "s.safetensors", small, state)
    with pytest.raises(UserError, match="of type tuple; it must be a State"):
        prefill(small, random_bytes(1, 3), (0, 0))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("broken", "output"),
    [
        ({"position": "a"}, "position is 'a'"),
        ({"position": -5}, "position is -5"),
        ({"buffer": 3}, "buffer is of type int"),
        ({"synapses": (mx.zeros((2, 1, 64)),) * 2}, r"= \(2, 2, 1, 64\), here"),
        ({"synapses": (mx.zeros((2, 1, 64, 16)), mx.zeros((2, 1, 64, 8)))}, r"\(2, 2, 8, 64\)"),
    ],
)
def test_a_state_made_by_hand_is_refused_in_one_line(broken, output):
    with pytest.raises(UserError, match=output):
        prefill(random_model(), random_bytes(1, 3), State(position=3)._replace(**broken))
    with pytest.raises(UserError, match="of type tuple"):
        prefill(random_model(), random_bytes(1, 3), ())


def test_a_link_to_a_model_stays_a_link(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    bdh_mlx.save_model(random_model(), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink() and (
        tmp_path / "real.safetensors"
    ).is_file()


def test_a_state_of_no_byte_is_not_saved_and_a_folder_not_loaded(tmp_path):
    with pytest.raises(UserError, match="the state is of no byte"):
        state_files.save_state(tmp_path / "s.safetensors", random_model(), State())
    with pytest.raises(UserError, match="it is not a regular file"):
        state_files.load_state("/dev/null", random_model())
    with pytest.raises(UserError, match="it is a folder"):
        state_files.load_state(tmp_path, random_model())


def test_position_a_million_is_as_exact_as_0(step):
    S = mx.random.normal((2, 1, 64, 3), key=mx.random.key(0))
    angles = 10**6 * 65536.0 ** (-np.arange(0, 64, 2) / 64)
    pairs = np.array(S, np.float64).reshape(2, 1, 32, 2, 3)
    z = (pairs[..., 0, :] + 1j * pairs[..., 1, :]) * np.exp(1j * angles)[:, None]
    turned = np.stack([z.real, z.imag], -2).reshape(S.shape)
    assert np.abs(np.array(rotate_state(S, 10**6)) - turned).max() < 1e-6

    model, idx = random_model(), random_bytes(1, 200)
    far, _ = read_by(model, idx, [100, 101, 102], State(position=10**6))
    assert close(far, model.quadratic(idx)[0])


def test_a_prompt_of_a_megabyte_takes_the_memory_of_a_short_one():
    peaks = []
    model = random_model()
    mx.eval(model.parameters())
    for n in (20_000, 1_000_000):
        idx = mx.array(np.random.default_rng(0).integers(0, 256, (1, n), np.uint8))
        mx.eval(idx)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        logits, state = prefill(model, idx)
        peaks.append(mx.get_peak_memory() - before)
        assert state.position == n and mx.all(mx.isfinite(logits)).item()
    assert peaks[1] < 1.2 * peaks[0] + 2**22  # the prompt and its pieces


@pytest.mark.parametrize(
    ("info", "rows"),
    [
        ({"memory_size": 68.7e9, "max_recommended_working_set_size": 51.5e9}, 4096),  # a Mac
        ({"memory_size": 17.2e9, "max_recommended_working_set_size": 11.8e9}, 4096),
        ({"total_memory": 85e9}, 32768),
        ({"total_memory": 25e9}, 4096),
    ],
)
def test_only_a_large_card_reads_much_of_a_prompt_at_once(info, rows, monkeypatch):
    monkeypatch.setattr(state, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    model = random_model()
    model.compute = replace(model.compute, dtype=mx.bfloat16)
    pieces = state._pieces(model, mx.zeros((1, 40000), mx.int32), State())
    assert [piece.size for piece in pieces[:-1]] == [rows] * (40000 // rows)


@pytest.mark.parametrize("B", [1, 2])
def test_a_stream_ahead_of_its_reader_gives_the_same_bytes(B, monkeypatch):
    """As on a GPU, whose reader gets each byte once the next is under way, or the next ones."""
    monkeypatch.setattr(mx, "compile", lambda step: step)
    model = random_model()
    report = []
    for on_gpu in (False, True):
        monkeypatch.setattr(state, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(decoding, "on_cuda", lambda on_gpu=on_gpu: on_gpu)
        model.decode_step = None
        idx = np.array(random_bytes(B, 9))
        decoding_ = Decoding(model, Sampling(), mx.random.key(1))
        going = stream(decoding_, *read_prompt(model, idx), idx)
        report.append([next(going)[0] for _ in range(20)])
    assert report[0] == report[1]


def test_a_state_goes_on_on_another_device_and_in_another_precision(monkeypatch):
    monkeypatch.setattr(mx, "compile", lambda step: step)
    model = random_model()
    idx = random_bytes(1, 40)
    state_ = None
    near = 2e-5
    exact = model.quadratic(idx)[0]
    for t in range(40):
        on_gpu = t // 7 % 2 == 1
        monkeypatch.setattr(state, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        if t == 24:
            model.compute = replace(model.compute, dtype=mx.bfloat16)
            near = 5e-2
        logits, state_ = model.read(idx[:, t : t + 1], state_)
        assert max_abs_error(logits[:, 0], exact[:, t]) < near * mx.max(mx.abs(exact)).item()


def test_a_decode_step_is_made_once_and_again_after_a_weight_was_replaced(monkeypatch):
    made = []
    init = step_cpu.DecodeStep.__init__
    monkeypatch.setattr(
        step_cpu.DecodeStep, "__init__", lambda *args: (made.append(1), init(*args))[1]
    )
    model, idx = random_model(), random_bytes(1, 20)
    model.generate(idx, 10, temperature=0)
    assert len(made) == 1
    _, state = prefill(model, idx)
    for byte in range(3):
        _, state = model.read(mx.array([[byte]]), state)
    assert state.buffer.count == 3  # bytes wait: S is not rewritten
    model.encoder = model.encoder * 2
    model.generate(idx, 10, temperature=0)
    assert len(made) == 2


@pytest.mark.parametrize("nothing", [None, 3, "model"])
def test_what_is_no_model_or_state_is_refused_in_one_line(nothing, tmp_path):
    model = random_model()
    file = tmp_path / "s.safetensors"
    _, state = prefill(model, random_bytes(1, 5))
    state_files.save_state(file, model, state)
    for call in (
        lambda: prefill(nothing, random_bytes(1, 5)),
        lambda: state_files.load_state(file, nothing),
        lambda: state_files.save_state(file, model, nothing),
    ):
        with pytest.raises(UserError, match=r"\A[^\n]*(must be|is of no byte)[^\n]*\Z"):
            call()
