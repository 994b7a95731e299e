"""Which columns of a record, or turns of a chat, are its system text, instruction and response."""

from itertools import groupby

COLUMNS = {  # our field: the columns that mean it, first found wins
    "system": ("system",),
    "instruction": ("instruction", "prompt", "question"),
    "response": ("response", "output", "completion", "answer"),
}
SPEAKERS = {  # our field: the roles of a chat that speak it, in small letters
    "system": ("system", "developer"),
    "instruction": ("user", "human"),
    "response": ("assistant", "gpt", "chatgpt", "model", "bot", "ai"),
}
FIELD_OF = {role: field for field, roles in SPEAKERS.items() for role in roles}
UNKNOWN_ROLE = f"turn of a role that is none of {', '.join(FIELD_OF)}"


def detect(record: dict, questions: bool = False) -> tuple[str, list[dict | str]]:
    """The name of the record's structure, and a list of its contents by field, unchecked.

    A chat gives one content for each answer, each with the chat's system text, and a reason (a str)
    for each turn whose role is unknown. With `questions` it gives no reasons, but a content for a
    question that ends the chat. Alpaca's `input` is appended to its instruction.
    """
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return name, _split_chat(record[name], questions)
    column_of = {f: next((c for c in cs if c in record), None) for f, cs in COLUMNS.items()}
    fields = {field: record[column] for field, column in column_of.items() if column}
    names = [column for column in column_of.values() if column]
    if not names:
        return (
            ("text", [record])
            if "text" in record
            else (f"unknown ({', '.join(record)[:80]})", [{}])
        )
    if isinstance(extra := record.get("input"), str) and isinstance(fields.get("instruction"), str):
        names.insert(names.index(column_of["instruction"]) + 1, "input")
        fields["instruction"] += f"\n\n{extra}" if extra.strip() else ""
    return "/".join(names), [fields]


def _split_chat(turns: list, questions: bool) -> list[dict | str]:
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    spoken = [
        (FIELD_OF.get(str(t.get("role", t.get("from"))).lower()), t.get("content", t.get("value")))
        for t in turns
    ]
    known_turns = [turn for turn in spoken if turn[0]]
    exchange, exchanges = {}, []
    for field, some in groupby(known_turns, lambda turn: turn[0]):
        exchange[field] = _join_contents([content for _, content in some])
        if field == "response":
            exchanges.append(exchange)
            exchange = {"system": exchange["system"]} if "system" in exchange else {}
    if questions and "instruction" in exchange:
        exchanges.append(exchange)
    unknown = [] if questions else [UNKNOWN_ROLE] * (len(spoken) - len(known_turns))
    return (exchanges or [{}]) + unknown


def _join_contents(contents: list):
    """The contents of turns in a row by one speaker, or one of them that is not text."""
    contents = [c for c in contents if c is not None and c != ""] or contents[:1]
    odd = [c for c in contents if not isinstance(c, str)]
    return odd[0] if odd else "\n\n".join(contents)


def invalid_reason(fields: dict | str, wanted: tuple[str, ...]) -> str | None:
    """Why this content cannot be trained on, or None where every wanted field is valid text."""
    if isinstance(fields, str):
        return fields
    for name in wanted:
        value = fields.get(name)
        if name not in fields:
            return f"{name} missing"
        if not isinstance(value, str):
            return f"{name} is {'null' if value is None else type(value).__name__}, not text"
        if not value.strip():
            return f"{name} empty"
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{name} with a lone surrogate"
    return None


def valid_fields(fields: dict | str) -> dict[str, str]:
    """The fields of this content that can be trained on."""
    return {f: fields[f] for f in (*COLUMNS, "text") if not invalid_reason(fields, (f,))}
