"""What the flags and the terminal show: headings, near names, colours, lines of JSON."""

import io
import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_train import metrics, train

import flags
import train_mlx
from bdh_mlx import UserError


def test_help_shows_every_setting_under_its_heading(capsys):
    with pytest.raises(SystemExit):
        train_mlx.settings(["--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^(\S.*):\n((?:  .*\n)+)", text, re.M)
    of = {name: re.findall(r"^  (--[a-z-]+)", body, re.M) for name, body in groups}
    assert list(of)[1:3] == ["Data", "Training"] and "--dataset" in of["Data"]
    assert "--n-layer" in of["Model, and how it is computed"] and "--plan" in of["options"]
    shown = {flag for name, flags in of.items() if name != "options" for flag in flags}
    given = vars(train_mlx.settings([]))
    config = vars(given.pop("BDH_CONFIG"))
    wanted = {f"--{n.lower().replace('_', '-')}" for n in {**given, **config}}
    assert shown == wanted - {f"--{name.replace('_', '-')}" for name in train_mlx.ACTIONS}


@pytest.mark.parametrize(
    ("args", "near"),
    [("--blok-size 2", "--block-size"), ("--preset tinny", "tiny"), ("--epoch 3", "--epochs")],
)
def test_a_mistyped_flag_is_told_its_nearest(args, near, capsys):
    with pytest.raises(SystemExit) as error:
        train_mlx.settings(args.split())
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert f"; did you mean {near}? (--help lists all)\n" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--zzz=3"], "unknown flag --zzz (--help lists all)"),
        (["--training-mod\x1b"], r"unknown flag --training-mod\x1b; did you mean --training-mode?"),
        (
            ["--block-size", "two\nlines"],
            "argument --block-size: invalid int value: 'two\\nlines' (",
        ),
        (["stray"], "unrecognized arguments: stray (--help lists all)"),
    ],
)
def test_a_mistake_is_one_line_without_the_usage(args, said, capsys):
    with pytest.raises(SystemExit) as error:
        train_mlx.settings(args)
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1 and f": {said}" in err


def test_any_script_can_report_mistakes_so(capsys):
    parser = flags.Parser("what it does")
    parser.add_argument("model")
    parser.add_argument("--food", type=int)
    assert parser.parse_args(["m", "--food", "3"]).food == 3
    for args, said in (
        (["m", "--foo", "3"], "--foo; did you mean --food?"),
        ([], "required: model"),
    ):
        with pytest.raises(SystemExit) as error:
            parser.parse_args(args)
        assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_mistyped_choice_is_told_its_nearest():
    with pytest.raises(UserError, match=r"did you mean full\?"):
        train_mlx.settings(["--training-mode", "ful"])
    with pytest.raises(UserError, match=r"be one of system, instruction, both, full$"):
        train_mlx.settings(["--training-mode", "xyz"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('BLOCK_SIZE: int = "256"', "BLOCK_SIZE is '256' in its line; it must be a whole number$"),
        ("SEED: int = 1.5", "SEED is 1.5 .* a whole number$"),
        ("BATCH_SIZE: int = None", "BATCH_SIZE is None .* a whole number$"),
        ("KEEP: int = True", "KEEP is True .* a whole number$"),
        ('EPOCHS: float | None = "none"', "EPOCHS is 'none' .* a number or None$"),
        ("FORCE: bool = 1", "FORCE is 1 .* True or False$"),
        ("BATCHSIZE: int = 2", r"BATCHSIZE is no setting; did you mean BATCH_SIZE\?$"),
        ("KEEP = 3", "KEEP: its line has lost its type, as in `BLOCK_SIZE: int = 4096`$"),
        ("KEEP: int = 3\nKEEP: int = 4", "KEEP stands twice$"),
        ("#KEEP: int = 3", "^KEEP must stand among the settings$"),
    ],
)
def test_constants_are_checked_as_flags_are(tmp_path, line, said):
    source = (ROOT / "train_mlx.py").read_text()
    name, value = re.match(r"\w+", line.strip("#"))[0], line.split("= ")[-1]
    script = SimpleNamespace(**vars(train_mlx) | {name: eval(value)})
    script.__file__ = str(tmp_path / "train_mlx.py")
    instead_of = name.replace("BATCHSIZE", "BATCH_SIZE")
    source = re.sub(rf"^{instead_of}: .* = .*$", line, source, flags=re.M)
    (tmp_path / "train_mlx.py").write_text(source)
    with pytest.raises(UserError, match=said):
        flags.parse(script, train_mlx.NAMES, {}, [], {})


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
