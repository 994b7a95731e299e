"""Generation: the decoding loop, stop strings, batches and terminal output.

    decoding = Decoding(model, Sampling(temperature=0.8), key)
    logits, state = read_prompt(model, idx)
    for token, state in stream(decoding, logits, state, idx): ...

A State is immutable, so several streams can start from one prompt.
"""

import codecs
import sys
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_lib.compute.device import on_cuda, on_gpu
from bdh_lib.compute.state import State, prefill, read_unchecked
from bdh_lib.data.formats import MAX_NEW_TOKENS
from bdh_lib.errors import UserError, escape_controls
from bdh_lib.generation.sampling import PAD, Sampling, append_token, uniforms
from bdh_lib.progress import Progress
from bdh_mlx import BDH

STEPS_PER_SUBMISSION = 16  # of one row, to a CUDA GPU (docs/log.md)


class Decoding(NamedTuple):
    """A model, and how it writes: the same for all texts of a command."""

    model: BDH
    sampling: Sampling
    key: mx.array  # of the draws
    stops: Sequence[bytes] = ()  # strings before which a text ends
    max_new_tokens: int = MAX_NEW_TOKENS  # bytes of a text at most
    start: State = State()  # before each prompt


def pad_batch(texts: Sequence[bytes]) -> np.ndarray:
    """Pack texts into one array (B, T) of bytes, padded with PAD at the end."""
    idx = np.full((len(texts), max(map(len, texts))), PAD, np.int32)
    for row, text in zip(idx, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return idx


def read_prompt(
    model, idx: np.ndarray | mx.array, state: State | None = None
) -> tuple[mx.array, State]:
    """Read the prompt idx (B, T >= 1); return the next byte's logits (B, V) and the new State.

    A long prompt shows on stderr how much is read. Raises UserError for an empty prompt, and if the
    logits are not finite.
    """
    with Progress("reading the prompt", idx.size, "bytes", file=sys.stderr) as progress:
        logits, state = prefill(model, idx, state, progress.update)
    if not mx.isfinite(logits).all().item():
        raise UserError("the model's numbers are not finite: its training diverged")
    return logits, state


def stream(
    decoding: Decoding,
    logits: mx.array,
    state: State,
    seen: np.ndarray,
    forced: Sequence[bytes] = (),
) -> Iterator[tuple[list[int], State]]:
    """Yield the next byte of each row and the state after it, without end, at constant cost.

    Of `decoding` only model, sampling and key act. logits (B, V) and state come from `read_prompt`;
    seen (B, T) are the previous bytes, which some filters need. Each row first takes its `forced`
    bytes, then drawn ones.
    """
    model, sampling = decoding.model, decoding.sampling
    forced = pad_batch(forced).T if forced else ()  # (T, B)

    def steps(logits, state, recent):
        for i, u in enumerate(uniforms(decoding.key, len(logits))):
            token = sampling.draw(logits, recent, u)
            if i < len(forced):
                forced_i = mx.array(forced[i])
                # of one type, or a compiled step would be traced anew
                token = mx.where(forced_i == PAD, token, forced_i.astype(token.dtype))
            recent = append_token(recent, token)
            logits, state = read_unchecked(model, token[:, None], state)
            logits = logits[:, -1]
            yield _host_arrays(token), state, (logits, recent)

    n_steps = STEPS_PER_SUBMISSION if len(logits) == 1 and on_cuda() else 1
    for group in _prefetch_one(_submit(steps(logits, state, sampling.recent(seen)), n_steps)):
        for tokens, state, _ in group:
            yield [byte for a in tokens for byte in a.tolist()], state


def _prefetch_one(steps: Iterator) -> Iterator:
    """Yield the items of an endless stream, one ahead on a GPU.

    There the next step is submitted before an item is yielded: the GPU computes it while the host
    reads the item.
    """
    if not on_gpu():
        return (yield from steps)
    previous = next(steps)
    for step in steps:
        yield previous
        previous = step


def _submit(steps: Iterator, n: int) -> Iterator[list]:
    """Group an endless stream of (tokens, state, rest) by n; submit a group at once."""
    while True:
        group = list(islice(steps, n))
        mx.async_eval([tokens for tokens, *_ in group], group[-1])  # which needs all before it
        yield group


def _host_arrays(token: mx.array) -> list[mx.array]:
    """Split token (B,) into arrays of up to 8 bytes, which CUDA keeps where the host can read.

    A larger array would move to managed memory, where a later write has to wait (docs/log.md).
    """
    if token.nbytes <= 8:
        return [token]
    # slices come first: astype then makes a new array of each
    return [token[i : i + 8].astype(mx.uint8) for i in range(0, len(token), 8)]


class StopMatcher:
    """Passes bytes up to the first stop string, which may begin in the `context`.

    Bytes that may begin a stop string stay `pending` until the next bytes decide.
    """

    def __init__(self, stops: Sequence[bytes], context: bytes = b""):
        self.stops = stops
        self.matched = False
        self.lookback = max(map(len, stops), default=1) - 1
        self.context = context[max(0, len(context) - self.lookback) :]
        self.pending = b""

    def feed(self, piece: bytes) -> bytes:
        """Return the bytes that certainly precede a stop string; none once one is `matched`."""
        if self.matched:
            return b""
        text = self.context + self.pending + piece
        new = len(self.context)
        ends = [
            (begin + len(stop), begin)
            for stop in self.stops
            if (begin := text.find(stop, max(0, new - len(stop) + 1))) >= 0
        ]
        if ends:
            self.matched = True
            self.pending = b""
            return text[new : min(ends)[1]]
        lengths = range(min(self.lookback, len(text)), 0, -1)
        partial = (n for n in lengths if any(s.startswith(text[-n:]) for s in self.stops))
        cut = max(new, len(text) - next(partial, 0))
        self.pending = text[cut:]
        self.context = text[max(0, cut - self.lookback) : cut]
        return text[new:cut]

    def end(self) -> bytes:
        """Return the pending bytes, at the end of the input."""
        pending = self.pending
        self.pending = b""
        return pending


def generate_batch(
    decoding: Decoding, prompts: Sequence[bytes], stop=None
) -> Iterator[tuple[int, bytes, bool]]:
    """Yield row, completion and whether a stop string ended it, for each prompt as it ends.

    Each prompt has at least a byte. The iterator ends once `stop`, a StopSignal, has received one.
    The common prefix is read once, then all prompts up to the length of the shortest. The rest of
    the longer ones is forced while shorter rows generate: exact, and fast for similar lengths.
    """
    shortest = min(map(len, prompts))
    idx = pad_batch(prompts)[:, :shortest]
    logits, state = _read_batch(decoding.model, idx, decoding.start)
    forced = [prompt[shortest:] for prompt in prompts]
    active = {
        row: (StopMatcher(decoding.stops, prompt), bytearray())
        for row, prompt in enumerate(prompts)
    }
    steps = stream(decoding, logits, state, idx, forced)
    n_steps = max(map(len, forced)) + decoding.max_new_tokens
    with Progress("writing a batch", n_steps, "bytes each", file=sys.stderr) as progress:
        for i, (tokens, _) in enumerate(steps, 1):
            for row, (matcher, text) in list(active.items()):
                n_drawn = i - len(forced[row])
                if n_drawn > 0:
                    text += matcher.feed(bytes([tokens[row]]))
                if matcher.matched or n_drawn == decoding.max_new_tokens:
                    yield row, bytes(text + matcher.end()), matcher.matched
                    del active[row]
            progress.update()
            if not active or (stop and stop.requested):
                return


def _read_batch(model: BDH, idx: np.ndarray, state: State) -> tuple[mx.array, State]:
    """Read idx (B, T), the common prefix of its rows once; return logits (B, V) and the State."""
    B, T = idx.shape
    shared = int(np.append((idx == idx[0]).all(0), False).argmin())  # length of the common prefix
    if shared:
        logits, state = read_prompt(model, idx[:1, :shared], state)
    if shared < T:
        logits, state = read_prompt(model, idx[:, shared:], state)
    return mx.broadcast_to(logits, (B, logits.shape[-1])), state


def complete_prompts(decoding: Decoding, prompts: Sequence[str], stop) -> Iterator[str]:
    """Yield the text of each prompt with its completion; the same key gives the same draws.

    The iterator ends once `stop` has received a signal.
    """
    model = decoding.model
    keys = mx.random.split(decoding.key, len(prompts))
    for prompt, key in zip(prompts, keys, strict=True):
        idx = pad_batch([prompt.encode()])
        prefilled = read_prompt(model, idx, decoding.start)
        tokens = stream(decoding._replace(key=key), *prefilled, idx)
        drawn = takewhile(lambda _: not stop.requested, islice(tokens, decoding.max_new_tokens))
        text = decode_text(prompt.encode() + bytes(token for (token,), _ in drawn))
        if stop.requested:
            break
        yield escape_controls(text)
    model.decode_step = None  # free its copy of the weights: training will change them


def context_length_warning(
    model, window: int | None, length: int, loaded: bool = False
) -> str | None:
    """Return a note if a text of `length` bytes is longer than the training blocks, else None."""
    trained = model.trained_length
    if not trained or length <= trained or window:
        return None
    fix = f"--window {trained} forgets older bytes (docs/generating.md)"
    fix = f"a state read anew with {fix}" if loaded else fix
    return (
        f"note: a text of up to {length:,} bytes, and the model was trained on blocks of "
        f"{trained:,}: what it writes gets worse past them. {fix}"
    )


def decode_text(data: bytes, whole: bool = False) -> str:
    """Decode bytes; invalid UTF-8 becomes \\xff. `whole` omits an incomplete last character."""
    return codecs.getincrementaldecoder("utf-8")("backslashreplace").decode(data, not whole)


def parse_escapes(text: str) -> bytes:
    """Return the bytes of an argument, with \\n as a line break; invalid UTF-8 is unchanged."""
    return text.replace("\\n", "\n").encode(errors="surrogateescape")


class Terminal:
    """Prints complete characters as their bytes come, and escapes unsafe ones."""

    def __init__(self, raw: bool = False):
        self.raw = raw
        self.decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, piece: bytes, final: bool = False) -> None:
        """Print `piece`; `final` also prints an incomplete last character."""
        if self.raw:
            sys.stdout.buffer.write(piece)
        else:
            sys.stdout.write(escape_controls(self.decoder.decode(piece, final)))
        sys.stdout.flush()
