"""A session at the terminal: what is typed goes to the model in the format of its training mode.

The model keeps its state between turns: each follows all earlier ones, as records do in training.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx

from bdh_lib.data import formats
from bdh_lib.errors import UserError, escape_controls
from bdh_lib.files import atomic_writer, expand_user
from bdh_lib.generation.decoding import (
    Decoding,
    StopMatcher,
    Terminal,
    context_length_warning,
    pad_batch,
    read_prompt,
    stream,
)
from bdh_lib.generation.state_files import save_state
from bdh_lib.progress import Progress

PIECE = 256  # bytes of a prompt that are read at once
END_OF_RECORD = f"{formats.STOP}\n".encode()
MAX_OVERLAP = 64  # bytes: longer than all that ends a record or begins a turn
HISTORY = Path(os.path.expanduser("~/.bdh_history"))  # noqa: PTH111  which raises without a home
NOTES = formats.SAMPLE_NOTES | {  # by mode
    "full": "a line is an instruction, which the model answers",
    None: "no training mode is known: text is read as it is",
}
HELP = '''/system TEXT  system text of the turns to come; without TEXT they have none
/temp 0.7     temperature; 0: the likeliest byte
/reset        forget all that was said, back to the state of --load-state if one was given
/save FILE    all that was said, for --prompt-file; to a .safetensors file the state, --load-state
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer
"""           on a line of its own begins and ends a text of several lines'''


def enable_line_editing() -> bool:
    """Give input() line editing and a history; return whether pasted lines become one input."""
    try:
        import readline
    except ImportError:  # some Pythons have none; input() works without
        return False
    with suppress(OSError):
        readline.read_history_file(HISTORY)
    readline.set_history_length(1000)
    if "libedit" in readline.__doc__:  # a Mac's: each pasted line would be a turn of its own
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True


def save_history() -> None:
    """Write the history where that is possible."""
    with suppress(ImportError, OSError):
        import readline

        os.close(os.open(HISTORY, os.O_CREAT | os.O_WRONLY, 0o600))  # only its owner may read it
        readline.write_history_file(HISTORY)


class QuotedText(str):
    """Lines between triple quotes: text, even where they look like a command."""


def read_input(prompt: str = "> ") -> str:
    """Read a line, or the lines between two lines of triple quotes. Raises EOFError at the end."""
    line = input(prompt)
    if line.strip() != '"""':
        return line
    lines = []
    with suppress(EOFError):  # Ctrl-D ends the text, too
        while (line := input(". ")).strip() != '"""':
            lines.append(line)
    return QuotedText("\n".join(lines))


class Session:
    """Turns with a model of a training mode (None: the input has no format)."""

    def __init__(self, decoding: Decoding, mode: str | None, chats: bool = False):
        """`chats` says whether the model was trained on chats."""
        self.decoding = decoding  # its key changes with each turn
        self.mode = mode
        self.chats = chats and mode == "full"
        self.system = ""  # system text of the turns to come
        self.saved_files = set()
        self.warned = False  # that the text is longer than the blocks of the training
        self.reset()

    def reset(self) -> None:
        """Return to the state before the session."""
        self.state = self.decoding.start
        self.text = bytearray()  # all bytes of the session

    def run(self) -> None:
        """Take turns until Ctrl-D or /quit."""
        pastes_lines = enable_line_editing()
        signal.set_wakeup_fd(-1)  # nothing ends the process: Ctrl-C ends an answer, not the session
        # by an exception, at which input() resets the terminal: else it would still mark pastes
        on_sigterm = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        print(f"note: {NOTES.get(self.mode, NOTES[None])}\n/help lists the commands")
        if not pastes_lines:
            print('several lines, also pasted ones, go between two lines of """')
        try:
            while (line := self.next_line()) is not None:
                is_command = line.startswith("/") and not isinstance(line, QuotedText)
                if is_command and line.split()[0] == "/quit":
                    break
                try:
                    if is_command:
                        name, *argument = line.split(None, 1)
                        self.command(name, *argument or [""])
                    elif line.strip():
                        self.turn(line)
                except UserError as error:
                    print(f"error: {escape_controls(str(error))}")
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
            save_history()

    def next_line(self) -> str | None:
        """Read the next input, or None at the end. Ctrl-C discards the line."""
        while True:
            try:
                return read_input()
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return None

    def command(self, name: str, argument: str) -> None:
        """Run a command such as /save. Raises UserError."""
        if name == "/system":
            if self.mode not in ("both", "full"):
                raise UserError(f"/system: mode {self.mode} reads what is typed and no system text")
            self.system = argument.strip()
            print(f"system text: {escape_controls(self.system) or 'none'}")
        elif name == "/temp":
            try:
                sampling = replace(self.decoding.sampling, temperature=float(argument))
            except (ValueError, UserError) as error:
                reason = error if isinstance(error, UserError) else f"{argument!r} is not a number"
                raise UserError(f"/temp: {reason}") from None
            self.decoding = self.decoding._replace(sampling=sampling)
            print(f"temperature: {sampling.temperature:g}")
        elif name == "/reset":
            print(f"forgotten: {len(self.text):,} bytes")
            self.reset()
            self.saved_files.clear()  # what they hold is another conversation now
        elif name == "/save":
            self.save(argument.strip())
        elif name == "/help":
            print(HELP)
        else:
            raise UserError(f"{name} is not a command; /help lists them")

    def save(self, name: str) -> None:
        """Write the session's text, or the state after it, to a file. Raises UserError."""
        if not name:
            raise UserError("/save: name a file")
        file = expand_user(name, "/save")
        if file.exists() and file not in self.saved_files:  # a session may replace its own files
            raise UserError(f"/save: {file} exists; name another file, or remove it")
        if file.suffix == ".safetensors":
            if not self.text:
                raise UserError("/save: nothing was said yet")
            save_state(file, self.decoding.model, self.state)
            saved = f"the state after {self.state.position:,} bytes"
        else:
            with atomic_writer(file) as temporary:
                temporary.write_bytes(self.text)
            saved = f"{len(self.text):,} bytes"
        self.saved_files.add(file)
        print(f"saved {saved} in {file}")

    def turn(self, line: str) -> None:
        """Read a line in its format and print the answer; Ctrl-C ends the answer."""
        key, turn_key = mx.random.split(self.decoding.key)
        self.decoding = self.decoding._replace(key=key)
        prompt = self.format_prompt(line)
        stop = StopMatcher(self.decoding.stops, prompt)
        terminal = Terminal()
        with suppress(KeyboardInterrupt):
            logits = self.read(prompt)
            for piece in self.write(logits, turn_key):
                terminal.write(stop.feed(piece))
                if stop.matched:
                    break
        terminal.write(stop.end(), final=not self.decoding.sampling.utf8)
        print()
        self.print_length_warning()

    def read(self, prompt: bytes) -> mx.array:
        """Read a prompt after the session's text; return the next byte's logits (1, V)."""
        with Progress("reading", len(prompt), "bytes") as progress:
            for begin in range(0, len(prompt), PIECE):  # Ctrl-C acts between them
                piece = prompt[begin : begin + PIECE]
                idx = pad_batch([piece])
                logits, self.state = read_prompt(self.decoding.model, idx, self.state)
                self.text += piece
                progress.update(len(piece))
        return logits

    def write(self, logits: mx.array, key: mx.array) -> Iterator[bytes]:
        """Yield the bytes of an answer, which are part of the session's text at once."""
        decoding = self.decoding._replace(key=key)
        tokens = stream(decoding, logits, self.state, pad_batch([self.text]))
        for token, self.state in islice(tokens, decoding.max_new_tokens):
            self.text += bytes(token)
            yield bytes(token)

    def print_length_warning(self) -> None:
        """Say once that the session has outgrown the blocks of the training."""
        loaded = self.decoding.start.position > 0
        window, position = self.state.window, self.state.position
        note = context_length_warning(self.decoding.model, window, position, loaded)
        if note and not self.warned:
            print(note)
        self.warned = bool(note)

    def format_prompt(self, line: str) -> bytes:
        """Return the line in the format of the mode, after what the session's text lacks before it.

        A model of chats continues the chat, as it was trained; any other begins a new record.
        """
        if self.mode is None:
            return line.encode(errors="surrogateescape")
        fields = {"system": self.system, "instruction": line}
        if self.mode == "system":
            fields["system"] = line
        goes_on = self.chats and self.text and not self.text.endswith(END_OF_RECORD)
        turns = [("instruction", line)] if goes_on else formats.to_turns(fields)
        prompt = formats.format_prompt(turns, self.mode)
        if not self.text:
            return prompt.encode(errors="surrogateescape")
        stop = formats.STOP if self.mode == "full" and not goes_on else ""
        return missing_part(self.text, f"{stop}{formats.SEPARATOR}{prompt}")


def missing_part(text: bytes, following: str) -> bytes:
    """Return what of `following` does not stand at the end of `text` already."""
    following = following.encode(errors="surrogateescape")
    overlap = range(min(len(following), MAX_OVERLAP) + 1)
    return following[max(n for n in overlap if text.endswith(following[:n])) :]
