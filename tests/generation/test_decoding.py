"""Batches of prompts of any lengths, stop strings, and bytes as text."""

import random
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from helpers import GREEDY, KEY, greedy, model_of, random_model, saved

import bdh_mlx
import generate
from bdh_lib.generation import decoding
from bdh_lib.generation.decoding import (
    Decoding,
    StopMatcher,
    Terminal,
    decode_text,
    generate_batch,
    pad_batch,
    read_prompt,
    stream,
)
from bdh_lib.generation.sampling import PAD, Sampling, uniforms
from bdh_mlx import UserError


@pytest.mark.parametrize("alike", [False, True])
def test_a_batch_of_any_lengths_equals_each_prompt_alone(alike):
    model = random_model()
    prompts = [b"a", b"hello world", b"\xff\xfe", b"x" * 30, b"hello"]
    if alike:
        prompts = [b"all the same", *(b"all " + prompt for prompt in prompts), b"all "]
    found = {
        row: text for row, text, _ in generate_batch(Decoding(model, GREEDY, KEY, [], 20), prompts)
    }
    assert found == {row: greedy(model, prompt, 20) for row, prompt in enumerate(prompts)}


def test_bytes_of_a_longer_prompt_are_of_the_type_of_drawn_ones(monkeypatch):
    step = decoding.read_unchecked
    types = []  # with another type a compiled step would be traced anew
    monkeypatch.setattr(
        decoding, "read_unchecked", lambda *of: types.append(of[1].dtype) or step(*of)
    )
    decoding_ = Decoding(random_model(), GREEDY, KEY, [], 4)
    assert len(list(generate_batch(decoding_, [b"a", b"hello"]))) == 2
    assert len(types) >= 8 and set(types) == {mx.uint32}  # 4 bytes given, 4 drawn


def test_a_prompt_read_in_pieces_is_the_same_place_and_can_be_gone_on_from_twice():
    model = random_model()
    idx = pad_batch([bytes(range(200))])
    state = None
    whole = read_prompt(model, idx)
    for piece in (idx[:, :1], idx[:, 1:90], idx[:, 90:]):
        place = logits, state = read_prompt(model, piece, state)
    assert mx.max(mx.abs(logits - whole[0])).item() < 2e-5 * mx.max(mx.abs(whole[0])).item()

    def bytes_from(place, n=10):
        going = stream(Decoding(model, GREEDY, KEY), *place, idx)
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
    going = stream(Decoding(model, s, KEY), *read_prompt(model, seen), seen, [b"", b"given"])
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
        stop = StopMatcher(stops, text[:new])
        shown = b""
        at = new
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


def test_stop_strings_of_the_user_end_the_text_before_them(counting_run, output):
    assert output(counting_run, "--prompt", "a", "--stop", "xyz", "--stop", "hij") == b"abcdefg\n"
    assert (
        output(counting_run, "--prompt", "a", "--stop", "no", "--max-new-tokens", 12)
        == b"abcdefghijklm\n"
    )
    assert (
        output(counting_run, "--prompt", "a", "--stop", "no", "--max-new-tokens", 13)
        == b"abcdefghijklmn\n"
    )
    assert (
        output(counting_run, "--prompt", "a", "--stop", "no", "--max-new-tokens", 14)
        == b"abcdefghijklm\n"
    )
    with pytest.raises(UserError, match="--stop is empty"):
        generate.main([str(counting_run), "--prompt", "a", "--stop", ""])


def test_utf8_is_always_valid_text(random_run):
    model, s = bdh_mlx.load_model(random_run), Sampling(utf8=True)
    prompts = [b"a", b"caf\xc3", b"\xf0\x9f", b"\xff\xfe", "日本".encode()] * 4
    for row, written, _ in generate_batch(Decoding(model, s, KEY, [], 50), prompts):
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
