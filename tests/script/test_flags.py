"""What the flags and the terminal show: headings, near names, colours, lines of JSON."""

import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, metrics, train

import bdh_mlx
import train_mlx
from bdh_lib.generation import export
from bdh_lib.script import flags
from bdh_mlx import UserError


def test_help_shows_every_setting_under_its_heading(capsys):
    with pytest.raises(SystemExit):
        train_mlx.read_settings(["--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^(\S.*):\n((?:  .*\n)+)", text, re.M)
    of = {name: re.findall(r"^  (--[a-z0-9-]+)", body, re.M) for name, body in groups}
    headings = re.findall("^# ([A-Z].*)\n[A-Z]", inspect.getsource(train_mlx), re.M)
    assert list(of) == ["options", *headings] and "--dataset" in of["Data"]
    assert "--n-layer" in of["Model, and how it is computed"] and "--plan" in of["options"]
    shown = {flag for name, flags in of.items() if name != "options" for flag in flags}
    given = vars(train_mlx.read_settings([]))
    config = vars(given.pop("BDH_CONFIG"))
    wanted = {f"--{n.lower().replace('_', '-')}" for n in {**given, **config}}
    assert shown == wanted - {f"--{name.replace('_', '-')}" for name in train_mlx.ACTIONS}


@pytest.mark.parametrize(
    ("args", "near"),
    [
        ("--blok-size 2", "--block-size"),
        ("--preset tinny", "tiny"),
        ("--epoch 3", "--epochs"),
        ("--memory small", "--memory-mode"),
        ("--lr 3", "--learning-rate"),  # not --lr-decay-iters
        ("--context_length 3", "--block-size"),
    ],
)
def test_a_mistyped_flag_suggests_the_nearest(args, near, capsys):
    with pytest.raises(SystemExit) as error:
        train_mlx.read_settings(args.split())
    assert error.value.code == 2
    output = capsys.readouterr().err
    assert f"; did you mean {near}? (--help lists all)\n" in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "output"),
    [
        (["--zzz=3"], "unknown flag --zzz (--help lists all)"),
        (["--training-mod\x1b"], r"unknown flag --training-mod\x1b; did you mean --training-mode?"),
        (["--device", "cpu"], "BDH_DEVICE=cpu in the environment"),
        (["stray"], "unrecognized arguments: stray (--help lists all)"),
    ],
)
def test_a_mistake_is_one_line_without_the_usage(args, output, capsys):
    with pytest.raises(SystemExit) as error:
        train_mlx.read_settings(args)
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1 and f": {output}" in err


def test_any_script_can_report_mistakes_so(capsys):
    parser = flags.Parser("what it does")
    parser.add_argument("model")
    parser.add_argument("--food", type=int)
    assert parser.parse_args(["m", "--food", "3"]).food == 3
    for args, output in (
        (["m", "--foo", "3"], "--foo; did you mean --food?"),
        ([], "required: model"),
    ):
        with pytest.raises(SystemExit) as error:
            parser.parse_args(args)
        assert error.value.code == 2 and output in capsys.readouterr().err


def test_a_mistyped_choice_suggests_the_nearest():
    with pytest.raises(UserError, match=r"did you mean full\?"):
        train_mlx.read_settings(["--training-mode", "ful"])
    with pytest.raises(UserError, match=r"be one of system, instruction, both, full$"):
        train_mlx.read_settings(["--training-mode", "xyz"])


# ------------------------------------------------------------------------------ plain Python

BLOCKS = {  # as a user's notes may have them: without types, with other comments, over lines
    "mode system": 'TRAINING_MODE = "system"',
    "mode instruction": 'TRAINING_MODE = "instruction"',
    "mode both": 'TRAINING_MODE = "both"',
    "mode full": 'TRAINING_MODE = "full"',
    "both-64gb": """TRAINING_MODE = "both"
BLOCK_SIZE = 4096
BATCH_SIZE = 2
MAX_ITERS = 5000
LEARNING_RATE = 5e-5
EPOCHS = 3""",
    "full-64gb": """TRAINING_MODE = "full"
BLOCK_SIZE = 4096
BATCH_SIZE = 2
MAX_ITERS = 8000
LEARNING_RATE = 3e-5
EPOCHS = 3""",
    "phase1-64gb": """TRAINING_MODE = "system"
BLOCK_SIZE = 4096
BATCH_SIZE = 2
MAX_ITERS = 3000
LEARNING_RATE = 1e-4""",
    "phase2-64gb": """TRAINING_MODE = "instruction"
BLOCK_SIZE = 4096
BATCH_SIZE = 2
MAX_ITERS = 3000
LEARNING_RATE = 5e-5""",
    "both-16gb": """TRAINING_MODE = "both"
BLOCK_SIZE = 2048  # Reduced context
BATCH_SIZE = 1
MAX_ITERS = 5000
LEARNING_RATE = 5e-5""",
    "a comment of its own": '''# Line ~29 in train_mlx.py
TRAINING_MODE = "both"  # Change this to: "system", "instruction", "both", or "full"''',
    "a smaller model": """BDH_CONFIG = bdh_mlx.BDHConfig(
    n_layer=4,      # Reduced from 6
    n_embd=128,     # Reduced from 256
    n_head=2,       # Reduced from 4
)""",
    "a smaller model by its name": "BDH_CONFIG = BDHConfig(n_layer=4, n_embd=128, n_head=2)",
}
TABLE = "\nACTIONS = {"  # the first line that is not a setting


def copied(folder, edit):
    """The trainer as a module of its own, its source changed by `edit`."""
    name = f"train_{abs(hash(str(folder)))}"
    file = folder / f"{name}.py"
    file.write_text(edit((ROOT / "train_mlx.py").read_text()))
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_place(block):
    """Each constant of the block in place of the line that sets it."""

    def edit(source):
        names = re.findall(r"^(\w+)", re.sub("^#.*\n", "", block), re.M)
        for name in names:
            source, n = re.subn(rf"^{name}\b.* = .*\n", "", source, flags=re.M)
            assert n == 1
        return source.replace("# Data\n", f"# Data\n{block}\n", 1)

    return edit


def behind(block):
    """All of the block behind the constants."""
    return lambda source: source.replace(TABLE, f"\n{block}\n{TABLE}", 1)


def assigned(block):
    values = {}
    exec(block, {"bdh_mlx": bdh_mlx, "BDHConfig": bdh_mlx.BDHConfig}, values)
    return values


SMALL = "--dataset sample --max-iters 1 --epochs none --eval-bytes 200 --sample-bytes 0"
MODEL = "--n-layer 1 --n-embd 16 --n-head 2 --mlp-internal-dim-multiplier 4"


@pytest.mark.parametrize("where", [in_place, behind])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_pasted_block_is_the_settings_and_trains(tmp_path, block, where):
    trainer = copied(tmp_path, where(block))
    expected = vars(train_mlx.read_settings([])) | assigned(block)
    assert vars(trainer.read_settings([])) == expected
    args = [*SMALL.split(), "--checkpoint-dir", str(tmp_path)]
    args += ["--block-size", "64"] if "BDH_CONFIG" in block else MODEL.split()
    assert trainer.main(args) == 0
    (config,) = tmp_path.glob("*/step-000001/config.json")
    settings = json.loads(config.read_text())["settings"]
    assert settings["TRAINING_MODE"] == expected["TRAINING_MODE"]
    if "BDH_CONFIG" in block:
        assert (settings["n_layer"], settings["n_embd"], settings["n_head"]) == (4, 128, 2)
    else:
        assert settings["BLOCK_SIZE"] == expected["BLOCK_SIZE"]


@pytest.mark.parametrize("preset", [name for name in BLOCKS if name in train_mlx.PRESETS])
def test_a_preset_is_its_block(tmp_path, preset):
    # what the block does not say is that of the official code, as its writer had it
    official = train_mlx.PRESET_BASE.split()
    if "EPOCHS" in BLOCKS[preset]:  # the flag would beat the line
        del official[(i := official.index("--epochs")) : i + 2]
    official += ["--eval-bytes", "50000"] if preset == "both-16gb" else []
    by_lines = vars(copied(tmp_path, in_place(BLOCKS[preset])).read_settings(official))
    by_preset = vars(train_mlx.read_settings(["--preset", preset]))
    start = {"INIT_FROM": "system"} if preset == "phase2-64gb" else {}  # its weights
    assert by_preset == by_lines | start


def test_presets_and_flags_act_on_pasted_lines(tmp_path):
    """A pasted line has no type: the flag still takes `none`, and a number with a point."""
    trainer = copied(tmp_path, behind("EPOCHS = 3\nLEARNING_RATE = 1\nMAX_ITERS = None"))
    assert trainer.read_settings(["--preset", "tiny"]).EPOCHS is None
    s = trainer.read_settings(["--epochs", "1.5", "--learning-rate", "2e-3", "--max-iters", "7"])
    assert (s.EPOCHS, s.LEARNING_RATE, s.MAX_ITERS) == (1.5, 2e-3, 7)


OWN = """COOLDOWN_ITERS: int = 0  # updates at the end
NOTE = "mine"
RATE: float | None = None
LISTED = (1, 2)
PLACES = {"a", "b", "c"}
TABLE = {(1, 2): 3}
SIZES: list[int] = [3]
EITHER: int | str = "a"
MARK = float("nan")
THING = object()
MANY = 10**5000
SMALL_CONFIG = BDHConfig(n_layer=1, n_embd=64)
FAST = True
"""


def test_a_constant_of_ones_own_is_a_setting(tmp_path, capsys):
    trainer = copied(tmp_path, behind(OWN))
    s = trainer.read_settings(["--cooldown-iters", "5", "--rate", "0.5", "--no-fast"])
    assert (s.COOLDOWN_ITERS, s.NOTE, s.RATE, s.LISTED, s.FAST) == (5, "mine", 0.5, (1, 2), False)
    with pytest.raises(SystemExit, match="2"):
        trainer.read_settings(["--listed=3"])
    refused = f"LISTED holds a tuple, which no flag can; change it in {trainer.__name__}.py (--help"
    assert refused in capsys.readouterr().err
    with pytest.raises(SystemExit):
        trainer.read_settings(["--help"])
    shown = capsys.readouterr().out
    assert re.search(r"--cooldown-iters int\s+updates at the end \(now 0\)", shown)
    args = [*SMALL.split(), *MODEL.split(), "--block-size", "64", "--checkpoint-dir", str(tmp_path)]
    assert trainer.main(args) == 0
    shown = capsys.readouterr().err
    assert "warning" not in shown and "own settings: COOLDOWN_ITERS, NOTE, RATE, LISTED," in shown
    (config,) = tmp_path.glob("*/step-000001/config.json")
    kept = json.loads(config.read_text())["settings"]
    assert kept["COOLDOWN_ITERS"] == 0 and kept["LISTED"] == [1, 2] and kept["RATE"] is None
    assert kept["PLACES"] == ["a", "b", "c"] and kept["TABLE"] == "{(1, 2): 3}"
    assert (kept["SIZES"], kept["EITHER"], kept["MARK"]) == ([3], "a", "nan")
    assert (
        kept["THING"] == "<object object>"
    )  # without its address, which is another in each process
    assert kept["n_embd"] == 16  # of BDH_CONFIG, not of the other one
    assert export.facts(config.parent)[1].keys() & {"NOTE", "LISTED"} == set()
    again = [*args, "--max-iters", "2"]
    assert trainer.main(again) == 0
    start = next(line for line in capsys.readouterr().out.splitlines() if "start: " in line)
    assert "LISTED" not in start and "PLACES" not in start  # they have not changed


@pytest.mark.parametrize(
    ("block", "output"),
    [
        (
            "BATCHSIZE = 2",
            "BATCHSIZE is not a setting of the trainer; did you mean BATCH_SIZE?",
        ),
        ("batch_size = 2", "batch_size is not a setting .*; did you mean BATCH_SIZE?"),
        ("n_layer = 4", "n_layer is not a setting of the trainer; set it in BDH_CONFIG"),
        ("EPOCH = 2", "EPOCH is not a setting .*; did you mean EPOCHS?"),
        (
            "KEEP_CHECKPOINTS = 4",
            r"KEEP_CHECKPOINTS is set in lines \d+ and \d+; the last one counts",
        ),
        ("BLOCK_SIZE: 32", r"line \d+, BLOCK_SIZE: 32, sets nothing; its = is missing"),
        ("BLOCK_SIZE == 32", r"line \d+, BLOCK_SIZE == 32, sets nothing; its = is missing"),
        ("NOTE: str", r"line \d+, NOTE: str, sets nothing; its = is missing"),
    ],
)
def test_a_name_that_may_be_a_slip_is_one_warning(tmp_path, block, output):
    trainer = copied(tmp_path, behind(block))
    (slip,) = flags.find_typos(trainer, trainer.RULES)
    assert re.fullmatch(output.replace("?", r"\?"), slip)


def test_the_settings_as_they_stand_have_no_slip():
    assert flags.find_typos(train_mlx, train_mlx.RULES) == []
    assert flags.own_settings(train_mlx, train_mlx.RULES) == []


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ('BLOCK_SIZE = "256"', "BLOCK_SIZE is '256'; it must be a whole number from 1"),
        ("SEED: int = 1.5", "SEED is 1.5; it must be a whole number"),
        ("BATCH_SIZE = None", "BATCH_SIZE is None; it must be a whole number"),
        ("KEEP_CHECKPOINTS = True", "KEEP_CHECKPOINTS is True; it must be a whole number"),
        ('EPOCHS = "none"', "EPOCHS is 'none'; it must be a number above 0 .* or None$"),
        ("IGNORE_MEMORY_CHECK = 1", "IGNORE_MEMORY_CHECK is 1; it must be True or False$"),
        ('DATASET = ""', "DATASET is ''; it must be text that is neither empty nor none$"),
        ('RUN_NAME = " "', "RUN_NAME is ' '; it must be text that is not empty or None$"),
        ("BDH_CONFIG = BDHConfig", r"BDH_CONFIG is <class .*; it must be a BDHConfig\(...\)$"),
        ("BDH_CONFIG = {}", r"BDH_CONFIG is {}; it must be a BDHConfig\(...\)$"),
        ('TRAINING_MODE = "ful"', r"TRAINING_MODE is 'ful'; .*; did you mean full\?$"),
        ("LEARNING_RATE = float('nan')", "LEARNING_RATE is nan; it must be a number from 1e-12"),
        ("COOLDOWN: int = 'x'", "COOLDOWN is 'x'; it must be a whole number$"),
        ("N_LAYER = 4", "N_LAYER: its flag --n-layer is that of n_layer; rename N_LAYER$"),
        ("PLAN = True", "PLAN: its flag --plan is that of another flag; rename PLAN$"),
    ],
)
def test_a_wrong_constant_is_named_with_its_value_and_what_fits(tmp_path, line, output):
    trainer = copied(tmp_path, behind(line))
    with pytest.raises(UserError, match=output):
        trainer.read_settings([])


@pytest.mark.parametrize(
    ("args", "output"),
    [
        ("--init-from=", "INIT_FROM is ''; it must be text that is not empty or none$"),
        ("--checkpoint-dir=", "CHECKPOINT_DIR is ''"),
        ("--dataset=", "DATASET is ''"),
        ("--dataset none", "DATASET is 'none'; it must be text that is neither empty nor none$"),
        ("--checkpoint-dir None", "CHECKPOINT_DIR is 'None'"),
        ("--block-size two", "BLOCK_SIZE is 'two'; it must be a whole number from 1"),
        ("--block-size none", "BLOCK_SIZE is 'none'"),
        ("--grad-accum 99999999999999999999999", "GRAD_ACCUM is 9+; .* to 2,147,483,647"),
        ("--sample-bytes 99999999999999999999999", "SAMPLE_BYTES is 9+; .* to 1,000,000"),
        ("--learning-rate 1e30", "LEARNING_RATE is 1e.30; .* to 1,000"),
        ("--weight-decay 1e30", "WEIGHT_DECAY is 1e.30; .* to 1,000"),
        ("--epochs inf", "EPOCHS is inf"),
        ("--vocab-size 1", "vocab_size is 1; bytes are 256, so leave it at 256$"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value_and_what_fits(args, output):
    with pytest.raises(UserError, match=output):
        train_mlx.read_settings(args.split())


@pytest.mark.parametrize("name", train_mlx.RULES)
def test_a_constant_that_is_gone_is_named(tmp_path, name):
    source = lambda text: re.sub(rf"^{name}\b.* = .*\n", "", text, flags=re.M)  # noqa: E731
    with pytest.raises(UserError, match=f"{name} is not set; put its line back"):
        copied(tmp_path, source).read_settings([])


@pytest.mark.parametrize(
    ("name", "slip"),
    [("LEARNING_RATE", "LEARNING_RAET"), ("LEARNING_RATE", "learning_rate"), ("EPOCHS", "EPOCH")],
)
def test_what_stands_in_place_of_a_constant_is_named(tmp_path, name, slip):
    source = lambda text: re.sub(rf"^{name}\b", slip, text, flags=re.M)  # noqa: E731
    with pytest.raises(UserError, match=rf"{name} is not set; .* \(is {slip} meant to be it\?\)$"):
        copied(tmp_path, source).read_settings([])


@pytest.mark.parametrize(
    ("args", "output"),
    [
        ("--selfcheck --json", "--json: no effect beside --selfcheck"),
        ("--selfcheck --preset tiny", "--preset: no effect beside --selfcheck"),
        ("--plan --selfcheck", "--plan: no effect beside --selfcheck"),
        ("--plan --json", "--json: no effect beside --plan"),
        ("--phases full:1 --training-mode both", "--training-mode: no effect beside --phases"),
        ("--phases full:1 --epochs 2", "--epochs: no effect beside --phases"),
    ],
)
def test_flags_without_an_effect_together_are_refused(args, output):
    with pytest.raises(UserError, match=f"^{output}"):
        train_mlx.read_settings(args.split())
    train_mlx.read_settings(["--preset", "tiny", "--phases", "full:1"])  # a preset was not typed


def test_the_last_of_a_flag_that_is_typed_twice_counts_and_is_told(monkeypatch, capsys):
    args = ["--seed=1", "--keep-awake", "--epochs=3", "--epochs=3", "--no-keep-awake", "--seed=2"]
    monkeypatch.setattr(sys, "argv", ["train_mlx.py", *args])
    assert train_mlx.read_settings().SEED == train_mlx.read_settings(args).SEED == 2
    assert capsys.readouterr().err.splitlines() == [
        "warning: --keep-awake is given twice, as True and as False; the last one counts",
        "warning: --seed is given twice, as '1' and as '2'; the last one counts",
    ]


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    trainer = copied(tmp_path, lambda source: "\ufeff" + source)
    assert vars(trainer.read_settings([])) == vars(train_mlx.read_settings([]))
    assert flags.find_typos(trainer, trainer.RULES) == []


def test_a_copy_of_the_trainer_runs_its_own_settings(tmp_path):
    file = tmp_path / "my-run.py"
    file.write_text(in_place("MAX_ITERS = 1")((ROOT / "train_mlx.py").read_text()))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for more in ([], ["--plan"]):
        args = ["--dataset", "sample", *MODEL.split(), "--block-size", "64", *more]
        command = [sys.executable, file, *args]
        ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert ran.returncode == 0 and "1 iterations of 128 bytes" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("BLOCK_SIZE = 40q", None),  # no Python: its own SyntaxError
        (
            "IGNORE_MEMORY_CHECK: bool = true",
            "error: train_mlx.py line \\d+: NameError: name 'true' is not",
        ),
        ("BDH_CONFIG = bdh_mlx.BDHConfig(n_head=3)", "error: n_head is 3; it must divide"),
        (
            "BDH_CONFIG.n_layer = 1",
            "error: train_mlx.py line \\d+: FrozenInstanceError: cannot assign",
        ),
        ("def f(): f()\nf()", "error: train_mlx.py line \\d+: RecursionError"),
        ("SEED = 1 / 0", "error: train_mlx.py line \\d+: ZeroDivisionError"),
        ("import no_such_module", r"error: train_mlx.py line \d+: ModuleNotFoundError"),
    ],
)
def test_a_line_that_python_refuses_is_one_line(tmp_path, line, output):
    file = tmp_path / "train_mlx.py"
    file.write_text(behind(line)((ROOT / "train_mlx.py").read_text()))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, file, "--plan", "--dataset", "sample"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    if output is None:
        assert ran.returncode == 1 and "SyntaxError" in ran.stderr
        return
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and re.match(output, ran.stderr)


# ----------------------------------------------------------------------------------- the terminal


def test_json_lines_stand_alone_on_stdout(tmp_path, capsys):
    assert train(tmp_path, "--max-iters", 5, "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == metrics(tmp_path)
    assert "look_at_it" in err and "iter      5" not in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("no_color", "bold"), [("", 2), ("1", 0)])
def test_evaluations_are_bold_on_a_terminal_without_no_color(tmp_path, monkeypatch, no_color, bold):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    assert train(tmp_path, "--max-iters", 5) == 0
    assert screen.getvalue().count("\x1b[1m") == bold


def test_nothing_is_bold_in_a_pipe(tmp_path, capsys):
    assert train(tmp_path, "--max-iters", 5) == 0
    assert "\x1b" not in capsys.readouterr().out
