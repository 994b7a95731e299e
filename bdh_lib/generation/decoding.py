"""Text that a model reads and goes on with: the loop, stop strings, batches, what is shown.

    logits, state = read_prompt(model, idx)
    for token, state in stream(model, logits, state, sampling, key, idx): ...

A State is never changed: what was read once can be gone on from several times.
"""

import codecs
import sys
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile

import mlx.core as mx
import numpy as np

from bdh_lib.compute.state import State, prefetch_one, prefill
from bdh_lib.compute.state import read as read_on
from bdh_lib.errors import UserError, escape_controls
from bdh_lib.generation.sampling import NONE, Sampling, append_token, uniforms


def pad_batch(texts: Sequence[bytes]) -> np.ndarray:
    """Texts as one array (B, T) of bytes, NONE after the end of those that are shorter."""
    idx = np.full((len(texts), max(map(len, texts))), NONE, np.int32)
    for row, text in zip(idx, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return idx


def read_prompt(
    model, idx: np.ndarray | mx.array, state: State | None = None
) -> tuple[mx.array, State]:
    """Read the prompt idx (B, T >= 1) on from `state`: logits (B, V) of the next byte, the State.

    Raises UserError for an empty prompt, and where the model's numbers are not finite.
    """
    logits, state = prefill(model, idx, state)
    if not mx.isfinite(logits).all().item():
        raise UserError("the model's numbers are not finite: its training diverged")
    return logits, state


def stream(
    model,
    logits: mx.array,
    state: State,
    sampling: Sampling,
    key: mx.array,
    seen: np.ndarray,
    forced: Sequence[bytes] = (),
) -> Iterator[tuple[list[int], State]]:
    """Endlessly the next byte of each row and the state after it, each at the same cost.

    logits (B, V) and state come from `read_prompt`; `seen` (B, T) are the bytes before, as far as
    they are known. A row first takes its bytes in `forced`; the rest are sampled.
    """
    forced = pad_batch(forced).T if forced else ()  # (T, B)

    def steps(logits, state, past):
        for i, number in enumerate(uniforms(key, len(logits))):
            token = sampling.draw(logits, past, number)
            if i < len(forced):
                own = mx.array(forced[i])
                token = mx.where(own == NONE, token, own.astype(token.dtype))  # not to int64
            past = append_token(past, token)
            logits, state = read_on(model, token[:, None], state)
            logits = logits[:, -1]
            shown = _for_the_host(token)
            mx.async_eval(shown, logits, past, state)
            yield shown, state

    going = prefetch_one(steps(logits, state, sampling.recent(seen)))
    return (([byte for some in shown for byte in some.tolist()], state) for shown, state in going)


def _for_the_host(token: mx.array) -> list[mx.array]:
    """token (B,) as arrays of up to 8 bytes, which CUDA keeps where the host can read them.

    A larger one would move to memory that both share, and a later write there wait (docs/log.md).
    """
    if token.nbytes <= 8:
        return [token]
    # each cut out before astype, which then makes an array of its own
    return [token[i : i + 8].astype(mx.uint8) for i in range(0, len(token), 8)]


class StopMatcher:
    """Lets bytes through up to the first stop string, which may begin in the `context` of them.

    What may be the beginning of a stop string is held back until it is one or is not.
    """

    def __init__(self, stops: Sequence[bytes], context: bytes = b""):
        self.stops, self.matched = stops, False
        self.lookback = max(map(len, stops), default=1) - 1
        self.context, self.pending = context[max(0, len(context) - self.lookback) :], b""

    def feed(self, piece: bytes) -> bytes:
        """The bytes that are now certain to be shown; after a stop string is `matched`, none."""
        if self.matched:
            return b""
        text, new = self.context + self.pending + piece, len(self.context)
        ends = [
            (at + len(stop), at)
            for stop in self.stops
            if (at := text.find(stop, max(0, new - len(stop) + 1))) >= 0
        ]
        if ends:
            self.matched, self.pending = True, b""
            return text[new : min(ends)[1]]
        lengths = range(min(self.lookback, len(text)), 0, -1)
        partial = (n for n in lengths if any(s.startswith(text[-n:]) for s in self.stops))
        cut = max(new, len(text) - next(partial, 0))
        self.pending, self.context = text[cut:], text[max(0, cut - self.lookback) : cut]
        return text[new:cut]

    def end(self) -> bytes:
        """What is still held back, when no more bytes come."""
        pending, self.pending = self.pending, b""
        return pending


def generate_batch(
    model,
    prompts: Sequence[bytes],
    sampling: Sampling,
    key: mx.array,
    stops: Sequence[bytes],
    budget: int,
    state: State | None = None,
) -> Iterator[tuple[int, bytes, bool]]:
    """Of a batch of prompts, each at least a byte: (row, what the model writes, whether a stop
    string ended it), as the rows end; `budget` is the most bytes of a row, `state` what was read
    before all of them.

    What all begin with is read once. Then all read as far as the shortest goes, and the longer ones
    go on reading while the others write: exact, and fast for prompts of similar length.
    """
    shortest = min(map(len, prompts))
    idx = pad_batch(prompts)[:, :shortest]
    alike = np.append((idx == idx[0]).all(0), False)
    shared = int(alike.argmin())  # bytes that all begin with
    if shared:
        logits, state = read_prompt(model, idx[:1, :shared], state)
    if shared < shortest:
        logits, state = read_prompt(model, idx[:, shared:], state)
    logits = mx.broadcast_to(logits, (len(idx), logits.shape[-1]))
    forced = [prompt[shortest:] for prompt in prompts]
    going = {row: (StopMatcher(stops, prompt), bytearray()) for row, prompt in enumerate(prompts)}
    for i, (tokens, _) in enumerate(stream(model, logits, state, sampling, key, idx, forced), 1):
        for row, (stop, text) in list(going.items()):
            own = i - len(forced[row])  # bytes of this row that were drawn
            if own > 0:
                text += stop.feed(bytes([tokens[row]]))
            if stop.matched or own == budget:
                yield row, bytes(text + stop.end()), stop.matched
                del going[row]
        if not going:
            return


def complete_prompts(model, prompts: Sequence[str], n_bytes: int, seed: int, stop) -> Iterator[str]:
    """What the model says to the prompts; the same seed, the same draws. It ends once a signal has
    come to `stop`.
    """
    sampling = Sampling(temperature=0.8, top_k=50)
    for prompt, key in zip(prompts, mx.random.split(mx.random.key(seed), 9), strict=False):
        idx = pad_batch([prompt.encode()])
        written = stream(model, *read_prompt(model, idx), sampling, key, idx)
        drawn = takewhile(lambda _: not stop.requested, islice(written, n_bytes))
        text = decode_text(prompt.encode() + bytes(token for (token,), _ in drawn))
        if stop.requested:
            break
        yield escape_controls(text)
    model.decode_step = None  # the weights in the order of a step: they are about to change


def context_length_warning(
    model, window: int | None, length: int, loaded: bool = False
) -> str | None:
    """A note where a text of `length` bytes outgrows the blocks that the model was trained on."""
    trained = model.trained_length
    if not trained or length <= trained or window:
        return None
    way = f"--window {trained} forgets older bytes (docs/generating.md)"
    if loaded:
        way = f"a state read anew with --window {trained} forgets older bytes (docs/generating.md)"
    return (
        f"note: a text of up to {length:,} bytes, and the model was trained on blocks of "
        f"{trained:,}: what it writes gets worse past them. {way}"
    )


def decode_text(written: bytes, whole: bool = False) -> str:
    """Bytes as text, those that are no UTF-8 as \\xff; `whole`: without a character cut short."""
    return codecs.getincrementaldecoder("utf-8")("backslashreplace").decode(written, not whole)


def parse_escapes(text: str) -> bytes:
    """An argument's bytes, its \\n as line breaks; what is no UTF-8 comes through as it is."""
    return text.replace("\\n", "\n").encode(errors="surrogateescape")


class Terminal:
    """Shows bytes as they come: characters once complete, broken UTF-8 and controls escaped."""

    def __init__(self, raw: bool = False):
        self.raw = raw
        self.decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, piece: bytes, final: bool = False) -> None:
        """Show `piece`; `final`: and what there is of a character cut short."""
        if self.raw:
            sys.stdout.buffer.write(piece)
        else:
            sys.stdout.write(escape_controls(self.decoder.decode(piece, final)))
        sys.stdout.flush()
