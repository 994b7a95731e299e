"""Sampling of the next byte from its logits: temperature and filters.

Some filters depend on the previous bytes: `recent` holds the last ones of each row of a batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from bdh_lib.errors import UserError
from bdh_lib.rules import TEMPERATURE, TOP_K, check, number

PENALTY_WINDOW = 256  # bytes that the repetition penalty covers
PAD = -1  # in `recent` and padded batches: no byte
DRAWS_PER_CALL = 64  # random numbers of a row
LIMITS = {
    "repetition_penalty": number("from 0.000001 to 1,000,000; 1: none", lambda x: 1e-6 <= x <= 1e6),
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "top_p": number("above 0 and at most 1", lambda x: 0 < x <= 1, allow_none=True),
    "min_p": number("from 0 to 1", lambda x: 0 <= x <= 1, allow_none=True),
}
MIN_TOP_P = 2.0**-126  # a smaller number is 0 in float32


@dataclass(frozen=True)
class Sampling:
    """How a byte is drawn: settings in the order in which they act. Raises UserError.

    Each filter sees the renormalized probabilities that the filters before it left.
    """

    utf8: bool = False  # only bytes that continue valid UTF-8
    repetition_penalty: float = 1.0  # of recent bytes: logits > 0 by it, < 0 times it
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
        """Return the last PENALTY_WINDOW bytes of seen (B, T), padded; None if unused."""
        if not self.utf8 and self.repetition_penalty == 1:
            return None
        seen = seen[:, -PENALTY_WINDOW:]
        padding = ((0, 0), (PENALTY_WINDOW - seen.shape[1], 0))
        return mx.array(np.pad(seen, padding, constant_values=PAD), mx.int32)

    def draw(self, logits: mx.array, recent: mx.array | None, u: mx.array) -> mx.array:
        """Draw a byte (B,) for the logits (B, V), by u (B, 1) from `uniforms`.

        `recent` is that of the method of this name. Raises UserError if utf8 is set and V is
        not 256.
        """
        if self.utf8 and logits.shape[-1] != 256:
            raise UserError(f"utf8 needs a vocabulary of 256 bytes; this one has {logits.shape[1]}")
        return _compiled(self)(logits, recent, u)


def uniforms(key: mx.array, B: int) -> Iterator[mx.array]:
    """Yield random numbers u (B, 1) without end; DRAWS_PER_CALL at a time, as a GPU's calls cost.

    u is so far below 1 that the rounded product u * p is always less than p.
    """
    while True:
        key, draw_key = mx.random.split(key)
        shape = (DRAWS_PER_CALL, B, 1)
        yield from mx.random.uniform(high=1 - 2**-22, shape=shape, key=draw_key)


def append_token(recent: mx.array | None, token: mx.array) -> mx.array | None:
    """Append the token (B,) to each row of `recent`, and drop the oldest."""
    if recent is not None:
        return mx.concatenate([recent[:, 1:], token[:, None].astype(mx.int32)], 1)


# ------------------------------------------------------------------------------------- the filters


@lru_cache(maxsize=8)
def _compiled(s: Sampling):
    return mx.compile(partial(_draw, s))


def _draw(s: Sampling, logits, recent, u):
    logits = logits.astype(mx.float32)
    if s.utf8:
        logits = mx.where(mx.array(LEGAL)[_utf8_state(recent)], logits, -math.inf)
    if s.repetition_penalty != 1:
        logits = _penalised(logits, recent, s.repetition_penalty)
    if s.temperature == 0:
        return mx.argmax(logits, -1)
    return _filtered(s, logits / s.temperature, u)


def _utf8_state(recent):
    """Return the UTF-8 automaton's state (B,) after 3 bytes, the most before a last byte."""
    following = mx.array(NEXT)
    first, second, third = recent[:, -3:].T % 256  # PAD becomes 255, which begins no character
    return following[following[following[0][first], second], third]


def _penalised(logits, recent, penalty):
    B, V = logits.shape
    seen = mx.put_along_axis(mx.zeros((B, V + 1), mx.bool_), recent % (V + 1), mx.array(True), 1)
    seen = seen[:, :V]  # PAD is the last column
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(s: Sampling, logits, u):
    """Draw (B,) from softmax(logits) after top-k, top-p and min-p, in order of probability."""
    if s.top_k is s.top_p is s.min_p is None:
        return _choice(logits, u)
    order = mx.argsort(-logits, -1)
    logits = mx.take_along_axis(logits, order, -1)
    if s.top_k is not None and s.top_k < logits.shape[-1]:
        logits = mx.where(mx.arange(logits.shape[-1]) < s.top_k, logits, -math.inf)
    if s.top_p is not None and s.top_p < 1:
        p = mx.softmax(logits, -1)
        likelier = mx.cumsum(p, -1) - p  # probability of the bytes before this one
        logits = mx.where(likelier < max(s.top_p, MIN_TOP_P), logits, -math.inf)
    if s.min_p:
        logits = mx.where(logits >= logits[:, :1] + math.log(s.min_p), logits, -math.inf)
    choice = _choice(logits, u)
    return mx.take_along_axis(order, choice[:, None], -1)[:, 0]


def _choice(logits, u):
    """Draw indices (B,) from softmax(logits) (B, V), by random numbers u (B, 1) below 1.

    Each is the first index where the cumulative probability exceeds u times the total.
    Probabilities are integers in units of 2^-30, so the sums are exact: CUDA does not add in order,
    and its rounded sums could first exceed the threshold at an index of probability 0.
    """
    cumulative = mx.cumsum((mx.softmax(logits, -1) * 2**30).astype(mx.uint32), -1)
    threshold = (u * cumulative[:, -1:].astype(mx.float32)).astype(mx.uint32)
    return (cumulative <= threshold).sum(-1)


# ----------------------------------------------------------------------------------------- UTF-8

# RFC 3629. State 0 is between characters; 1, 2, 3 expect that many continuation bytes; 4 to 7 come
# after a byte that limits the next: E0 (no overlong form), ED (no surrogate), F0, F4 (<= 10FFFF).
TRANSITIONS = (  # state, first and last byte, next state
    *((0, 0x00, 0x7F, 0), (0, 0xC2, 0xDF, 1), (0, 0xE1, 0xEF, 2), (0, 0xF1, 0xF3, 3)),
    *((0, 0xE0, 0xE0, 4), (0, 0xED, 0xED, 5), (0, 0xF0, 0xF0, 6), (0, 0xF4, 0xF4, 7)),
    *((1, 0x80, 0xBF, 0), (2, 0x80, 0xBF, 1), (3, 0x80, 0xBF, 2)),
    *((4, 0xA0, 0xBF, 1), (5, 0x80, 0x9F, 1), (6, 0x90, 0xBF, 2), (7, 0x80, 0x8F, 2)),
)


def _automaton() -> tuple[np.ndarray, np.ndarray]:
    """Return whether a byte is legal in a state, and the next state, both (8, 256).

    An illegal byte is read as in state 0.
    """
    legal, following = np.zeros((8, 256), bool), np.zeros((8, 256), np.int32)
    for state, low, high, next_state in TRANSITIONS:
        legal[state, low : high + 1] = True
        following[state, low : high + 1] = next_state
    return legal, np.where(legal, following, following[0])


LEGAL, NEXT = _automaton()
