"""What one more pass over the records finds: their issues, and the bytes of each mode.

A byte model learns every fault of its data literally, so `--plan` names them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bdh_lib.data import sources
from bdh_lib.data.columns import parse_record
from bdh_lib.data.formats import LABEL_OF, REQUIRED_FIELDS, STOP, Turns
from bdh_lib.data.prepare import IN_VAL, data_settings, prepare
from bdh_lib.data.texts import format_record
from bdh_lib.settings import Settings
from bdh_lib.tables import format_table

HEADER = re.compile(r"^### (System|Instruction|Response):", re.MULTILINE)
TOKENS = re.compile(  # special tokens of other models' chats, and places of what is not text
    r"<\|(im_start|im_end|endoftext|eot_id|start_header_id|user|assistant|system)\|>"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<(start|end)_of_turn>|<(image|audio|video)>"
)
UTF_8 = re.compile(  # of Latin letters; of punctuation and symbols; of emoji
    rb"[\xc2-\xc5][\x80-\xbf]|\xe2[\x80-\xbf]{2}|\xf0[\x90-\xbf][\x80-\xbf]{2}"
)
NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")


@dataclass
class Findings:
    """What one pass over all records found; counts of records where nothing else is said."""

    issues: Counter = field(default_factory=Counter)
    of_mode: dict = field(
        default_factory=lambda: {mode: Counter() for mode in REQUIRED_FIELDS}
    )  # bytes
    usable: Counter = field(default_factory=Counter)  # by mode
    digests: list = field(default_factory=list)  # of each training text of the run's own mode
    fields: dict = field(default_factory=dict)  # of each such record, the digest of each field
    in_val: list = field(default_factory=list)  # whether it validates, of each such record
    examples: dict = field(default_factory=dict)  # by structure: the text of its first record


def digest(text: str) -> int:
    """Return 64 bits by which equal texts are found without keeping them."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _bytes_under(codec: str) -> dict[int, int]:
    """Return the byte of each character of an 8-bit codec.

    A byte that the codec leaves undefined stands for itself.
    """
    decoded = {b: bytes([b]).decode(codec, "ignore") or chr(b) for b in range(128, 256)}
    return {ord(character): b for b, character in decoded.items()}


CODECS = [_bytes_under(codec) for codec in ("cp1252", "latin1", "mac_roman")]


def mojibake(text: str) -> str | None:
    """Return the first UTF-8 of `text` that was read as Windows or Mac text, such as `â€™`."""
    for match in NOT_ASCII.finditer(text):
        for codec in CODECS:
            if sequence := UTF_8.search(bytes(codec.get(ord(c), 0) for c in match[0])):
                return match[0][slice(*sequence.span())]
    return None


def examine(s: Settings) -> Findings:
    """Read every record once more; note its issues and which side of the split has it."""
    findings = Findings()
    folder = prepare(data_settings(s, s.TRAINING_MODE), Path(s.CHECKPOINT_DIR) / ".data")
    in_val = iter(np.load(folder / IN_VAL).tolist())
    for record in sources.read_records(s.DATASET):
        parsed = parse_record(record, s.COLUMNS)
        for mode in REQUIRED_FIELDS:
            texts = format_record(parsed, mode).texts
            findings.usable[mode] += len(texts)
            for text in texts:
                for name, piece in text:
                    findings.of_mode[mode][name] += len(piece.encode())
                if mode == s.TRAINING_MODE:
                    _note(findings, parsed.structure, text, s)
                    findings.in_val.append(next(in_val, False))  # the hub may have grown since
    return findings


def _note(findings: Findings, structure: str, pieces: Turns, s: Settings) -> None:
    """Note one training text, in pieces by field, of the run's own mode."""
    text = "".join(piece for _, piece in pieces)
    findings.examples.setdefault(structure, text)
    findings.digests.append(digest(text))
    if len(text.encode()) > s.BLOCK_SIZE:
        findings.issues["longer than BLOCK_SIZE, so read in pieces"] += 1
    for name, value in field_values(pieces).items():
        findings.fields.setdefault(name, []).append(digest(" ".join(value.split()).lower()))
        findings.issues.update(problems_of(name, value))


def field_values(pieces: Turns) -> dict[str, str]:
    """Return the text of each field in a training text; that of several turns is joined."""
    values = {}
    for name, piece in pieces:
        if name:
            values.setdefault(name, []).append(piece)
    return {name: "\n\n".join(parts).removesuffix(STOP) for name, parts in values.items()}


def problems_of(name: str, value: str) -> Iterator[str]:
    """Yield the issues of the text of field `name`, in words."""
    if header := HEADER.search(value):
        yield f"`{header[0]}` inside {name}"
    if token := TOKENS.search(value):
        yield f"`{token[0]}`, a special token of another model, inside {name}"
    if "\r" in value:
        yield f"an end of line of Windows (\\r\\n), or \\r alone, inside {name}"
    if name == "response" and STOP in value:
        yield "the end mark `---` inside response"
    if wrong := mojibake(value):
        yield f"mojibake in {name}, such as `{wrong}`"[:60]
    if "\ufffd" in value:
        yield f"U+FFFD, a character lost before, in {name}"


def shared_with_training(digests: list[int], in_val: list[bool]) -> int:
    """Count the validation records whose digest is that of a training record, too."""
    train = {d for d, val in zip(digests, in_val, strict=True) if not val}
    return sum(d in train for d, val in zip(digests, in_val, strict=True) if val)


def issue_lines(found: Findings) -> list[str]:
    """Return the findings as lines; mojibake is summed up by its field."""
    n, n_val = len(found.digests), sum(found.in_val)
    issues = Counter()
    for name, count in found.issues.items():
        kind = name.split(", such as")[0]
        issues[next((k for k in issues if k.split(", such as")[0] == kind), name)] += count
    issues["with the same text as an earlier one"] = n - len(set(found.digests))
    lines = [f"  {count:,} of {n:,} records: {name}" for name, count in issues.items() if count]
    both = shared_with_training(found.digests, found.in_val)
    lines.append(f"  {both:,} of {n_val:,} validation records are in the training split")
    for name, digests in found.fields.items():
        if len(digests) == n:  # each record has this field
            same = shared_with_training(digests, found.in_val)
            lines.append(f"  {same:,} of {n_val:,} share their {name} with a training record")
    return lines


def mode_table(found: Findings) -> str:
    """Return the records and bytes of each mode, by field."""
    rows = [("mode", "records", "bytes", "bytes by field")]
    for mode, sizes in found.of_mode.items():
        parts = ", ".join(f"{LABEL_OF[name]} {size:,}" for name, size in sizes.items())
        rows.append((mode, f"{found.usable[mode]:,}", f"{sizes.total():,}", parts))
    return format_table(rows, "  ")
