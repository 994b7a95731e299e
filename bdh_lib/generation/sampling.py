"""How the next byte is drawn from its logits: temperature, and what narrows the choice.

A choice may depend on the bytes before: the last of them, of each row of a batch, are its past.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from bdh_lib.errors import UserError, check, number
from bdh_mlx import TEMPERATURE, TOP_K

WINDOW = 256  # last bytes that the repetition penalty looks at
NONE = -1  # in a past: no byte yet
AT_ONCE = 64  # draws
LIMITS = {
    "repetition_penalty": number("from 0.000001 to 1,000,000; 1: none", lambda x: 1e-6 <= x <= 1e6),
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "top_p": number("above 0 and at most 1", lambda x: 0 < x <= 1, none=True),
    "min_p": number("from 0 to 1", lambda x: 0 <= x <= 1, none=True),
}
LEAST = 2.0**-126  # a smaller share is 0 in float32


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw, in the order in which they act. Raises UserError for an impossible one.

    Each filter sees the probabilities that those before it left, scaled to a sum of 1.
    """

    utf8: bool = False  # only bytes that continue valid UTF-8
    repetition_penalty: float = 1.0  # of bytes in the last WINDOW: logits > 0 by it, < 0 times it
    temperature: float = 1.0  # divides the logits; 0: the likeliest byte
    top_k: int | None = None  # the k likeliest bytes
    top_p: float | None = None  # the fewest likeliest bytes that hold this share of probability
    min_p: float | None = None  # bytes with at least this share of the likeliest one's probability

    def __post_init__(self):
        for name, rule in LIMITS.items():
            check(name, getattr(self, name), rule)
        if not isinstance(self.utf8, bool):
            raise UserError(f"utf8 is {self.utf8!r}; it must be True or False")

    def recent(self, seen: np.ndarray) -> mx.array | None:
        """What a draw must know of the bytes seen (B, T): the last (B, WINDOW), or nothing."""
        if not self.utf8 and self.repetition_penalty == 1:
            return None
        seen = seen[:, -WINDOW:]
        lacking = ((0, 0), (WINDOW - seen.shape[1], 0))
        return mx.array(np.pad(seen, lacking, constant_values=NONE), mx.int32)

    def draw(self, logits: mx.array, past: mx.array | None, number: mx.array) -> mx.array:
        """One byte (B,) for each row of logits (B, V), by a random number (B, 1) of `uniforms`."""
        if self.utf8 and logits.shape[-1] != 256:
            raise UserError(f"utf8 needs a vocabulary of 256 bytes; this one has {logits.shape[1]}")
        return _compiled(self)(logits, past, number)


def uniforms(key: mx.array, B: int) -> Iterator[mx.array]:
    """Endlessly B random numbers (B, 1), drawn for many bytes at once: on a GPU each call costs.

    All are so far below 1 that a product with them, rounded, is less than the other factor.
    """
    while True:
        key, own = mx.random.split(key)
        yield from mx.random.uniform(high=1 - 2**-22, shape=(AT_ONCE, B, 1), key=own)


def append_token(past: mx.array | None, token: mx.array) -> mx.array | None:
    """The past with one byte more in each row."""
    if past is not None:
        return mx.concatenate([past[:, 1:], token[:, None].astype(mx.int32)], 1)


# ------------------------------------------------------------------------------------- the filters


@lru_cache(maxsize=8)
def _compiled(s: Sampling):
    return mx.compile(partial(_draw, s))


def _draw(s: Sampling, logits, past, number):
    logits = logits.astype(mx.float32)
    if s.utf8:
        logits = mx.where(mx.array(LEGAL)[_utf8_state(past)], logits, -math.inf)
    if s.repetition_penalty != 1:
        logits = _penalised(logits, past, s.repetition_penalty)
    if s.temperature == 0:
        return mx.argmax(logits, -1)
    return _filtered(s, logits / s.temperature, number)


def _utf8_state(past):
    """The state of the UTF-8 automaton (B,): of a character that is not whole, at most 3 bytes."""
    following = mx.array(NEXT)
    first, second, third = past[:, -3:].T % 256  # NONE begins no character, as the byte 255
    return following[following[following[0][first], second], third]


def _penalised(logits, past, penalty):
    B, V = logits.shape
    seen = mx.put_along_axis(mx.zeros((B, V + 1), mx.bool_), past % (V + 1), mx.array(True), 1)
    seen = seen[:, :V]  # NONE is the last column
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(s: Sampling, logits, number):
    """A draw from softmax(logits) after top-k, top-p and min-p, in the order of probability."""
    if s.top_k is s.top_p is s.min_p is None:
        return _choice(logits, number)
    order = mx.argsort(-logits, -1)
    logits = mx.take_along_axis(logits, order, -1)
    if s.top_k is not None and s.top_k < logits.shape[-1]:
        logits = mx.where(mx.arange(logits.shape[-1]) < s.top_k, logits, -math.inf)
    if s.top_p is not None and s.top_p < 1:
        p = mx.softmax(logits, -1)
        likelier = mx.cumsum(p, -1) - p  # probability of the bytes before this one
        logits = mx.where(likelier < max(s.top_p, LEAST), logits, -math.inf)
    if s.min_p:
        logits = mx.where(logits >= logits[:, :1] + math.log(s.min_p), logits, -math.inf)
    choice = _choice(logits, number)
    return mx.take_along_axis(order, choice[:, None], -1)[:, 0]


def _choice(logits, number):
    """A draw (B,) from softmax(logits), by `number` (B, 1) below 1: the first place where the
    probabilities add up to more than that share of them all.

    They are added as whole 2^-30, so exactly: CUDA does not add one after the other, and its
    rounded sums would now and then exceed the share at a place of probability 0.
    """
    up_to = mx.cumsum((mx.softmax(logits, -1) * 2**30).astype(mx.uint32), -1)
    share = (number * up_to[:, -1:].astype(mx.float32)).astype(mx.uint32)
    return (up_to <= share).sum(-1)


# ----------------------------------------------------------------------------------------- UTF-8

# RFC 3629: states 0 between characters; 1, 2, 3 so many continuation bytes to come; 4 to 7 after a
# first byte that narrows the second: E0 (no overlong form), ED (no surrogate), F0, F4 (<= 10FFFF).
STEPS = (  # state, first and last byte, next state
    *((0, 0x00, 0x7F, 0), (0, 0xC2, 0xDF, 1), (0, 0xE1, 0xEF, 2), (0, 0xF1, 0xF3, 3)),
    *((0, 0xE0, 0xE0, 4), (0, 0xED, 0xED, 5), (0, 0xF0, 0xF0, 6), (0, 0xF4, 0xF4, 7)),
    *((1, 0x80, 0xBF, 0), (2, 0x80, 0xBF, 1), (3, 0x80, 0xBF, 2)),
    *((4, 0xA0, 0xBF, 1), (5, 0x80, 0x9F, 1), (6, 0x90, 0xBF, 2), (7, 0x80, 0x8F, 2)),
)


def _automaton() -> tuple[np.ndarray, np.ndarray]:
    """Whether a byte may follow in a state, and the state after it (8, 256); a byte that may not
    is taken as the start of something new."""
    legal, following = np.zeros((8, 256), bool), np.zeros((8, 256), np.int32)
    for state, low, high, after_it in STEPS:
        legal[state, low : high + 1] = True
        following[state, low : high + 1] = after_it
    return legal, np.where(legal, following, following[0])


LEGAL, NEXT = _automaton()
