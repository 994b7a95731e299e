"""What a user of generate.py meets: prompts, stop strings, batches, a terminal, a session."""

import errno
import fcntl
import hashlib
import json
import os
import pty
import random
import re
import readline
import select
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from itertools import islice
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from helpers import train

import bdh_mlx
import generate
import train_mlx
from bdh_lib import runs
from bdh_lib.compute import memory
from bdh_lib.data import formats, sources
from bdh_lib.data.parsers import parse_exactly
from bdh_lib.errors import escape_controls
from bdh_lib.generation import chat, decoding, jobs, states
from bdh_lib.generation.decoding import (
    StopMatcher,
    Terminal,
    decode_text,
    generate_batch,
    pad_batch,
    parse_escapes,
    read_prompt,
    stream,
)
from bdh_lib.generation.sampling import PAD, Sampling, uniforms
from bdh_mlx import BDH, BDHConfig, UserError

SMALL = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)
GREEDY = Sampling(temperature=0)
KEY = mx.random.key(1)


def random_model(seed=0):
    mx.random.seed(seed)
    model = BDH(SMALL)
    model.update({k: v * 10 for k, v in model.parameters().items() if isinstance(v, mx.array)})
    return model


def model_of(following):
    """A model that writes following[b] after the byte b, at any temperature: its layer adds nothing
    to the embedding, which is one number per byte value."""
    model = BDH(BDHConfig(n_layer=1, n_embd=256, n_head=1, mlp_internal_dim_multiplier=1))
    zero = mx.zeros((1, 256, 256))
    model.update({"encoder": zero, "encoder_v": zero, "decoder": zero[0]})
    model.embed.weight = mx.eye(256)
    model.lm_head = 100 * mx.eye(256)[mx.array(following)]
    return model


COUNTING = [(b + 1) % 256 for b in range(256)]  # writes all byte values, over and over


def saved(model, folder, mode="full", **settings):
    """A run folder with one checkpoint of this model."""
    at = folder / "run" / "step-000001"
    at.mkdir(parents=True)
    bdh_mlx.save_model(model, at / "model.safetensors")
    settings = {"TRAINING_MODE": mode, "BLOCK_SIZE": 64, "BATCH_SIZE": 2} | settings
    (at / "config.json").write_text(json.dumps({"step": 1, "settings": settings}))
    return folder / "run"


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return saved(model_of(COUNTING), tmp_path_factory.mktemp("counting"))


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return saved(random_model(), tmp_path_factory.mktemp("chaos"))


@pytest.fixture
def output(capfdbinary):
    """Runs generate.py in this process; what it printed."""

    def run(*args):
        capfdbinary.readouterr()
        assert generate.main([str(a) for a in args]) == 0
        return capfdbinary.readouterr().out

    return run


@pytest.mark.parametrize("on_metal", [False, True])
def test_the_cache_of_freed_buffers_is_limited_on_metal(on_metal, counting, output, monkeypatch):
    limits = []
    monkeypatch.setattr(memory, "on_metal", lambda: on_metal)
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    assert output(counting, "--prompt", "a", "--max-new-tokens", 2) == b"abc\n"
    assert limits == [2 * 10**9] * on_metal


# ------------------------------------------------------------------------------- places and batches


def greedy(model, prompt, n):
    return next(generate_batch(model, [prompt], GREEDY, KEY, [], n))[1]


@pytest.mark.parametrize("alike", [False, True])
def test_a_batch_of_any_lengths_equals_each_prompt_alone(alike):
    model = random_model()
    prompts = [b"a", b"hello world", b"\xff\xfe", b"x" * 30, b"hello"]
    if alike:
        prompts = [b"all the same", *(b"all " + prompt for prompt in prompts), b"all "]
    found = {row: text for row, text, _ in generate_batch(model, prompts, GREEDY, KEY, [], 20)}
    assert found == {row: greedy(model, prompt, 20) for row, prompt in enumerate(prompts)}


def test_bytes_of_a_longer_prompt_are_of_the_type_of_drawn_ones(monkeypatch):
    step, types = decoding.read, []  # with another type a compiled step would be traced anew
    monkeypatch.setattr(decoding, "read", lambda *of: types.append(of[1].dtype) or step(*of))
    assert len(list(generate_batch(random_model(), [b"a", b"hello"], GREEDY, KEY, [], 4))) == 2
    assert len(types) >= 8 and set(types) == {mx.uint32}  # 4 bytes given, 4 drawn


def test_a_prompt_read_in_pieces_is_the_same_place_and_can_be_gone_on_from_twice():
    model, idx, state = random_model(), pad_batch([bytes(range(200))]), None
    whole = read_prompt(model, idx)
    for piece in (idx[:, :1], idx[:, 1:90], idx[:, 90:]):
        place = logits, state = read_prompt(model, piece, state)
    assert mx.max(mx.abs(logits - whole[0])).item() < 2e-5 * mx.max(mx.abs(whole[0])).item()

    def bytes_from(place, n=10):
        going = stream(model, *place, GREEDY, KEY, idx)
        return [next(going)[0] for _ in range(n)]

    assert bytes_from(whole) == bytes_from(place) == bytes_from(whole)


@pytest.mark.parametrize(
    ("settings", "looks_back"),
    [
        *(({}, False), ({"temperature": 0.7, "top_k": 9}, False), ({"top_p": 0.9}, False)),
        *(
            ({"repetition_penalty": 1.5, "temperature": 0}, True),
            ({"utf8": True, "min_p": 0.01}, True),
        ),
    ],
)
def test_the_loop_draws_what_a_draw_with_all_that_was_seen_gives(settings, looks_back):
    """And where no draw looks back, nothing is carried from byte to byte."""
    model, s = random_model(), Sampling(**settings)
    seen = pad_batch([b"caf\xc3", b"\xf0\x9f\x98a"])
    assert (s.recent(seen) is not None) == looks_back
    going = stream(model, *read_prompt(model, seen), s, KEY, seen, [b"", b"given"])
    for i, number in enumerate(islice(uniforms(KEY, 2), 100)):
        past = np.full((2, 256), PAD)
        past[:, -seen.shape[1] :] = seen
        token = s.draw(read_prompt(model, seen)[0], mx.array(past, mx.int32), number)
        token = [token[0].item(), b"given"[i] if i < 5 else token[1].item()]
        assert next(going)[0] == token
        seen = np.append(seen, np.array(token)[:, None], 1)


def test_numbers_that_are_not_finite_are_refused():
    model = random_model()
    model.lm_head = model.lm_head * float("nan")
    with pytest.raises(UserError, match="not finite"):
        read_prompt(model, pad_batch([b"a"]))


# ------------------------------------------------------------------------------------- stop strings


def first_stop(text, stops, new):
    """Start and end of the stop string that is complete first, the longest of several."""
    found = [
        (end, end - len(stop))
        for stop in stops
        for end in range(new + 1, len(text) + 1)
        if text[:end].endswith(stop)
    ]
    return min(found)[::-1] if found else None


def test_a_stop_string_shows_no_part_of_itself_however_the_text_is_cut():
    rng = random.Random(5)
    stopped = 0
    for _ in range(3000):
        text = bytes(rng.choices(b"ab-\n", k=rng.randint(0, 14)))
        stops = [
            bytes(rng.choices(b"ab-\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))
        ]
        new = rng.randint(0, min(5, len(text)))
        stop, shown, at = StopMatcher(stops, text[:new]), b"", new
        while at < len(text):
            step = rng.randint(1, 4)
            shown += stop.feed(text[at : at + step])
            at += step
            found = first_stop(text[:at], stops, new)
            assert stop.matched == (found is not None)
            if found:
                break
            assert text[new:].startswith(shown)
            # held back: the shortest that keeps a stop string from being shown in part
            longest = max(
                (n for s in stops for n in range(1, len(s)) if text[:at].endswith(s[:n])), default=0
            )
            assert shown == text[new : max(new, min(at, len(text)) - longest)]
        shown += stop.end()
        found = first_stop(text, stops, new)
        assert shown == (text[new : found[0]] if found else text[new:])
        stopped += found is not None
    assert 500 < stopped < 2500


def test_a_record_ends_in_mode_full_at_a_line_of_three_dashes(tmp_path, output):
    args = generate.parse_args(["m"])
    stops = [b"\n---\n", b"\n\n### Instruction:\n"]
    assert generate.stop_strings(args, "full") == stops
    assert generate.stop_strings(args, "both") == []
    assert generate.stop_strings(generate.parse_args(["m", "--no-stop"]), "full") == []
    following = list(range(256))
    following[ord("-")] = ord("\n")
    run = saved(model_of(following), tmp_path)
    assert (
        output(run, "--prompt", r"end\n---") == b"end\n---\n"
    )  # the line is complete: nothing new
    assert output(run, "--prompt", r"a--", "--max-new-tokens", 3) == b"a--\n\n\n\n"


def test_stop_strings_of_the_user_end_the_text_before_them(counting, output):
    assert output(counting, "--prompt", "a", "--stop", "xyz", "--stop", "hij") == b"abcdefg\n"
    assert (
        output(counting, "--prompt", "a", "--stop", "no", "--max-new-tokens", 12)
        == b"abcdefghijklm\n"
    )
    assert (
        output(counting, "--prompt", "a", "--stop", "no", "--max-new-tokens", 13)
        == b"abcdefghijklmn\n"
    )
    assert (
        output(counting, "--prompt", "a", "--stop", "no", "--max-new-tokens", 14)
        == b"abcdefghijklm\n"
    )
    with pytest.raises(UserError, match="--stop is empty"):
        generate.main([str(counting), "--prompt", "a", "--stop", ""])


# ------------------------------------------------------------------------------------------ prompts


def test_an_empty_prompt_begins_a_record(counting, output):
    # after a blank line comes \x0b
    assert output(counting, "--prompt", "", "--max-new-tokens", 2, "--raw") == b"\x0b\x0c"


def test_a_prompt_that_is_no_utf8_is_read_as_it_is_and_shown_escaped(counting, output, tmp_path):
    (tmp_path / "p").write_bytes(b"a\xff\x1b")
    ask = (counting, "--prompt-file", tmp_path / "p", "--max-new-tokens", 1)
    assert output(*ask) == b"a\\xff\\x1b\\x1c\n"
    assert output(*ask, "--raw") == b"a\xff\x1b\x1c"
    assert parse_escapes("a\udcff\\n") == b"a\xff\n"
    assert escape_controls("a\udcff\ud800\x1b") == r"a\xff\xd800\x1b"


def test_a_megabyte_of_prompt(tmp_path, output):
    mx.random.seed(0)
    run = saved(BDH(BDHConfig(1, 64, 0, 1, 1)), tmp_path)
    text = np.random.default_rng(1).integers(97, 123, 1_000_000, np.uint8).tobytes()
    (tmp_path / "p").write_bytes(text)
    out = output(run, "--prompt-file", tmp_path / "p", "--max-new-tokens", 5, "--raw", "--seed", 1)
    assert out[:-5] == text


def test_a_pipe_is_read_to_its_end(counting):
    command = [sys.executable, str(ROOT / "generate.py"), str(counting), "--max-new-tokens", "3"]
    ran = subprocess.run(command, input=b"line\nx", capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"line\nxyz{\n", b"")


def test_the_same_seed_writes_the_same_bytes(chaos, output):
    one, again, other = (output(chaos, "--prompt", "a", "--seed", s, "--raw") for s in (1, 1, 2))
    assert one == again != other
    assert len(one) == 501


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--top-k", "0"], "--top-k is 0; it must be a whole number from 1"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "x"], "--out is for the texts of --prompts"),
        (["--batch-size", "8"], "--batch-size: no effect on one text"),  # the default
        *(
            ([flag, "9" * 25], f"{flag} is 9999")
            for flag in ("--samples", "--max-new-tokens", "--batch-size", "--window", "--seed")
        ),
        *(([flag, "nan"], f"{flag} is nan") for flag in ("--temperature", "--top-p", "--min-p")),
        (["--top-k", "9" * 25], "--top-k is 9999"),
        (["--window", "3"], "--window is 3; it must be a whole number from 4"),
        (["--repetition-penalty", "inf"], "--repetition-penalty is inf"),
        (["--raw", "--samples", "2"], "--raw writes one text"),
        (["--batch-size", "2"], "--batch-size: no effect on one text"),
    ],
)
def test_impossible_flags_are_one_line(flags, complaint, counting):
    with pytest.raises(UserError, match=complaint) as error:
        generate.main([str(counting), "--prompt", "a", *flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--promt", "x"], "--promt; did you mean --prompt?"),
        (["--top-k", "x"], "--top-k: invalid int value: 'x'"),
        (["--trace", "x"], "--trace: not allowed with argument --prompt"),
        (["--stop", "a", "--no-stop"], "--no-stop: not allowed with argument --stop"),
    ],
)
def test_mistyped_flags_are_one_line(flags, complaint, counting, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.main([str(counting), "--prompt", "a", *flags])
    output = capsys.readouterr().err
    assert complaint in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--evaluate x --top-k 3 --dtype float32 --temperature 0.8", "--temperature, --top-k"),
        *(("--trace x --trace y --mode full", "--mode"), ("--export x --raw", "--raw")),
        ("--evaluate x --save-state s", "--save-state"),
    ],
)
def test_a_flag_without_an_effect_is_told(flags, idle, counting):
    with pytest.raises(UserError, match=f"^{idle}: no effect beside {flags.split()[0]}"):
        generate.main([str(counting), *flags.split()])


def test_files_that_cannot_be_read_or_would_be_lost_are_named(counting, tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff")
    (tmp_path / "in").write_text('{"prompt": "a"}')
    (tmp_path / "loop").symlink_to("loop")
    for asked, out, complaint in (
        ("none", "out", "none: No such file or directory"),
        (".", "out", "Is a directory"),
        ("bad", "out", "bad is no UTF-8"),
        ("in", "in", "in exists; name another file"),
        ("loop", "out", "loop: Too many levels of symbolic links"),
        ("in", "loop", "loop cannot be written: Too many levels"),
        ("in", ".", "cannot be written: Is a directory"),
    ):
        names = ("--prompts", str(tmp_path / asked), "--out", str(tmp_path / out))
        with pytest.raises(UserError, match=complaint):
            generate.main([str(counting), *names])
    assert (tmp_path / "in").read_text() == '{"prompt": "a"}'


PATH_FLAGS = ["--prompt-file", "--prompts", "--export", "--load-state", "--save-state", "--out"]


@pytest.mark.parametrize("flag", [*PATH_FLAGS, "--evaluate", "--trace", "--stop"])
def test_an_empty_string_is_no_value(flag, counting):
    with pytest.raises(UserError, match=f"^{flag} is empty"):
        generate.parse_args([str(counting), flag, ""])
    with pytest.raises(UserError, match=r"^model is empty"):
        generate.parse_args(["", "--prompt", "a"])


@pytest.mark.parametrize("flag", PATH_FLAGS)
def test_each_flag_that_takes_a_path_reads_it_alike(flag, counting, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of mine")
    beside = {"--out": ["--prompts", "p"]}.get(flag, [])
    args = generate.parse_args([str(counting), *beside, flag, "~/x.safetensors"])
    path = vars(args)[flag[2:].replace("-", "_")]
    assert str(path) == "/home/of mine/x.safetensors"
    for wrong, complaint in (("w/\udcff", r"w/\\udcff: not UTF-8"), ("a\0b", "NUL")):
        with pytest.raises(UserError, match=f"^{flag} is .*{complaint}"):
            generate.parse_args([str(counting), flag, wrong])
    with pytest.raises(UserError, match=r"^model is .*not UTF-8"):
        generate.parse_args(["\udcff"])


@pytest.mark.parametrize("script", [generate, train_mlx])
def test_the_version_is_a_line(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--version"])
    assert re.fullmatch(r"BDH-MLX, mlx [\d.]+, python [\d.]+\n", capsys.readouterr().out)


def test_what_is_no_file_is_not_evaluated(chaos, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(UserError, match="is no regular file; write what it gives to a file"):
            generate.main([str(chaos), "--evaluate", str(name)])


def damaged_run(run, folder, config):
    copied = folder / "copied"
    shutil.copytree(run, copied)
    (copied / "step-000001" / "config.json").write_bytes(config)
    return copied


@pytest.mark.parametrize(
    "config",
    [b"", b"\xff", b"[]", b"null", b"[" * 10**5, b'{"settings": 5}', b'{"settings": null}'],
)
def test_a_damaged_config_is_a_warning(config, chaos, tmp_path, capsys):
    run = damaged_run(chaos, tmp_path, config)
    assert generate.main([str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "config.json is damaged" in output


def test_a_config_that_was_not_written_with_its_checkpoint_is_a_warning(tmp_path, capsys):
    assert train(tmp_path, "--max-iters", "1") == 0
    capsys.readouterr()
    ask = [str(tmp_path / "full"), "--prompt", "a", "--max-new-tokens", "1"]
    assert generate.main(ask) == 0 and capsys.readouterr().err == ""
    (tmp_path / "full" / "step-000001" / "config.json").write_text("{}")
    assert generate.main(ask) == 0
    assert re.fullmatch("warning: .*config.json has changed .*unknown\n", capsys.readouterr().err)


@pytest.mark.parametrize("wrong", ["2", None, True, 1.5, -1, [2], {"a": 1}, 10**30])
def test_settings_of_a_wrong_type_are_unknown_to_evaluation(wrong, chaos, tmp_path, output):
    names = ("BLOCK_SIZE", "BATCH_SIZE", "TRAINING_MODE")
    config = json.dumps({"settings": dict.fromkeys(names, wrong)})
    run = damaged_run(chaos, tmp_path, config.encode())
    (tmp_path / "a.txt").write_text("one paragraph\n\nanother\n")
    table = output(run, "--evaluate", tmp_path / "a.txt", "--mode", "full").decode()
    assert "in blocks of 4,096" in table
    assert output(run, "--prompt", "a", "--max-new-tokens", 1)


def of_steps(model, folder, *steps):
    run = folder / "steps"
    for step in steps:
        at = run / f"step-{step:06d}"
        at.mkdir(parents=True)
        bdh_mlx.save_model(model, at / "model.safetensors")
        digest = hashlib.sha256((at / "model.safetensors").read_bytes()).hexdigest()
        manifest = {"model.safetensors": {"sha256": digest}}
        (at / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_a_checkpoint_that_cannot_be_taken_is_told(tmp_path, capsys):
    run = of_steps(random_model(), tmp_path, 1, 2, 3)
    (run / "best.json").write_text('{"checkpoint": "step-000002"}')
    assert runs.find_weights(run).parent.name == "step-000002"
    assert capsys.readouterr().err == ""
    (run / "step-000002" / "model.safetensors").unlink()
    assert runs.find_weights(run).parent.name == "step-000003"
    output = capsys.readouterr().err
    assert "step-000002 lacks its model.safetensors; taking step-000003" in output
    with pytest.raises(UserError, match=r"step-000002 lacks its model.safetensors"):
        runs.find_weights(run / "step-000002")
    for step in (1, 3):
        (run / f"step-{step:06d}" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="has no valid checkpoint: step-000002 lacks"):
        runs.find_weights(run)
    assert capsys.readouterr().err == ""
    for name in ("manifest.json", "../best.json"):
        with pytest.raises(UserError, match=r"it is no .safetensors file"):
            bdh_mlx.load_model(run / "step-000001" / name)


@pytest.mark.parametrize("best", [b"[" * 10**5, b"[]", b'{"checkpoint": ["x"]}', b"\xff", b""])
def test_a_damaged_best_means_the_last(best, tmp_path):
    run = of_steps(random_model(), tmp_path, 1, 2)
    (run / "best.json").write_bytes(best)
    assert runs.find_weights(run).parent.name == "step-000002"
    (run / "best.json").unlink()
    (run / "best.json").mkdir()
    assert runs.find_weights(run).parent.name == "step-000002"


def test_other_vocabularies_are_refused(tmp_path):
    mx.random.seed(0)
    run = saved(BDH(BDHConfig(1, 16, 0, 2, 8, vocab_size=300)), tmp_path)
    with pytest.raises(UserError, match="vocabulary of 300"):
        generate.main([str(run), "--prompt", "a"])


# --------------------------------------------------------------------------------------- JSON lines


def results(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_prompts_is_answered_line_by_line_as_one_by_one(chaos, tmp_path, output):
    asked = [
        {"prompt": "one", "id": 7},
        {"system": "S", "instruction": "I"},
        {"question": "Q", "answer": "gold"},
        {"prompt": ""},
        {"text": "plain\u2028\x85 and more"},
        {"prompt": "long " * 400},
    ]
    (tmp_path / "in").write_text(
        "\n".join(json.dumps(record, ensure_ascii=False) for record in asked)
    )
    ask = (chaos, "--prompts", tmp_path / "in", "--temperature", 0, "--max-new-tokens", 12)
    output(*ask, "--out", tmp_path / "out", "--batch-size", 4)
    found = sorted(results(tmp_path / "out"), key=lambda r: r["line"])
    read_as = [
        *("one", "### System:\nS\n\n### Instruction:\nI\n\n### Response:\n"),
        *("### Instruction:\nQ\n\n### Response:\n", "", "plain\u2028\x85 and more", "long " * 400),
    ]
    model = random_model()
    for record, result, prompt, number in zip(asked, found, read_as, range(1, 7), strict=True):
        written = greedy(model, prompt.encode() or b"\n\n", 12)
        expected = {"prompt": prompt, "completion": decode_text(written), "stopped": False}
        assert result == record | {"line": number, "by": result["by"]} | expected
    assert output(*ask).splitlines() != []  # without --out, to stdout


def test_several_samples_of_each_prompt_differ_and_repeat_with_the_seed(chaos, tmp_path, output):
    (tmp_path / "in").write_text('{"prompt": "a"}\n{"prompt": "bb"}\n')
    ask = (chaos, "--prompts", tmp_path / "in", "--samples", 3, "--batch-size", 4, "--seed", 3)
    ask += ("--max-new-tokens", 30)
    out = output(*ask)
    assert out == output(*ask)
    found = [json.loads(line) for line in out.splitlines()]
    assert sorted((r["line"], r["sample"]) for r in found) == [
        (line, sample) for line in (1, 2) for sample in (1, 2, 3)
    ]
    assert len({r["completion"] for r in found}) == 6
    text = output(chaos, "--prompt", "a", "--samples", 2, "--seed", 3).decode()
    assert re.findall(r"--- sample (\d)\na", text) == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("3", "not a JSON object"),
        ('{"prompt": 5}', "prompt is int, not text"),
        ('{"prompt": "a", "n": NaN}', "it holds a number that JSON cannot"),
        ('{"prompt": "a", "n": [1e999]}', "it holds a number that JSON cannot"),
        ("[" * 10**5, "not JSON"),
        ("\0", "not JSON"),
        ('{"system": "s"}', "instruction missing"),
        ('{"instruction": null}', "instruction is null, not text"),
        ('{"instruction": "i", "system": {}}', "system is dict, not text"),
    ],
)
def test_a_bad_line_of_prompts_is_named(line, reason, chaos, tmp_path):
    (tmp_path / "in").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=f"line 2: {reason}"):
        generate.main([str(chaos), "--prompts", str(tmp_path / "in")])


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "i", "response": None},
        {"instruction": "i", "response": 3, "system": None},
        {"messages": [{"role": "user", "content": "i"}]},
    ],
)
def test_what_a_model_would_answer_need_not_be_there(record):
    asked = b"### Instruction:\ni\n\n### Response:\n"
    assert jobs.prompt_of_record(record, "full") == asked


def test_blank_lines_of_prompts_count_but_ask_nothing(chaos, tmp_path, output):
    (tmp_path / "in").write_text('\n{"prompt": "a", "line": 7, "completion": "mine"}\n  \n')
    (found,) = output(chaos, "--prompts", tmp_path / "in", "--max-new-tokens", 3).splitlines()
    found = json.loads(found)
    assert found["line"] == 2 and found["given"] == {"line": 7, "completion": "mine"}
    (tmp_path / "in").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        generate.main([str(chaos), "--prompts", str(tmp_path / "in")])


def test_batches_hold_prompts_of_similar_length_each_once():
    made = [jobs.Job(i, None, {}, b"x" * n) for i, n in enumerate([5, 900, 1, 6, 905, 7, 2])]
    found = [[len(job.prompt) for job in b] for b in jobs.batches(made, 3, spread=10)]
    assert found == [[1, 2, 5], [6, 7], [900, 905]]


@pytest.mark.parametrize("mode", formats.REQUIRED_FIELDS)
def test_an_opening_is_the_beginning_of_the_training_text(mode):
    record = {"system": "sys", "instruction": "ask", "response": "reply"}
    text = formats.format_example(record, mode)
    opening = formats.format_prompt(formats.to_turns(record), mode)
    assert text == opening + ("reply\n---" if mode == "full" else "")
    assert formats.format_prompt([("text", "plain")], mode) == "plain"


# ---------------------------------------------------------------------------- text and the terminal


def test_utf8_is_always_valid_text(chaos):
    model, s = bdh_mlx.load_model(chaos), Sampling(utf8=True)
    prompts = [b"a", b"caf\xc3", b"\xf0\x9f", b"\xff\xfe", "日本".encode()] * 4
    for row, written, _ in generate_batch(model, prompts, s, KEY, [], 50):
        partial = {1: b"\xc3", 2: b"\xf0\x9f"}.get(row % 5, b"")
        text = decode_text(partial + written, whole=True).encode()
        assert (partial + written).startswith(text) and len(partial + written) - len(text) < 4
        assert text.decode()


def test_a_terminal_gets_characters_whole_and_controls_escaped(capsys):
    terminal = Terminal()
    for byte in "é\x9b\u202e日".encode() + b"\xe6\x97":
        terminal.write(bytes([byte]))
    assert capsys.readouterr().out == "é\\x9b\\x202e日"
    terminal.write(b"", final=True)
    assert capsys.readouterr().out == "\\xe6\\x97"


class Screen:
    """generate.py on a terminal of its own, and what came out of it."""

    def __init__(self, home, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null"}
            command = [sys.executable, str(ROOT / "generate.py"), *map(str, args)]
            os.execv(sys.executable, command)
        self.out, self.seen = b"", 0

    def read(self, seconds):
        """Whether more came."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self.fd, 65536)
        except OSError:  # the other side is gone
            piece = b""
        self.out += piece
        return bool(piece)

    def until(self, text, seconds=60):
        """Wait for text; what came before it since the last time."""
        end = time.monotonic() + seconds
        while (at := self.out.find(text, self.seen)) < 0:
            assert time.monotonic() < end and self.read(1), self.out[-2000:]
        before, self.seen = self.out[self.seen : at], at + len(text)
        return before

    def type(self, text):
        os.write(self.fd, text)

    def ended(self):
        """Read to the end; the exit code."""
        while self.read(5):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        try:
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def test_no_control_byte_of_the_model_reaches_a_terminal(counting, tmp_path, output):
    args = (counting, "--prompt", "a", "--max-new-tokens", 300, "--no-stop")
    assert len(set(output(*args, "--raw"))) == 256  # the model does write them all
    with Screen(tmp_path, *args) as screen:
        assert screen.ended() == 0
    shown = screen.out.replace(b"\r\n", b"\n").decode()  # the line ends are the terminal's own
    assert [c for c in shown if c not in "\n\t" and unicodedata.category(c) == "Cc"] == []
    assert rb"\x00\x01" in screen.out and rb"\x1b" in screen.out and rb"\xff" in screen.out


PROMPT = b"> "


def test_a_session_keeps_its_state_and_formats_what_is_typed(counting, tmp_path):
    with Screen(tmp_path, counting, "--max-new-tokens", 300, "--no-stop") as screen:
        assert b"a response after its header" in screen.until(PROMPT)

        def line(text):
            screen.type(text + b"\r")
            return screen.until(PROMPT)

        def transcript():
            (tmp_path / "said").unlink(missing_ok=True)
            line(b"/save " + str(tmp_path / "said").encode())
            return (tmp_path / "said").read_bytes()

        assert b"/reset" in line(b"/help")
        assert b"no command" in line(b"/what")
        assert b"temperature is -1" in line(b"/temp -1")
        assert b"'x' is no number" in line(b"/temp x")
        assert b"temperature: 0.5" in line(b"/temp 0.5")
        answer = bytes((11 + i) % 256 for i in range(300))  # after the \n of the header
        shown = escape_controls(answer.decode(errors="backslashreplace"))
        assert shown.replace("\n", "\r\n").encode() in line(b"hello")
        one = b"### Instruction:\nhello\n\n### Response:\n" + answer
        assert transcript() == one
        (tmp_path / "other").write_bytes(b"mine")
        assert b"exists" in line(b"/save " + str(tmp_path / "other").encode())
        assert (tmp_path / "other").read_bytes() == b"mine"
        assert b"system text: be brief" in line(b"/system be brief")
        line(b"more")
        two = (
            b"\n---\n\n### System:\nbe brief\n\n### Instruction:\nmore\n\n### Response:\n" + answer
        )
        assert transcript() == one + two
        line(b"/save " + str(tmp_path / "said").encode())  # a session may replace its own files
        assert f"forgotten: {len(one + two):,} bytes".encode() in line(b"/reset")
        assert b"exists" in line(b"/save " + str(tmp_path / "said").encode())  # another talk
        assert b"system text: none" in line(b"/system")
        screen.type(b'"""\rtwo\rlines\r')
        line(b'"""')
        assert transcript() == one.replace(b"hello", b"two\nlines")
        if "libedit" not in readline.__doc__:
            line(b"/reset")
            line(b"\x1b[200~pasted\nlines\x1b[201~")  # as terminals send what is pasted
            assert transcript() == one.replace(b"hello", b"pasted\nlines")
        screen.type(b"\x04")
        assert screen.ended() == 0
    assert "hello" in (tmp_path / ".bdh_history").read_text()


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_session(counting, tmp_path):
    with Screen(tmp_path, counting, "--max-new-tokens", 10**9, "--no-stop") as screen:
        screen.until(PROMPT)
        screen.type(b"go\r")
        screen.until(b"ABCDEFG")  # in the middle of an endless answer
        screen.type(b"\x03")
        screen.until(PROMPT)
        screen.type(b"half a line")
        screen.until(b"half a line")  # readline is reading
        time.sleep(0.1)  # and waiting: a signal before that is seen at the next key (CPython)
        screen.type(b"\x03")
        screen.until(PROMPT)
        screen.type(b"/save " + str(tmp_path / "said").encode() + b"\r")
        screen.until(b"saved")
        screen.until(PROMPT)
        screen.type(b"\x04")
        assert screen.ended() == 0
    text = (tmp_path / "said").read_bytes()
    assert text.startswith(b"### Instruction:\ngo\n\n### Response:\n\x0b\x0c") and len(text) > 80


@pytest.mark.parametrize("library", ["GNU readline", "libedit readline", None])
def test_lines_that_cannot_be_pasted_as_one_text_are_told(
    library, monkeypatch, capsys, chaos, tmp_path
):
    """None: a Python without the module."""
    bound = []
    fake = SimpleNamespace(__doc__=f"Importing this module enables line editing using {library}.")
    fake.read_history_file = fake.set_history_length = fake.write_history_file = lambda _: None
    fake.parse_and_bind = bound.append
    monkeypatch.setitem(sys.modules, "readline", fake if library else None)
    monkeypatch.setattr(chat.Session, "next_line", lambda _: None)
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    chat.Session(bdh_mlx.load_model(chaos), Sampling(), KEY, [], 9, "full").run()
    assert ('go between two lines of """' in capsys.readouterr().out) == (not bound)
    assert len(bound) == (library == "GNU readline")


def test_the_end_of_input_ends_a_text_of_several_lines(monkeypatch):
    lines = iter(['"""', "one", "two"])

    def typed(_):
        if line := next(lines, None):
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    assert chat.read_input() == "one\ntwo"
    with pytest.raises(EOFError):
        chat.read_input()


def test_a_session_answers_as_its_whole_transcript_would(monkeypatch, capsys, chaos, tmp_path):
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    lines = iter(["first", "/system S", "second", f"/save {tmp_path / 'said'}", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    model = bdh_mlx.load_model(chaos)
    chat.Session(model, GREEDY, KEY, [b"\n---\n"], 30, "full").run()
    output = (tmp_path / "said").read_bytes()
    asked, answer = output[: output.rindex(b"### Response:\n") + 14], output[-30:]
    assert asked.startswith(b"### Instruction:\nfirst") and b"### System:\nS\n" in asked
    assert greedy(model, asked, 30) == answer


ASKED_AGAIN = b"### Instruction:\nq\n\n### Response:\n"
PLAIN = b"### System:\nS\n\n### Instruction:\nq"


@pytest.mark.parametrize(
    ("said", "mode", "chats", "read"),
    [
        (b"ans", "full", False, b"\n---\n\n### System:\nS\n\n" + ASKED_AGAIN),
        (b"ans\n--", "full", False, b"-\n\n### System:\nS\n\n" + ASKED_AGAIN),
        (b"ans\n---\n", "full", False, b"\n### System:\nS\n\n" + ASKED_AGAIN),
        (b"ans", "full", True, b"\n\n" + ASKED_AGAIN),
        (b"ans\n\n### Instruction:\n", "full", True, ASKED_AGAIN.partition(b"\n")[2]),
        (b"ans\n---\n", "full", True, b"\n### System:\nS\n\n" + ASKED_AGAIN),
        (b"ans\n", "both", False, b"\n" + PLAIN),
        (b"ans", "instruction", True, b"\n\nq"),
    ],
)
def test_a_turn_goes_on_as_the_model_was_trained(said, mode, chats, read, chaos):
    session = chat.Session(bdh_mlx.load_model(chaos), GREEDY, KEY, [], 9, mode, None, chats)
    session.system, session.text = "S", bytearray(said)
    assert session.format_prompt("q") == read
    session.text = bytearray()
    assert read.endswith(session.format_prompt("q")[-9:])


# --------------------------------------------------------------------------------------- evaluation


def test_evaluate_gives_the_trainers_validation_and_its_parts(tmp_path, output):
    some = tmp_path / "some.jsonl"
    some.write_text("".join(sources.SAMPLE.read_text().splitlines(keepends=True)[:20]))
    args = f"--preset tiny --dataset {some} --n-layer 1 --n-embd 16 --max-iters 2 --sample-bytes 1"
    assert train_mlx.main([*args.split(), "--checkpoint-dir", str(tmp_path)]) == 0
    val = next((tmp_path / ".data").glob("*/val.bin")).read_bytes()
    held_out = tmp_path / "val.jsonl"
    with held_out.open("w") as file:
        for record in sources.read_records(str(some)):
            if formats.format_example(record, "full").encode() in val:
                file.write(json.dumps(record) + "\n")
    metrics = (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()
    trainers = [m["val_loss"] for m in map(json.loads, metrics) if "val_loss" in m][-1]
    table = output(tmp_path / "full", "--evaluate", held_out).decode()
    rows = {row.split()[0]: row.split()[1:] for row in table.splitlines()[2:]}
    assert rows.keys() == {"headers", "system", "instruction", "response", "whole"}
    assert int(rows["whole"][0].replace(",", "")) == len(val) - 1
    assert abs(float(rows["whole"][2]) - trainers) < 1e-4
    assert abs(float(rows["whole"][3]) - trainers / np.log(2)) < 1e-4
    whole, *parts = ([float(n.replace(",", "")) for n in (rows[f][0], rows[f][2])]
                     for f in ("whole", *(rows.keys() - {"whole"})))  # fmt: skip
    assert sum(n for n, _ in parts) == whole[0]
    assert abs(sum(n * nats for n, nats in parts) / whole[0] - whole[1]) < 2e-4


def test_a_text_file_has_one_field_and_other_modes_need_their_fields(chaos, tmp_path, output):
    (tmp_path / "a.txt").write_text("one paragraph\n\nanother\n")
    table = output(chaos, "--evaluate", tmp_path / "a.txt").decode().splitlines()
    assert [row.split()[0] for row in table[2:]] == ["headers", "text", "whole"]
    (tmp_path / "a.jsonl").write_text('{"instruction": "x"}\n')
    with pytest.raises(UserError, match="no record for TRAINING_MODE 'full'"):
        generate.main([str(chaos), "--evaluate", str(tmp_path / "a.jsonl")])
    bare = chaos / "step-000001" / "model.safetensors"
    (tmp_path / "bare.safetensors").write_bytes(bare.read_bytes())
    with pytest.raises(UserError, match="--mode"):
        generate.main([str(tmp_path / "bare.safetensors"), "--evaluate", str(tmp_path / "a.txt")])


# ------------------------------------------------------------------------------------------- states


def test_a_saved_state_goes_on_as_the_whole_prompt_would(chaos, tmp_path, output):
    greedy = ("--temperature", "0", "--no-stop", "--max-new-tokens", "20", "--raw")
    file = tmp_path / "s.safetensors"
    kept = output(chaos, "--prompt", "abc def", *greedy, "--save-state", file)
    on = output(chaos, "--prompt", " and on", *greedy, "--load-state", file)
    (tmp_path / "all").write_bytes(kept + b" and on")
    assert output(chaos, "--prompt-file", tmp_path / "all", *greedy) == kept + on
    assert len(on) == len(b" and on") + 20
    with pytest.raises(UserError, match=r"--window is 64.*read with none"):
        generate.main([str(chaos), "--prompt", "a", "--load-state", str(file), "--window", "64"])


def test_a_text_longer_than_the_trained_blocks_is_told_unless_a_window_bounds_it(chaos, capsys):
    generate.main([str(chaos), "--prompt", "a" * 400, "--max-new-tokens", "5"])
    assert "was trained on blocks of" in capsys.readouterr().err
    generate.main([str(chaos), "--prompt", "a" * 400, "--max-new-tokens", "5", "--window", "64"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["absent/s.safetensors", "s.bin", "weights.safetensors"])
def test_a_state_that_cannot_be_saved_is_told_before_a_byte_is_written(
    chaos, tmp_path, file, capsys
):
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"encoder": mx.ones(3)})
    with pytest.raises(UserError, match="not saved"):
        generate.main([str(chaos), "--prompt", "abc", "--save-state", str(tmp_path / file)])
    assert capsys.readouterr().out == ""
    assert mx.load(str(tmp_path / "weights.safetensors"))["encoder"].tolist() == [1, 1, 1]


def test_an_interrupted_text_saves_its_state_too(chaos, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(StopMatcher, "end", interrupt)
    file = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        generate.main([*f"{chaos} --prompt abc --max-new-tokens 5 --save-state {file}".split()])
    assert states.load_state(file, bdh_mlx.load_model(chaos)).position == 8


def test_a_text_that_is_interrupted_before_its_first_byte_saves_what_was_read(
    chaos, tmp_path, monkeypatch
):
    def stopped(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(generate, "stream", stopped)
    file = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(chaos), "--prompt", "abcdef", "--save-state", str(file)])
    assert states.load_state(file, bdh_mlx.load_model(chaos)).position == 6


def test_prompts_are_read_as_training_reads_its_records():
    record = parse_exactly('{"text": 1.50, "n": 1e5}')
    assert jobs.prompt_of_record(record, "instruction", "instruction=text") == b"1.50"
    turns = {"text": [{"role": "user", "content": "q"}]}
    asked = b"### Instruction:\nq\n\n### Response:\n"
    assert jobs.prompt_of_record(turns, "full", "messages=text") == asked


def test_numbers_of_a_prompt_stand_as_in_its_line_and_in_its_record(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"instruction": 1.50, "id": 7}\n')
    (job,) = jobs.read_jobs(tmp_path / "p.jsonl", "instruction", 1)
    assert job.prompt == b"1.50" and job.record == {"instruction": 1.5, "id": 7}


def test_interrupted_prompts_tell_how_many_are_written_and_keep_them(
    chaos, tmp_path, monkeypatch, capsys
):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{p}"}}\n' for p in "abc"))
    of_model = jobs.generate_batch

    def interrupted(model, prompts, *rest):
        if prompts == [b"c"]:
            raise KeyboardInterrupt
        return of_model(model, prompts, *rest)

    monkeypatch.setattr(jobs, "generate_batch", interrupted)
    flags = f"--prompts {prompts} --out {out} --batch-size 1 --max-new-tokens 5"
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(chaos), *flags.split()])
    assert "stopped: 2 of 3 texts are written" in capsys.readouterr().err
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["a", "b"]


ASKED = ["one", "a longer one", "one", "four", "five"]


@pytest.fixture
def asked(tmp_path, chaos, output, capfdbinary):
    """A function that writes the texts of ASKED to `out`; what was said on stderr."""
    lines = ({"prompt": p, "line": i} for i, p in enumerate(ASKED))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    flags = f"--prompts {tmp_path / 'p.jsonl'} --seed 3 --batch-size 2 --max-new-tokens 9"

    def run(*args, out=tmp_path / "out.jsonl"):
        capfdbinary.readouterr()
        generate.main([str(chaos), *flags.split(), "--out", str(out), *args])
        return capfdbinary.readouterr().err.decode()

    return run


@pytest.mark.parametrize(("n", "error"), [(1000, False), (1001, True)])
def test_a_long_prompt_is_told_before_it_is_read(n, error, chaos, tmp_path, capfdbinary):
    (tmp_path / "long").write_bytes(b"a" * n)
    generate.main([str(chaos), "--prompt-file", str(tmp_path / "long"), "--max-new-tokens", "1"])
    line = f"reading a prompt of {n:,} bytes".encode()
    assert (line in capfdbinary.readouterr().err) == error


@pytest.mark.parametrize("other", ["--temperature 0.5", "--seed 4", "--window 8", "--stop x"])
def test_texts_of_another_command_do_not_count_as_done(other, asked, tmp_path):
    asked()
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="its line 1 is no answer of this command"):
        asked(*other.split())
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_texts_of_another_model_do_not_count_as_done(asked, chaos, tmp_path, monkeypatch):
    asked()
    real = runs.find_weights
    other = tmp_path / "other.safetensors"
    bdh_mlx.save_model(random_model(seed=5), other)
    monkeypatch.setattr(generate.runs, "find_weights", lambda path: real(other))
    with pytest.raises(UserError, match="its line 1 is no answer of this command"):
        asked()


def test_a_file_that_another_process_writes_is_refused(asked, tmp_path):
    asked()
    out = tmp_path / "out.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0])
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            asked()
    assert out.read_bytes() == lines[0]


@pytest.mark.parametrize("samples", ["1", "3"])
def test_interrupted_prompts_go_on_with_what_is_missing_and_end_in_the_same_bytes(
    samples, asked, tmp_path
):
    out = tmp_path / "out.jsonl"
    asked("--samples", samples)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5 * int(samples)
    for kept in range(len(lines)):
        for half in (b"", lines[kept][:1], lines[kept][: len(lines[kept]) // 2], lines[kept][:-1]):
            out.write_bytes(b"".join(lines[:kept]) + half)
            error = asked("--samples", samples)
            assert out.read_bytes() == whole
            assert (f"holds {kept} of {len(lines)} texts; the others follow" in error) == (kept > 0)
    out.write_bytes(b"".join(lines[1::2]))  # in any order
    asked("--samples", samples)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    before = out.read_bytes()
    assert "none is left to write" in asked("--samples", samples)
    assert out.read_bytes() == before


def test_a_file_that_is_no_output_of_these_prompts_is_refused_and_kept(asked, tmp_path):
    asked()
    out, lines = tmp_path / "out.jsonl", (tmp_path / "out.jsonl").read_bytes().splitlines(True)
    other = json.dumps(json.loads(lines[0]) | {"prompt": "another"}).encode() + b"\n"
    moved = json.dumps(json.loads(lines[0]) | {"line": 9}).encode() + b"\n"
    for content in (
        *(b"mine", b"mine\n", b"{}\n", b"[1]\n", b"3\n", b"\xff\n", b"[" * 10**5 + b"\n", b"\n"),
        *(lines[0] * 2, lines[0] + other, moved, lines[0] + b"mine", lines[0] + b"\n" + lines[1]),
    ):
        out.write_bytes(content)
        with pytest.raises(UserError, match="exists"):
            asked()
        assert out.read_bytes() == content
    out.write_bytes(lines[0])
    with pytest.raises(UserError, match="its line 1 is no answer of this command to these prompts"):
        asked("--samples", "2")


def test_no_empty_file_is_left_and_a_full_disk_leaves_whole_lines(asked, tmp_path, monkeypatch):
    out, write_of = tmp_path / "out.jsonl", jobs.write_line

    def full(file, line):
        if not file.tell() or "four" not in line:
            return write_of(file, line)
        file.write(line[:5].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "generate_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked()
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_line", full)
        with pytest.raises(UserError, match=r"out.jsonl cannot be written: No space left"):
            asked()
    assert len(out.read_bytes().splitlines()) == 1 + out.read_bytes().count(b"\n")
    asked()
    assert sorted(m["line"] for m in results(out)) == [1, 2, 3, 4, 5]


def test_a_million_texts_are_the_most(chaos, tmp_path):
    (tmp_path / "p").write_text('{"prompt": "a"}\n' * 3)
    with pytest.raises(UserError, match="asks for more than 1,000,000 texts"):
        jobs.read_jobs(tmp_path / "p", None, 400_000)


def test_prompts_of_another_editor_are_read(chaos, tmp_path, output):
    (tmp_path / "p").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    out = output(chaos, "--prompts", tmp_path / "p", "--max-new-tokens", 2).splitlines()
    assert [json.loads(line)["line"] for line in out] == [1, 3]


def test_a_session_says_once_that_it_outgrew_the_blocks(monkeypatch, capsys, chaos, tmp_path):
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    model = bdh_mlx.load_model(chaos)
    lines = iter(["a", "b" * model.trained_length, "c", "/save", "/quit "])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.Session(model, GREEDY, KEY, [], 5, "full").run()
    out = capsys.readouterr().out
    assert out.count("was trained on blocks of") == 1 and "/save: name a file" in out
