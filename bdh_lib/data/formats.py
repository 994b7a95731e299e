"""What a record becomes in each training mode, and what to ask a model of that mode."""

from collections.abc import Collection

FIELDS = ("", "system", "instruction", "response", "text")  # "": headers and blank lines
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
    "full": "this mode trains on whole records: expect a response after its header",
    "text": "the data are plain text: expect more of it; headers in the prompts are new to it",
}
MAX_NEW_TOKENS = 500  # bytes that a model writes, where nothing else is said
SEPARATOR = "\n\n"  # between records
STOP = "\n---"  # ends a response; part of it, since a model must learn to stop


def sample_prompts(mode: str, has: Collection[str]) -> list[str]:
    """Prompts for samples in `mode`; `has` is the set of fields in the data.

    Plain text gets a record separator; data without system texts get no prompt with one.
    """
    if not set(REQUIRED_FIELDS[mode]) & set(has):
        return [SEPARATOR]
    of_system = "system" in required_fields(mode, has)
    return [p for p in PROMPTS[mode] if of_system or not p.startswith("### System")]


def required_fields(mode: str, has: Collection[str]) -> tuple[str, ...]:
    """Fields that a record must have in `mode`, of data whose records have the fields `has`: in
    `full` no system text where no record has one (Alpaca, questions and answers).
    """
    return tuple(f for f in REQUIRED_FIELDS[mode] if f != "system" or f in has or mode != "full")


def field_segments(record: dict, mode: str) -> list[tuple[str, str]]:
    """The training text of one record in one mode, as (field, text) pieces in their order.

    The field is one of FIELDS; plain text (`text` alone) is the same in all modes. Without a system
    text its section is left out.
    """
    if "text" in record:
        return [("text", record["text"])]
    if mode in ("system", "instruction"):
        return [(mode, record[mode])]
    segments = []
    for field in REQUIRED_FIELDS[mode]:
        if field != "system" or record.get("system"):
            header = f"{SEPARATOR if segments else ''}### {field.capitalize()}:\n"
            end = STOP if field == "response" else ""
            segments += [("", header), (field, record[field] + end)]
    return segments


def format_example(record: dict, mode: str) -> str:
    """The training text of one record in one mode."""
    return "".join(text for _, text in field_segments(record, mode))


def format_prompt(record: dict, mode: str) -> str:
    """The training text of a record as far as it is given: what a model of that mode goes on with.

    That is an instruction in `both`, a response in `full`.
    """
    parts = [text for _, text in field_segments(record | {"response": ""}, mode)]
    asks = mode == "full" and "text" not in record
    return "".join(parts[:-1] if asks else parts)
