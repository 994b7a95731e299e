"""What a record becomes in each training mode, and what to ask a model of that mode."""

from collections.abc import Collection

FIELDS = ("", "system", "instruction", "response", "text")  # "": headers and blank lines
LABEL_OF = dict(zip(FIELDS, ("headers", *FIELDS[1:]), strict=True))  # in tables and logs
REQUIRED_FIELDS = {  # fields of a record that each training mode formats
    "system": ("system",),
    "instruction": ("instruction",),
    "both": ("system", "instruction"),
    "full": ("system", "instruction", "response"),
}
PROMPTS = {
    "system": ["### System:\nTask Overview:", "### System:\nGuidelines:"],
    "instruction": ["### Instruction:\nAnalyze", "### Instruction:\nExplain"],
    "both": [
        "### System:\nTask Overview: Analyze and explore\n\n### Instruction:\n",
        "### System:\nGuidelines: Focus on core interactions\n\n### Instruction:\n",
    ],
    "full": [
        "### System:\nTask Overview:",
        "### Instruction:\nAnalyze the ethical implications",
        "### Response:\n",
    ],
}
SAMPLE_NOTES = {  # what to make of a mode's samples, said where they are printed
    "system": "this mode trains on plain system texts: headers in the prompts are new to it",
    "instruction": "this mode trains on plain instructions: headers in the prompts are new to it",
    "both": "this mode never trains on a response: expect more instructions, not answers",
    "full": "this mode trains on whole records: expect a response after ### Response:",
    "text": "the data are plain text: expect more of it; headers in the prompts are new to it",
}
MAX_NEW_TOKENS = 500  # bytes that a model writes, where nothing else is said
SEPARATOR = "\n\n"  # after each record, the last one too, and between its sections
STOP = "\n---"  # ends the last response of a record; part of it, for a model must learn to stop
END_OF_RESPONSE = (f"{STOP}\n", f"{SEPARATOR}### Instruction:\n")  # the second one within a chat
NO_REPLY = "question without a reply after it"
NO_REPLY_TO_SYSTEM = "system text without a reply after it"
NO_SYSTEM = "question without a system text before it"
NO_QUESTION_TO_SYSTEM = "system text without a question after it"
Turns = list[tuple[str, str]]  # of a record: (field, text) in their order


def sample_prompts(mode: str, has: Collection[str]) -> list[str]:
    """Return the prompts for samples in `mode`; `has` is the set of fields in the data.

    Plain text gets a record separator; data without system texts get no prompt with one.
    """
    if not set(REQUIRED_FIELDS[mode]) & set(has):
        return [SEPARATOR]
    of_system = mode != "full" or "system" in has
    return [p for p in PROMPTS[mode] if of_system or not p.startswith("### System")]


def needed_fields(mode: str) -> tuple[str, ...]:
    """Return the fields without which a record has no text in `mode`.

    Mode `full` does without a system text.
    """
    return tuple(f for f in REQUIRED_FIELDS[mode] if f != "system" or mode != "full")


def to_turns(record: dict) -> Turns:
    """Return the turns of a record that is given by field; plain text is a turn of its own."""
    if "text" in record:
        return [("text", record["text"])]
    return [(field, record[field]) for field in REQUIRED_FIELDS["full"] if record.get(field)]


def field_pieces(turns: Turns, mode: str) -> Turns:
    """Return the turns as one text of `mode`, as (field, text) pieces in their order.

    The field is one of FIELDS. Modes of several fields have a header before each, and `full` a mark
    at its end. Plain text is the same in all modes.
    """
    if turns[0][0] == "text" or mode in ("system", "instruction"):
        return [turn for turn in turns if turn[0] in ("text", mode)]
    pieces = []
    for field, text in turns:
        if field in REQUIRED_FIELDS[mode]:
            header = f"{SEPARATOR if pieces else ''}### {field.capitalize()}:\n"
            pieces += [("", header), (field, text)]
    if pieces and pieces[-1][0] == "response":
        pieces[-1] = ("response", pieces[-1][1] + STOP)
    return pieces


def training_texts(turns: Turns, mode: str) -> tuple[list[Turns], list[str]]:
    """Return the texts of a record in `mode`, and a reason for each turn that is in none of them.

    A text is as field_pieces gives it. A chat is one text of `full`, up to its last response. In
    `instruction` and `both` each instruction is one, in `both` after the system text before it; in
    `system` each system text is one. Turns of fields that the mode does not need have no reason.
    """
    if turns and turns[0][0] == "text":
        return [turns], []
    if mode in ("system", "instruction"):
        return [[turn] for turn in turns if turn[0] == mode], []
    parts, left_out = (_full_parts if mode == "full" else _both_parts)(turns)
    return [field_pieces(part, mode) for part in parts], left_out


def _full_parts(turns: Turns) -> tuple[list[Turns], list[str]]:
    """Return the turns up to the last response as one part."""
    end = max((i + 1 for i, turn in enumerate(turns) if turn[0] == "response"), default=0)
    reasons = {"instruction": NO_REPLY, "system": NO_REPLY_TO_SYSTEM}
    return [turns[:end]] if end else [], [reasons[field] for field, _ in turns[end:]]


def _both_parts(turns: Turns) -> tuple[list[Turns], list[str]]:
    """Return each instruction after the last system text before it."""
    parts = []
    left_out = []
    system = None
    is_used = True
    for turn in turns:
        if turn[0] == "system":
            left_out += [] if is_used else [NO_QUESTION_TO_SYSTEM]
            system = turn
            is_used = False
        elif turn[0] == "instruction" and system:
            parts.append([system, turn])
            is_used = True
        elif turn[0] == "instruction":
            left_out.append(NO_SYSTEM)
    return parts, left_out + ([] if is_used else [NO_QUESTION_TO_SYSTEM])


def format_example(record: dict, mode: str) -> str:
    """Return the training text of one record, given by field, in one mode."""
    return "".join(text for _, text in field_pieces(to_turns(record), mode))


def format_prompt(turns: Turns, mode: str) -> str:
    """Return the training text of a record up to its last instruction, which a model continues.

    In `full` the header of a response follows. In `both` the text has the last system text alone.
    """
    if turns[0][0] == "text":
        return turns[0][1]
    if mode in ("system", "instruction"):
        return [text for field, text in turns if field == mode][-1]
    end = max(i for i, turn in enumerate(turns) if turn[0] == "instruction")
    if mode == "both":
        systems = [turn for turn in turns[:end] if turn[0] == "system"]
        turns = [*systems[-1:], turns[end]]
        end = len(systems[-1:])
    text = "".join(text for _, text in field_pieces(turns[: end + 1], mode))
    return text + f"{SEPARATOR}### Response:\n" if mode == "full" else text
