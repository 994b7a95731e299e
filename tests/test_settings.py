"""The settings of train_mlx.py: presets, rules, and the messages for wrong values."""

import pytest
from helpers import train

import bdh_mlx
import train_mlx
from bdh_lib.rules import check
from bdh_lib.script import flags
from bdh_mlx import UserError


def test_flags_beat_presets_and_presets_beat_constants():
    s = train_mlx.read_settings(["--preset", "tiny", "--block-size", "99", "--epochs", "none"])
    assert (s.BLOCK_SIZE, s.LEARNING_RATE, s.SEED) == (99, 2e-3, train_mlx.SEED)
    assert (s.BDH_CONFIG.n_embd, s.BDH_CONFIG.n_head) == (64, 4) and s.EPOCHS is None
    plain = train_mlx.read_settings([])
    assert plain.BDH_CONFIG == train_mlx.BDH_CONFIG and plain.EPOCHS == train_mlx.EPOCHS


def test_the_presets_are_those_of_the_guide():
    names = ("TRAINING_MODE", "BLOCK_SIZE", "BATCH_SIZE", "MAX_ITERS", "LEARNING_RATE")
    of = {p: train_mlx.read_settings(["--preset", p]) for p in train_mlx.PRESETS}
    got = {p: tuple(vars(s)[n] for n in names) for p, s in of.items() if "gb" in p}
    assert got == {
        "both-64gb": ("both", 4096, 2, 5000, 5e-5),
        "full-64gb": ("full", 4096, 2, 8000, 3e-5),
        "phase1-64gb": ("system", 4096, 2, 3000, 1e-4),
        "phase2-64gb": ("instruction", 4096, 2, 3000, 5e-5),
        "both-16gb": ("both", 2048, 1, 5000, 5e-5),
    }
    assert of["both-64gb"].EPOCHS == of["full-64gb"].EPOCHS == 3
    assert of["phase2-64gb"].INIT_FROM == "system"
    for s in (s for name, s in of.items() if "gb" in name):  # the rest is as in the official code
        assert bdh_mlx.BDHConfig() == s.BDH_CONFIG
        assert (s.WEIGHT_DECAY, s.BETA2, s.EMA_DECAY, s.SHUFFLE_RECORDS) == (0.1, 0.999, 0, False)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("--training-mode most", "TRAINING_MODE"),
        ("--training-mode a/b", "TRAINING_MODE is 'a/b'"),
        ("--block-size 0", "BLOCK_SIZE is 0"),
        ("--epochs 0", "EPOCHS is 0"),
        ("--max-iters none --epochs none", "MAX_ITERS and EPOCHS are both none.*set one"),
        ("--max-iters none --phases full:1,full:none", "MAX_ITERS and EPOCHS are both none"),
        (
            "--lr-decay-iters 100 --warmup-iters 100",
            "LR_DECAY_ITERS is 100 and WARMUP_ITERS 100: .* raise LR_DECAY",
        ),
        ("--learning-rate nan", "LEARNING_RATE is nan"),
        ("--weight-decay nan", "WEIGHT_DECAY is nan; it must be a number from 0 to 1,000"),
        ("--seed -1", "SEED is -1"),
        (
            "--min-lr-ratio 2",
            "MIN_LR_RATIO is 2.0; .* above 0 and at most 1",
        ),
        ("--run-name ../x", "RUN_NAME is '../x'"),
        ("--run-name .x", "RUN_NAME is '.x'; it must be .* the first of them not a dot"),
        ("--val-fraction 2", "VAL_FRACTION is 2"),
        ("--n-head 3", "n_head is 3"),
        ("--block-size 900000", "BLOCK_SIZE is 900,000"),
        (
            "--grad-accum 6185",
            r"GRAD_ACCUM is 6,185, .* than blocks to train on \(6,184 of 64 bytes, epochs: 1\)",
        ),
        ("--grad-accum 1000000000 --epochs 3 --plan", r"GRAD_ACCUM is 1,0.* \(18,550 of 64 bytes"),
        ("--dataset /no/such/file.jsonl", "does not exist"),
        ("--init-from nowhere --run-name x", "INIT_FROM nowhere: there is no such run"),
        ("--dataset ~no-such-user/d.jsonl", "~no-such-user/d.jsonl does not exist"),
        ("--init-from ~no-such-user --run-name x", "INIT_FROM ~no-such-user: there is no such run"),
    ],
)
def test_wrong_values_are_named(tmp_path, args, complaint):
    with pytest.raises(UserError, match=complaint):
        train(tmp_path, *args.split())


@pytest.mark.parametrize("args", ["--blok-size 2", "--preset huge", "--training-mode"])
def test_wrong_flags_exit_with_2(args):
    with pytest.raises(SystemExit) as error:
        train_mlx.read_settings(args.split())
    assert error.value.code == 2


def test_a_number_that_python_cannot_write_is_refused_in_a_line():
    with pytest.raises(UserError, match="BLOCK_SIZE is a number of very many digits; it must be"):
        check("BLOCK_SIZE", 10**5000, train_mlx.RULES["BLOCK_SIZE"])


def test_every_setting_has_a_rule_and_a_reason():
    assert set(flags.setting_names(train_mlx)) == set(train_mlx.RULES)
    reasons = flags.comments(train_mlx)
    assert all(all(reasons[name]) for name in train_mlx.RULES)
