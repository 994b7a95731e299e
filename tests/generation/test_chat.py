"""A session on a terminal."""

import os
import pty
import readline
import select
import signal
import sys
import time
import unicodedata
from types import SimpleNamespace

import pytest
from helpers import GREEDY, KEY, ROOT, greedy

import bdh_mlx
from bdh_lib.errors import escape_controls
from bdh_lib.generation import chat
from bdh_lib.generation.decoding import Decoding
from bdh_lib.generation.sampling import Sampling


class Screen:
    """generate.py on a terminal of its own, and what came out of it."""

    def __init__(self, home, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null"}
            command = [sys.executable, str(ROOT / "generate.py"), *map(str, args)]
            os.execv(sys.executable, command)
        self.out = b""
        self.seen = 0

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
        before = self.out[self.seen : at]
        self.seen = at + len(text)
        return before

    def type(self, text):
        os.write(self.fd, text)

    def ended(self):
        """Read to the end. Returns the exit code."""
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


def test_no_control_byte_of_the_model_reaches_a_terminal(counting_run, tmp_path, output):
    args = (counting_run, "--prompt", "a", "--max-new-tokens", 300, "--no-stop")
    assert len(set(output(*args, "--raw"))) == 256  # the model does write them all
    with Screen(tmp_path, *args) as screen:
        assert screen.ended() == 0
    shown = screen.out.replace(b"\r\n", b"\n").decode()  # the line ends are the terminal's own
    assert [c for c in shown if c not in "\n\t" and unicodedata.category(c) == "Cc"] == []
    assert rb"\x00\x01" in screen.out and rb"\x1b" in screen.out and rb"\xff" in screen.out


PROMPT = b"> "


def test_a_session_keeps_its_state_and_formats_what_is_typed(counting_run, tmp_path):
    with Screen(tmp_path, counting_run, "--max-new-tokens", 300, "--no-stop") as screen:
        assert b"a line is an instruction" in screen.until(PROMPT)

        def line(text):
            screen.type(text + b"\r")
            return screen.until(PROMPT)

        def transcript():
            (tmp_path / "said").unlink(missing_ok=True)
            line(b"/save " + str(tmp_path / "said").encode())
            return (tmp_path / "said").read_bytes()

        assert b"/reset" in line(b"/help")
        assert b"not a command" in line(b"/what")
        assert b"temperature is -1" in line(b"/temp -1")
        assert b"'x' is not a number" in line(b"/temp x")
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


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_session(counting_run, tmp_path):
    with Screen(tmp_path, counting_run, "--max-new-tokens", 10**9, "--no-stop") as screen:
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


def test_sigterm_resets_the_terminal(counting_run, tmp_path):
    with Screen(tmp_path, counting_run) as screen:
        screen.until(PROMPT)
        screen.type(b"half a line")
        screen.until(b"half a line")
        time.sleep(0.1)  # as above
        os.kill(screen.pid, signal.SIGTERM)
        assert screen.ended() == 128 + signal.SIGTERM
    ends = screen.out.count(b"\x1b[?2004l")
    assert ends == screen.out.count(b"\x1b[?2004h") and (ends or "libedit" in readline.__doc__)


@pytest.mark.parametrize("library", ["GNU readline", "libedit readline", None])
def test_lines_that_cannot_be_pasted_as_one_text_are_told(
    library, monkeypatch, capsys, random_run, tmp_path
):
    """None: a Python without the module."""
    bound = []
    fake = SimpleNamespace(__doc__=f"Importing this module enables line editing using {library}.")
    fake.read_history_file = fake.set_history_length = fake.write_history_file = lambda _: None
    fake.parse_and_bind = bound.append
    monkeypatch.setitem(sys.modules, "readline", fake if library else None)
    monkeypatch.setattr(chat.Session, "next_line", lambda _: None)
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    chat.Session(Decoding(bdh_mlx.load_model(random_run), Sampling(), KEY), "full").run()
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


def test_a_session_answers_as_its_whole_transcript_would(monkeypatch, capsys, random_run, tmp_path):
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    lines = iter(["first", "/system S", "second", f"/save {tmp_path / 'said'}", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    model = bdh_mlx.load_model(random_run)
    chat.Session(Decoding(model, GREEDY, KEY, [b"\n---\n"], 30), "full").run()
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
def test_a_turn_goes_on_as_the_model_was_trained(said, mode, chats, read, random_run):
    session = chat.Session(Decoding(bdh_mlx.load_model(random_run), GREEDY, KEY), mode, chats)
    session.system = "S"
    session.text = bytearray(said)
    assert session.format_prompt("q") == read
    session.text = bytearray()
    assert read.endswith(session.format_prompt("q")[-9:])


def test_a_session_says_once_that_it_outgrew_the_blocks(monkeypatch, capsys, random_run, tmp_path):
    monkeypatch.setattr(chat, "HISTORY", tmp_path / "history")
    model = bdh_mlx.load_model(random_run)
    lines = iter(["a", "b" * model.trained_length, "c", "/save", "/quit "])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.Session(Decoding(model, GREEDY, KEY, [], 5), "full").run()
    out = capsys.readouterr().out
    assert out.count("was trained on blocks of") == 1 and "/save: name a file" in out
