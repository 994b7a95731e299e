"""What a record becomes in each training mode, and what to ask a model of that mode."""

FIELDS = ("", "system", "instruction", "response", "text")  # "": headers and blank lines
NEEDED = {  # fields of a record that each training mode formats
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
EXPECT = {  # what to make of a mode's samples, said where they are printed
    "system": "this mode trains on plain system texts: headers in the prompts are new to it",
    "instruction": "this mode trains on plain instructions: headers in the prompts are new to it",
    "both": "this mode never trains on a response: expect more instructions, not answers",
    "full": "this mode trains on whole records: expect a response after its header",
    "text": "the data are plain text: expect more of it; headers in the prompts are new to it",
}
SEPARATOR = "\n\n"  # between records
STOP = "\n---"  # ends a response; part of it, since a model must learn to stop


def pieces(record: dict, mode: str) -> list[tuple[str, str]]:
    """The training text of one record in one mode, as (field, text) pieces in their order.

    The field is one of FIELDS; plain text (`text` alone) is the same in all modes.
    """
    if "text" in record:
        return [("text", record["text"])]
    if mode in ("system", "instruction"):
        return [(mode, record[mode])]
    found = [
        ("", "### System:\n"),
        ("system", record["system"]),
        ("", "\n\n### Instruction:\n"),
        ("instruction", record["instruction"]),
    ]
    if mode == "full":
        found += [("", "\n\n### Response:\n"), ("response", record["response"] + STOP)]
    return found


def format_example(record: dict, mode: str) -> str:
    """The training text of one record in one mode."""
    return "".join(text for _, text in pieces(record, mode))


def opening(record: dict, mode: str) -> str:
    """The training text of a record as far as it is given: what a model of that mode goes on with.

    That is an instruction in `both`, a response in `full`; without a system text its section is
    left out.
    """
    if "text" in record or mode in ("system", "instruction"):
        return pieces(record, mode)[0][1]
    parts = [text for _, text in pieces({"system": "", "response": ""} | record, mode)]
    parts = parts[:-1] if mode == "full" else parts
    return "".join(parts if record.get("system") else parts[2:]).lstrip("\n")
