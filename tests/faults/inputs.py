"""Faults of what comes in: data sets, the hub, files made to harm, names, prompts, terminals."""

import io
import json
import math
import os
import pickle
import pty
import random
import re
import resource
import select
import signal
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from harness import (
    ARGS,
    DATA,
    LAST,
    RECORD,
    ROOM,
    WORST,
    at_call,
    begin,
    end,
    fault,
    fresh,
    reference,
    refusal,
    signalled,
    state,
    stopped,
    train,
)

# isort: split
import mlx.core as mx
import numpy as np

import bdh_mlx
import generate
import train_mlx
from bdh_lib.data import columns, parsers, texts  # noqa: F401  a fault names one
from bdh_lib.data import hub as hub_access
from bdh_lib.data import prepare as preparing
from bdh_lib.generation import decoding
from bdh_lib.generation.sampling import Sampling
from bdh_lib.script import cli
from bdh_lib.training import batches, checkpoints, resume  # noqa: F401  a fault names one

# ------------------------------------------------------------------------------------------ data

FULL = ("system", "instruction", "response")
DEEP = "[" * 10**5 + "]" * 10**5
BAD = [  # (reason counted, line): each kind is put in once more often than the one before
    *((f"{field} missing", {f: RECORD[f] for f in FULL if f != field}) for field in FULL[1:]),
    ("response is null, not text", RECORD | {"response": None}),
    ("response is float, not text", RECORD | {"response": math.nan}),
    ("system is list, not text", RECORD | {"system": []}),
    ("system is dict, not text", RECORD | {"system": {}}),
    ("context is dict, not text", RECORD | {"context": {}}),
    ("instruction is list, not text", RECORD | {"instruction": ["x"]}),
    ("instruction is dict, not text", RECORD | {"instruction": {}}),
    ("instruction empty", RECORD | {"instruction": ""}),
    ("response empty", RECORD | {"response": " \t\n"}),
    ("instruction with a lone surrogate", RECORD | {"instruction": "\ud800"}),
    ("not valid UTF-8", b'{"system": "\xac", "instruction": "i", "response": "r"}'),
    ("not JSON", b'{"system": "cut'),
    ("not JSON", b"{broken}"),
    ("not JSON", b'{"system": 9e}'),
    ("not a JSON object", b"[1, 2]"),
    ("not a JSON object", b'"text"'),
    ("blank line", b"  "),
    ("messages is str, not a list of turns or its JSON", {"messages": "broken"}),
    ("instruction missing", {"messages": [3]}),
    ("instruction missing", {}),
]


def lines(records):
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)


def unchecked(parsed, mode):
    return texts.Formatted(texts.training_texts(parsed.turns, mode)[0])


@fault(
    "bad records: 22 kinds among 1,000 good ones, exact counts and bytes",
    1,
    1,
    believed=[(texts, "format_record", unchecked)],
)
def _(n):
    box = fresh()
    file = ROOM / "bad.jsonl"
    good = [{f: f"{v} {i} \0\x7f\u2028" for f, v in RECORD.items()} for i in range(1000)]
    bad = [line for k, (_, line) in enumerate(BAD, 1) for _ in range(k)]
    # beyond ASCII as it is, so that the file is UTF-8 and a line that is not costs itself alone
    mixed = [json.dumps(r, ensure_ascii=False).encode() for r in good] + bad
    random.Random(1).shuffle(mixed)
    file.write_bytes(lines(mixed))
    code, out = train(box, "--dataset", file)
    wanted = Counter()
    for k, (reason, _) in enumerate(BAD, 1):
        wanted[reason] += k
    found = [json.loads(f.read_text()) for f in box.glob(".data/*/data.json")]
    report = next((r for r in found if r["dataset"] == str(file)), None)
    if code or not report:
        yield f"exit {code}: {out[-300:]}", None
        return
    for reason, _ in BAD:
        counted = report["skipped"].get(reason)
        yield (
            "" if counted == wanted[reason] else f"{reason}: {counted}, not {wanted[reason]}",
            None,
        )
    size = sum(
        len(b"### System:\n\n\n### Instruction:\n\n\n### Response:\n\n---\n\n")
        + sum(len(text.encode()) for text in r.values())
        for r in good
    )
    kept = report["train"]["bytes"] + report["val"]["bytes"]
    yield "" if kept == size else f"{kept} bytes kept, not {size}", None


def as_list(line):
    """The bytes as a list, as the trainer this one replaces held them."""
    return (
        PARSE(line)
        if len(line) < 10**6
        else list(line.encode()) and list(line.encode()) and PARSE(line)
    )


def PARSE(line):
    return parsers._parse_line(line, parsers.Encoding())


@fault("one record of 20 MB (--quick) or 100 MB: memory", 20, 100)
def _(n):
    file = ROOM / "large.jsonl"
    text = "x" * (n * 10**6)
    file.write_bytes(
        lines([RECORD | {"system": str(i)} for i in range(20)] + [RECORD | {"response": text}])
    )
    small = ROOM / "small.jsonl"
    small.write_bytes(lines([RECORD | {"system": str(i)} for i in range(20)]))
    used = []
    for source in (small, file):
        code, out = train(
            fresh(),
            "--dataset",
            source,
            "--eval-bytes",
            40,
            before=lambda: at_call(
                train_mlx,
                "total_steps",
                1,
                lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
            ),
        )
        used.append(int(re.search(r"^peak (\d+)", out, re.M)[1]) if code == 0 else math.inf)
    more = (used[1] - used[0]) / (1e3 if sys.platform == "linux" else 1e6) / n
    WORST[f"memory for a record of {n} MB, as a multiple"] = round(more, 2)
    file.unlink()
    yield "" if more <= 3.3 else f"{more:.2f} times the record", None


@fault("empty and too short input", 3, 99)
def _(n):
    cases = (
        ("a.jsonl", b"", "no record"),
        ("a.txt", b"", "no record"),
        ("a.txt", b"x", "1 distinct"),
        ("a.jsonl", b"\n \n", "no record"),
        ("a.jsonl", lines([RECORD] * 9), "1 distinct"),
        ("a.txt", b"a\n\nb", "1 bytes", "needs 17"),
        ("a.txt", b"x" * 16 + b"\n\ny", "needs"),
        ("a.json", b"{", "cannot be read"),
        ("a.csv", b"a,b\n1,2", "lacking"),
        ("a.doc", b"x", "ends in none"),
        ("a.jsonl", lines([{"text": "x"}, {"text": "y" * 17}]), "needs"),
    )
    for name, content, *words in cases[:n]:
        box = fresh()
        (box / name).write_bytes(content)
        yield refusal(*train(box, "--dataset", box / name), *words), None
    yield refusal(*train(fresh(), "--dataset", ROOM / "none.jsonl"), "does not exist"), None
    yield refusal(*train(fresh(), "--training-mode", "fulll"), "TRAINING_MODE", "full"), None


NOT_SHAS = [n for n in resume.FIXED_ON_RESUME if "data" not in n]


@fault(
    "data changed between save and resume",
    1,
    1,
    not_compared=[(resume, "FIXED_ON_RESUME", NOT_SHAS)],
)
def _(n):
    content = DATA.read_bytes()
    for changed in (
        content + b"\n" + lines([RECORD]),
        content.replace(b"kind", b"Kind", 1),
        content[:-90],
    ):
        box = fresh(8)
        (box / "d.jsonl").write_bytes(content)
        moved = train(box, "--dataset", box / "d.jsonl", "--max-iters", 9)
        (box / "d.jsonl").write_bytes(changed)
        yield (
            refusal(*moved, want=0) if moved[0] else "",
            None,
        )  # the same bytes elsewhere are the same
        yield (
            refusal(*train(box, "--dataset", box / "d.jsonl"), "data", "INIT_FROM full"),
            None,
        )
        again = ("--run-name", "again", "--init-from", "full")
        code, out = train(box, "--dataset", box / "d.jsonl", *again)
        yield "" if code == 0 and "weights of full" in out else out[-300:], None
    yield refusal(*train(fresh(8), "--val-fraction", 0.2), "train data", "val data"), None


@fault(
    "data file that shrinks: under the run, and while it is read",
    1,
    1,
    not_looked_at_again=[(preparing, "cache_key", lambda *a, **k: "f")],
)
def _(n):
    for where, nth in (("batches.get_batch", 4), ("columns.parse_record", 100)):
        owner, name = where.split(".")
        box = fresh()
        (box / "d.jsonl").write_bytes(DATA.read_bytes())
        shrink = lambda: os.truncate(box / "d.jsonl", 0)
        tried = train(
            box,
            "--dataset",
            box / "d.jsonl",
            before=lambda: at_call(globals()[owner], name, nth, shrink),
        )
        if owner == "columns":
            yield refusal(*tried, "changed while it was read"), None
        else:
            yield "" if tried[0] == 0 and state(box, LAST) == reference() else tried[1][-300:], None


def hub(answer):
    """A server on 127.0.0.1 that answers so, None for never; its address and its pid."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), answer or BaseHTTPRequestHandler)
    pid = os.fork()
    if not pid:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        time.sleep(600) if answer is None else server.serve_forever()
        os._exit(0)
    server.socket.close()
    return f"http://127.0.0.1:{server.server_port}", pid


def answering(status, code=None, only_head=False):
    class Answer(BaseHTTPRequestHandler):
        def answer(self):
            if only_head and self.path != "/":
                time.sleep(600)
            self.send_response(200 if only_head else status)
            self.send_header("X-Error-Code", code) if code else None
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = answer

    return Answer


HUBS = {
    "refuses": ("http://127.0.0.1:9", "out of reach"),
    "404": (answering(404, "RepoNotFound"), "not on the hub, or private"),
    "does not resolve": ("http://no-such-host.invalid", "out of reach"),
    "hangs": (None, "out of reach"),
    "answers, then hangs": (answering(200, only_head=True), "hub"),
    "401": (answering(401, "RepoNotFound"), "not on the hub, or private"),
    "401, bad token": (answering(401), "hub"),
    "403 gated": (answering(403, "GatedRepo"), "gated"),
    "500": (answering(500), "hub"),
    "503": (answering(503), "hub"),
    "speaks no JSON": (answering(200), "hub"),
    "is switched off": ("offline", "out of reach"),
}


def unguarded_hub(name):
    import datasets

    return dict(datasets.load_dataset(name))


@fault(
    "a hub that refuses, hangs, errs, is switched off; a resume without it",
    0,
    99,
    not_caught=[(hub_access, "load", unguarded_hub)],
)
def _(n):
    for what, (answer, word) in list(HUBS.items())[:n]:
        box = fresh()
        pid = None
        began = time.monotonic()
        if not isinstance(answer, str):
            answer, pid = hub(answer)
        variables = {"HF_ENDPOINT": answer, "HF_HOME": str(box / "hf")}
        if answer == "offline":
            variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(box / "hf")}
        code, out = train(
            box, "--dataset", "user/name", before=lambda: os.environ.update(variables)
        )
        seconds = time.monotonic() - began
        WORST["a hub's refusal, s"] = max(WORST.get("a hub's refusal, s", 0), round(seconds, 1))
        late = f"; {seconds:.0f} s" if seconds > 60 else ""
        why = refusal(code, out, word, "--dataset FILE")
        yield f"hub {what}: {why}{late}" if why or late else "", None
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    records = [json.loads(line) for line in DATA.read_text().splitlines()]
    box = fresh()
    known = lambda: setattr(hub_access, "load", lambda name: {"train": records})
    code, out = train(
        box, "--dataset", "user/name", before=lambda: (known(), signalled("get_batch", 6)())
    )
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(box / "hf")}
    code, out = train(box, "--dataset", "user/name", before=lambda: os.environ.update(dead))
    yield "" if code == 0 and state(box, LAST) == reference() else f"resume: {out[-300:]}", None


# ---------------------------------------------------------------------------------------- security


def packed(header, payload):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + payload


def with_entry(**change):
    """The first array's entry changed so."""
    return lambda h, p: packed({**h, "decoder": h["decoder"] | change}, p)


def overlapping(h, p):
    return packed({**h, "encoder_v": h["encoder"]}, p)


HOSTILE = [
    overlapping,
    lambda h, p: b"",
    lambda h, p: b"\xff" * 7,
    lambda h, p: b"\xff" * 8 + b"{}",
    lambda h, p: (2**63).to_bytes(8, "little") + b"{}",
    lambda h, p: (10**9).to_bytes(8, "little") + b"{}",
    lambda h, p: packed(b"not JSON", p),
    lambda h, p: packed(b"[1]", p),
    lambda h, p: packed(b"7", p),
    lambda h, p: packed(b"{}", b""),
    lambda h, p: packed(b'{"a":' * 10**5, p),
    with_entry(dtype="F1024"),
    with_entry(dtype=7),
    with_entry(shape=[-1, 8]),
    with_entry(shape=[2**40, 2**40]),
    with_entry(shape="32"),
    with_entry(data_offsets=[-8, 8]),
    with_entry(data_offsets=[8, 0]),
    with_entry(data_offsets=[0, 2**62]),
    with_entry(data_offsets=[0]),
    lambda h, p: packed({**h, "../../evil": h["decoder"]}, p),
    lambda h, p: packed({k: v for k, v in h.items() if k != "decoder"}, p),
    lambda h, p: packed(h, p + b"more"),
    lambda h, p: packed(h, p[:-1]),
    lambda h, p: packed({**h, "__metadata__": {"n_layer": "x"}}, p),
    lambda h, p: packed({**h, "__metadata__": {"n_layer": "-1"}}, p),
    lambda h, p: packed({**h, "__metadata__": {"n_layer": "1000000000"}}, p),
    lambda h, p: packed({**h, "__metadata__": {"n_layer": "9" * 5000}}, p),
    lambda h, p: packed({**h, "__metadata__": {"dropout": "nan"}}, p),
    lambda h, p: packed({**h, "__metadata__": 5}, p),
]


def write(box, *args, before=None):
    """Run generate.py; its exit code and what it printed."""
    code = end(begin(box, *args, before=before, module=generate), 60)
    return code, (box / "out").read_text(errors="replace")


@fault(
    "hostile .safetensors headers",
    1,
    1,
    trusted=[(bdh_mlx, "read_arrays", lambda file: mx.load(str(file), return_metadata=True))],
)
def _(n):
    raw = (stopped(8) / "full/step-000008/model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    payload = raw[8 + size :]
    for i, make in enumerate(HOSTILE):
        box = fresh()
        (box / "x.safetensors").write_bytes(make(header, payload))
        why = refusal(*write(box, box / "x.safetensors", "--prompt", "x", "--max-new-tokens", 2))
        yield f"header {i}: {why}" if why else "", None


class Trap:
    def __reduce__(self):
        return Path.touch, (ROOM / "sprung",)


def unpickled(file):
    return pickle.loads(file.read_bytes()), {}


@fault(
    "a pickle, an .npz of objects under the name of a checkpoint",
    1,
    1,
    unpickled=[(bdh_mlx, "read_arrays", unpickled)],
)
def _(n):
    objects = io.BytesIO()
    np.savez(objects, encoder=np.array([Trap()], object), allow_pickle=True)
    for content in (pickle.dumps(Trap()), pickle.dumps({"encoder": Trap()}, 0), objects.getvalue()):
        box = fresh()
        (box / "x.safetensors").write_bytes(content)
        (ROOM / "sprung").unlink(missing_ok=True)
        why = refusal(*write(box, box / "x.safetensors", "--prompt", "x"))
        yield "it was run" if (ROOM / "sprung").exists() else why, None
        why = refusal(*train(box, "--init-from", box / "x.safetensors"))
        yield "it was run" if (ROOM / "sprung").exists() else why, None


@fault(
    "run names that leave the folder",
    1,
    1,
    any_name=[(checkpoints, "re", SimpleNamespace(fullmatch=lambda *args: True))],
)
def _(n):
    for name in (
        "../x",
        str(ROOM / "x"),
        "a/b",
        "",
        ".",
        "..",
        ".hidden",
        "x" * 300,
        "x\n",
        "x\0",
        "x\x1b[2J",
        "é",
    ):
        box = fresh()
        before = sorted(ROOM.iterdir()) + sorted(box.iterdir())
        why = refusal(*train(box, "--run-name", name), "RUN_NAME")
        new = (
            {p.name for p in [*ROOM.iterdir(), *box.iterdir()]} - {p.name for p in before} - {"out"}
        )
        yield why or (f"made {new}" if new else ""), None


def on_terminal(begin_process):
    """What reaches a terminal: begun(before) starts the script, `before` connects it."""
    master, slave = pty.openpty()

    def connect():
        os.environ["NO_COLOR"] = "1"  # our own bold lines do no harm
        for standard in (1, 2):
            os.dup2(slave, standard)

    pid = begin_process(connect)
    os.close(slave)
    seen = b""
    while select.select([master], [], [], 60)[0]:
        try:
            seen += os.read(master, 10**6)
        except OSError:  # the other side is closed
            break
    os.close(master)
    return seen.decode(errors="replace"), end(pid)


CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]")
HARM = "\x1b]52;c;A\x07\x1b[2J\x9b1m\u202e"


def all_bytes(sampling, logits, past, key):
    all_bytes.last = getattr(all_bytes, "last", -1) + 1
    return mx.full(logits.shape[:1], all_bytes.last % 256, mx.uint32), key


@fault(
    "control characters from model, prompt, data and names on a terminal",
    1,
    1,
    shown_as_they_are=[(decoding, "escape_controls", lambda text: text)],
)
def _(n):
    def speak():
        Sampling.draw = all_bytes

    box = fresh(8)
    evil = box / "evil.jsonl"
    evil.write_bytes(
        lines([RECORD | {"system": f"{HARM} {i}"} for i in range(200)] + [{HARM: 1}] * 3)
    )
    run = ("--checkpoint-dir", box)
    for args, module in (
        ((box / "full", "--prompt", HARM, "--max-new-tokens", 600), generate),
        ((box / HARM, "--prompt", "x"), generate),
        ((*ARGS, *run, "--sample-bytes", 300), train_mlx),
        ((*ARGS, *run, "--dataset", evil, "--run-name", "b"), train_mlx),
        ((*ARGS, *run, "--dataset", evil, "--training-mode", HARM), train_mlx),
        ((*ARGS, *run, "--dataset", f"{HARM}.jsonl"), train_mlx),
        ((*ARGS, *run, "--dataset", HARM), train_mlx),
        ((*ARGS, *run, f"--{HARM}"), train_mlx),
    ):
        start = lambda connect: begin(
            box, *args, module=module, before=lambda: (connect(), speak())
        )
        seen, _code = on_terminal(start)
        bad = set(CONTROLS.findall(seen))
        yield f"{bad} from {args[-4:]}" if bad or len(seen) < 20 else "", None


@fault("output closed by its reader", 1, 5, fragile=[(cli, "ignore_closed_output", lambda: None)])
def _(n):
    for closed in ((1,), (1, 2)) * n:
        box, (read, write_end) = fresh(), os.pipe()
        pid = begin(
            box,
            *ARGS,
            "--checkpoint-dir",
            box,
            before=lambda: [os.close(read), *(os.dup2(write_end, n) for n in closed)],
        )
        os.close(write_end)
        os.read(read, 1)
        os.close(read)
        code = end(pid)
        yield "" if code == 0 and state(box, LAST) == reference() else f"exit {code}", None


@fault("prompts and sampling settings", 1, 1)
def _(n):
    box = fresh(8)
    (box / "broken").write_bytes(b"\xff\xfe\0\x80 text")
    (box / "million").write_bytes(b"word " * 200_000)
    run = box / "full"
    short = ("--max-new-tokens", 3)
    for args, word in (
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--temperature", "nan"), "temperature"),
        (("--prompt", "x", "--top-k", "0"), "--top-k"),
        (("--prompt", "x", "--top-k", "-1"), "--top-k"),
        (("--prompt-file", box / "none"), "none"),
    ):
        yield refusal(*write(box, run, *args, *short), word), None
    for args in (
        ("--prompt-file", box / "broken"),
        ("--prompt-file", box / "million"),
        ("--prompt", "x", "--temperature", 0),
        ("--prompt", "x", "--top-k", 1000),
    ):
        code, out = write(box, run, *args, *short)
        yield "" if code == 0 and "Traceback" not in out else out[-300:], None
