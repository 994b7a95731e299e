"""Which bytes a batch holds, the schedule, and which bytes an evaluation reads."""

import json
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers import train

import bdh_mlx
import train_mlx
from bdh_lib.data.split import Split
from bdh_lib.loss import byte_losses, evaluate
from bdh_lib.settings import Settings
from bdh_lib.training import schedule
from bdh_lib.training.batches import epoch_order, get_batch
from bdh_lib.training.dataset import open_mode_data
from bdh_lib.training.step import compile_steps, corrupt_bytes
from bdh_lib.training.train_state import TrainState, copy_tree


def batches(split, first, count, *, B=1, T=10, shuffle=False):
    """The blocks of `count` batches of a run, (count * B, T) inputs and targets."""
    s = SimpleNamespace(BATCH_SIZE=B, BLOCK_SIZE=T, SEED=1, SHUFFLE_RECORDS=shuffle, LOSS_ON="all")
    both = [get_batch(split, i, s, B * T)[:2] for i in range(first, first + count)]
    return tuple(
        np.concatenate([np.array(side) for side in sides]) for sides in zip(*both, strict=True)
    )


def split_of(n, lengths=None):
    return Split(np.arange(n), np.zeros(n), None if lengths is None else np.cumsum(lengths))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "T"), [(1000, 10), (1003, 10), (11, 10)])
def test_an_epoch_has_every_byte_as_a_target_and_few_twice(n, T, shuffle):
    blocks = math.ceil(n / T)
    split = split_of(n, [3, 5] * (n // 8) + [n % 8] * (n % 8 > 0))
    idx, targets = batches(split, 0, blocks, T=T, shuffle=shuffle)
    times = np.bincount(targets.ravel(), minlength=n)
    assert times.min() == 1 and (times - 1).sum() == blocks * T - n < T
    in_order = (idx + 1) % n == targets
    assert in_order.all() if not shuffle else in_order.mean() > 0.5  # 3 of 4 lie in one record


def test_each_epoch_has_its_own_order_and_offset():
    split = split_of(1000)
    one, two = (batches(split, i, 100)[0][:, 0] for i in (0, 100))
    assert one[0] % 10 != two[0] % 10  # offsets; true of this seed
    assert not np.array_equal(np.diff(one), np.full(99, 10))  # shuffled


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_a_function_of_their_number_across_epochs(shuffle):
    split = split_of(95, [19] * 5)
    whole = batches(split, 0, 40, shuffle=shuffle)[0]
    parts = [batches(split, i, 1, B=4, shuffle=shuffle)[0] for i in range(10)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_records_follow_each_other_in_a_new_order_in_each_epoch_and_stay_whole():
    split = split_of(1000, [10] * 100)
    orders = []
    for epoch in range(3):
        targets = batches(split, 20 * epoch, 20, T=50, shuffle=True)[1]
        inside = targets[:, :-1] % 10 < 9
        assert np.all(np.diff(targets)[inside] == 1)
        orders.append([*dict.fromkeys((targets // 10).ravel().tolist())])
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    epoch_order.cache_clear()
    again = batches(split, 40, 20, T=50, shuffle=True)[1]
    assert np.array_equal(again, targets)
    epoch_order.cache_clear()
    orders = [epoch_order(split, seed, 0)[1].tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_paragraphs_of_plain_text_among_records_keep_their_order(tmp_path):
    rows = [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(40)]
    rows[20:20] = [{"text": f"Paragraph {i}."} for i in range(20)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = f"--training-mode full --checkpoint-dir {tmp_path}/ck --dataset {tmp_path}/mixed.jsonl"
    train_split = open_mode_data(train_mlx.read_settings(args.split()), "full").train
    text = train_split.bytes.tobytes()
    units = np.split(train_split.bytes, train_split.record_ends)[:-1]
    assert b"".join(unit.tobytes() for unit in units) == text
    paragraphs = [unit.tobytes() for unit in units if b"Paragraph" in unit.tobytes()]
    assert len(paragraphs) == 1 and 30 < len(units) < 40


def test_every_record_is_followed_by_the_separator_over_two_epochs_of_shuffled_ones(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"instruction": f"ask {i}"})
                                                for i in range(40)))  # fmt: skip
    args = f"--training-mode instruction --shuffle-records --checkpoint-dir {tmp_path}/ck"
    s = train_mlx.read_settings([*args.split(), "--dataset", str(tmp_path / "d.jsonl")])
    split = open_mode_data(s, "instruction").train
    idx, targets = batches(split, 0, 2, B=len(split.bytes), T=1, shuffle=True)  # each byte twice
    pairs = Counter(zip(idx.ravel().tolist(), targets.ravel().tolist(), strict=True))
    end, a = b"\na"
    assert pairs[end, end] == pairs[end, a] == 2 * 36  # within a separator, and after it
    assert sum(n for (_, target), n in pairs.items() if target == a) == 2 * 36


def test_plain_text_and_ready_splits_are_not_shuffled(tmp_path):
    (tmp_path / "story.txt").write_text("\n\n".join(f"Paragraph {i} of it." for i in range(50)))
    (tmp_path / "ready").mkdir()
    for side in ("train", "val"):
        (tmp_path / f"ready/{side}.bin").write_bytes(b"some text\n" * 50)
    args = "--block-size 8 --training-mode full --shuffle-records --checkpoint-dir"
    for dataset, is_shuffled in (("story.txt", False), ("ready", False), ("sample", True)):
        name = dataset if dataset == "sample" else str(tmp_path / dataset)
        s = train_mlx.read_settings([*args.split(), str(tmp_path / "ck"), "--dataset", name])
        train_split = open_mode_data(s, "full").train
        assert (train_split.record_ends is not None) == is_shuffled
        if is_shuffled:
            assert train_split.record_ends[-1] == len(train_split.bytes)


def test_the_learning_rate_rises_then_falls_to_its_share():
    s = SimpleNamespace(WARMUP_ITERS=10, LEARNING_RATE=1.0, MIN_LR_RATIO=0.1)
    s.LR_DECAY_ITERS = None
    rates = [schedule.learning_rate(i, 100, s) for i in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert np.all(np.diff(rates[10:]) < 0)


def test_a_share_of_the_bytes_is_replaced_by_others_of_the_batch():
    idx = mx.array(np.arange(4096).reshape(4, 1024) % 251)
    for share in (0.05, 0.5):
        result = np.array(corrupt_bytes(idx, share, mx.random.key(1)))
        replaced = np.mean(result != np.array(idx))
        assert replaced == pytest.approx(share * 250 / 251, abs=0.02) and result.max() < 251


def test_the_average_starts_fast_and_slows_down_to_its_decay():
    mx.random.seed(1)
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0.0, 1, 2))
    optimizer = optim.AdamW(1e-2)
    optimizer.init(model.trainable_parameters())
    ema = copy_tree(model.parameters())
    s = SimpleNamespace(BYTE_NOISE=0, GRAD_CLIP=1.0, EMA_DECAY=0.5)
    state = TrainState(model, optimizer, ema)
    micro_step, apply_update = compile_steps(state, s)
    expected = np.array(ema["lm_head"], np.float64)
    idx, weights = mx.array([[1, 2, 3, 4]]), mx.full((1, 4), 0.25)
    for step in range(1, 14):
        mx.eval(apply_update(*micro_step(idx, idx, weights, mx.random.key(step))), state.trees())
        rate = 1 - min(0.5, step / (step + 9))
        expected += rate * (np.array(model.lm_head) - expected)
        assert np.allclose(np.array(ema["lm_head"]), expected, atol=1e-6), step


def test_each_batch_of_a_seed_has_a_key_of_its_own(tmp_path, monkeypatch):
    seeds = []
    key = mx.random.key
    monkeypatch.setattr(mx.random, "key", lambda seed: seeds.append(seed) or key(seed))
    for seed in (1, 2):
        train(tmp_path / str(seed), "--max-iters", 3, "--seed", seed)
    batches = [seed for seed in seeds if seed >= 2**32]
    assert batches == [seed * 2**32 + i for seed in (1, 2) for i in range(3)]


def test_the_run_ends_at_the_sooner_of_iterations_and_epochs():
    s = Settings(BLOCK_SIZE=10, BATCH_SIZE=2, GRAD_ACCUM=1, MAX_ITERS=7, EPOCHS=3.0)
    assert schedule.total_steps(s, 95) == 7
    s.MAX_ITERS = None
    assert schedule.total_steps(s, 95) == 15
    assert "MAX_ITERS" not in schedule.schedule_summary(s, 95)
    s.MAX_ITERS = 14
    assert "14 iterations of 20 bytes are 280 bytes or 2.95" in schedule.schedule_summary(s, 95)
    assert schedule.schedule_summary(s, 95).endswith("; MAX_ITERS ends it before EPOCHS (3)")
    s.EPOCHS = None
    assert schedule.total_steps(s, 95) == 14 and schedule.schedule_summary(s, 95).endswith("epochs")


@pytest.mark.parametrize("n", [2, 7, 9, 50, 81])
def test_evaluation_reads_every_byte_once(n):
    model = bdh_mlx.BDH(bdh_mlx.BDHConfig(1, 8, 0.5, 1, 4))
    val = np.random.default_rng(0).integers(0, 256, n, dtype=np.uint8)
    nats = 0.0
    for begin in range(0, n - 1, 8):
        piece = mx.array(val[begin : begin + 9].astype(np.int32))[None]
        nats += model(piece[:, :-1], piece[:, 1:])[1].item() * (piece.shape[1] - 1)
    losses = partial(byte_losses, model)
    mean, of = evaluate(losses, Split(val, np.zeros(n, np.uint8)), (3, 8))
    assert mean == of["headers"] == pytest.approx(nats / (n - 1), rel=1e-5)


def test_a_signal_ends_an_evaluation_after_the_batch_at_work():
    stop = SimpleNamespace(requested=0)
    batches_read = []

    def losses(idx, targets):
        batches_read.append(idx)
        stop.requested = 15
        return mx.zeros(idx.shape)

    evaluate(losses, Split(np.zeros(81, np.uint8), np.zeros(81, np.uint8)), (1, 8), stop)
    assert len(batches_read) == 1
