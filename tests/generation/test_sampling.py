"""Each filter of a draw against a distribution worked out by hand, and UTF-8 byte by byte."""

import math
import re
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest

from bdh_lib.generation import sampling
from bdh_lib.generation.sampling import LEGAL, NEXT, Sampling, append_token, uniforms
from bdh_mlx import UserError

P = [0.5, 0.25, 0.15, 0.1]  # of bytes 3, 0, 2, 1, so that the order is not that of the bytes
BYTES = [3, 0, 2, 1]
DRAWS = 40_000
HALF = mx.array([[0.5]])
NEAR = 0.0125  # 5 standard deviations of a frequency over DRAWS: at most 5 * 0.5 / 200


def frequencies(s, seen=()):
    """How often each byte of P is drawn, in the order of BYTES."""
    logits = np.zeros(4)
    logits[BYTES] = np.log(P)
    logits = mx.array(np.tile(logits, (DRAWS, 1)).astype(np.float32))
    idx = np.tile(np.array(seen, np.int32), (DRAWS, 1))
    token = s.draw(logits, s.recent(idx), next(uniforms(mx.random.key(7), DRAWS)))
    return np.bincount(np.array(token), minlength=4)[BYTES] / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 1e-6}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 1000}, P),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 1e-46}, [1, 0, 0, 0]),  # 0 in float32
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"top_p": 1}, P),
        ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),  # at least 0.125
        ({"min_p": 0}, P),
        ({"min_p": 1}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),  # 5/9 + 2.5/9 = 0.83 of what is left
        ({"temperature": 0.5, "top_p": 0.8}, [0.8, 0.2, 0, 0]),  # 0.725, 0.181
    ],
)
def test_a_filter_leaves_the_bytes_and_frequencies_of_its_definition(settings, expected):
    found = frequencies(Sampling(**settings))
    assert [f > 0 for f in found] == [e > 0 for e in expected]  # the support is exact
    assert np.abs(found - expected).max() < NEAR


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    # all logits of P are negative: log 0.5 * 2 = log 0.25, and log 0.1 * 2 = log 0.01
    assert (
        np.abs(
            frequencies(Sampling(repetition_penalty=2.0), seen=[3, 1, 3])
            - (np.array([0.25, 0.25, 0.15, 0.01]) / 0.66)
        ).max()
        < NEAR
    )
    logits = mx.array([[2.0, 1.9, -1.0]])
    s = Sampling(repetition_penalty=1.1, temperature=0)
    past = s.recent(np.array([[0]]))
    token = s.draw(logits, past, HALF)
    assert token.item() == 1  # 2 / 1.1 < 1.9
    token = s.draw(logits, append_token(past, token), HALF)
    assert token.item() == 0  # both are seen now


def test_the_penalty_forgets_what_is_older_than_its_window_and_each_row_has_its_own():
    logits, s = (
        mx.array([[2.0, 1.9] + [0.0] * 6] * 2),
        Sampling(repetition_penalty=1.1, temperature=0),
    )
    filler = [7] * (sampling.PENALTY_WINDOW - 1)
    past = s.recent(np.array([[0, *filler], [7, *filler]]))
    assert s.draw(logits, past, HALF).tolist() == [1, 0]
    past = append_token(past, mx.array([7, 7]))
    assert s.draw(logits, past, HALF).tolist() == [0, 0]


def test_the_same_key_draws_the_same_bytes():
    logits = mx.random.normal((8, 256), key=mx.random.key(1))

    def draws(seed):
        s, own = Sampling(top_k=50, top_p=0.9), uniforms(mx.random.key(seed), 8)
        return [s.draw(logits, None, number).tolist() for number in islice(own, 100)]

    assert draws(1) == draws(1) != draws(2)
    assert len({tuple(row) for row in draws(1)}) == 100  # each byte has numbers of its own


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", v) for v in (-1, 1e-9, math.inf, math.nan)]
    + [("top_k", 0), ("top_k", -5), ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan)]
    + [("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", math.inf)]
    + [("top_k", 2.5), ("top_k", True), ("top_k", 10**20), ("repetition_penalty", 1e300)],
)
def test_an_impossible_setting_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {re.escape(str(value))}; it must be"):
        Sampling(**{name: value})


# ------------------------------------------------------------------------------------------ UTF-8


def completes(text):
    """Whether text is valid UTF-8, or is with one more tail of continuation bytes."""
    tails = [b"", *(bytes([t]) + b"\x80" * i for t in (0x80, 0x90) for i in range(3)), b"\xa0\x80"]
    for tail in tails:
        try:
            return bool((text + tail).decode()) or True
        except UnicodeDecodeError:
            pass
    return False


def test_the_automaton_allows_the_beginnings_of_all_characters_and_no_others():
    good = set()
    for code in [*range(0x80), *range(0x80, 0x110000, 0x40)]:
        for near in (code, code | 0x3F):  # the first and the last of 64 that share their beginning
            if not 0xD800 <= near < 0xE000:
                encoded = chr(near).encode()
                good.update(encoded[:i] for i in range(1, len(encoded) + 1))

    def visit(begun, state):
        last = begun[:1] >= b"\xc0" and NEXT[state, 0x80] == 0  # in the last byte only the limits
        for byte in (0x00, 0x7F, 0x80, 0xBF, 0xC0, 0xFF) if last else range(256):
            grown = begun + bytes([byte])
            assert (grown in good) == LEGAL[state, byte], grown
            if grown in good and NEXT[state, byte]:
                visit(grown, NEXT[state, byte])

    visit(b"", 0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 3}, {"min_p": 0.5}])
def test_random_logits_give_valid_text_with_utf8_and_rows_do_not_mix(settings):
    s = Sampling(utf8=True, **settings)
    B = 16
    past = s.recent(np.full((B, 3), 65))
    rows = []
    for i, number in enumerate(islice(uniforms(mx.random.key(3), B), 60)):
        logits = 3 * mx.random.normal((B, 256), key=mx.random.key(i))
        token = s.draw(logits, past, number)
        past = append_token(past, token)
        rows.append(token.tolist())
    for row in zip(*rows, strict=True):
        assert completes(bytes(row))


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        *((b"a", b""), (b"\xc3", b"\xc3"), (b"a\xe2", b"\xe2"), (b"\xe2\x82", b"\xe2\x82")),
        *((b"\xf0\x9f\x98", b"\xf0\x9f\x98"), (b"\xff", b""), (b"\xe2A", b"")),
        (b"a\x80\xed", b"\xed"),
    ],
)
def test_the_first_byte_goes_on_with_the_character_that_the_prompt_began(prompt, begun):
    s = Sampling(utf8=True)
    for number in islice(uniforms(mx.random.key(0), 1), 30):
        token = s.draw(mx.zeros((1, 256)), s.recent(np.array([list(prompt)])), number)
        assert completes(begun + bytes(token.tolist()))


def test_utf8_needs_bytes():
    with pytest.raises(UserError, match="vocabulary of 256"):
        Sampling(utf8=True).draw(mx.zeros((1, 5)), None, HALF)


def test_a_draw_is_the_first_byte_up_to_which_the_probabilities_exceed_the_number():
    logits = mx.log(mx.array([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]] * 6))
    number = mx.array([[0.0], [0.2499], [0.25], [0.7499], [0.75], [1 - 2**-22]])
    assert Sampling().draw(logits, None, number).tolist() == [1, 1, 3, 3, 4, 4]
