"""The turns of a chat: which role each has, and what of them can be trained on."""

import json
from collections.abc import Sequence
from itertools import cycle, groupby

from bdh_lib.data.formats import SEPARATOR
from bdh_lib.data.values import find_problem, scalar_to_text, type_name

ROLES_BY_FIELD = {  # the roles of a chat by field, in small letters
    "system": ("system", "developer"),
    "instruction": ("user", "human", "prompter"),
    "response": ("assistant", "gpt", "chatgpt", "model", "bot", "ai"),
}
FIELD_OF = {role: field for field, roles in ROLES_BY_FIELD.items() for role in roles}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")  # left out
# Keys of a turn. Some make a list of objects a chat; in one the first that has a value counts
CHAT_ROLE_KEYS, CHAT_CONTENT_KEYS = ("role", "from"), ("content", "value")
ROLE_KEYS = (*CHAT_ROLE_KEYS, "sender", "speaker")
CONTENT_KEYS = (*CHAT_CONTENT_KEYS, "text", "parts")
CALL_KEYS = ("tool_calls", "function_call")  # of tools
LOSS_MASK_KEYS = ("weight", "train", "trainable", "loss")  # 0 or false: not to train on the turn
UNKNOWN_ROLE = f"turn of a role that is none of {', '.join(FIELD_OF)}"
TOOL_CALL, TOOL_ANSWER = "reply that only calls tools", "answer of a tool"
NO_QUESTION = "reply without a question before it"
NOT_TO_TRAIN_ON = "reply that is marked as not to train on"


def is_chat(value) -> bool:
    """Tell whether this is a list of turns, each with a role and a content."""
    if not isinstance(value, list) or not value:
        return False
    contents = {*CHAT_CONTENT_KEYS, *CALL_KEYS}
    return all(
        isinstance(turn, dict) and {*turn} & {*CHAT_ROLE_KEYS} and {*turn} & contents
        for turn in value
    )


def as_turns(value):
    """Return turns that are written as JSON, in one text or one each; or the value as it is."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(t, str) and t[:1] in ("[", "{") for t in texts):
        return value
    try:
        turns = [json.loads(text, parse_int=str, parse_float=str) for text in texts]
    except (ValueError, RecursionError):
        return value
    if isinstance(value, list):
        return turns if is_chat(turns) else value
    known = (*FIELD_OF, *TOOL_ROLES)  # else it may be a text that only looks like a chat
    is_known = is_chat(turns[0]) and all(_role(turn) in known for turn in turns[0])
    return turns[0] if is_known else value


def alternate(turns: list) -> list:
    """Return turns that are plain texts, as LIMA has them, as those of a user and an assistant."""
    if len(turns) < 2 or not all(isinstance(turn, str) for turn in turns):
        return turns
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def turns_of(instruction, response) -> list | None:
    """Return the turns of a prompt and a reply, of which one is a list of turns, as in TRL."""
    if not is_chat(instruction) and not is_chat(response):
        return None
    if is_chat(response) and field_of(response[0]) != "response":
        return response  # it repeats the prompt
    ask = instruction if is_chat(instruction) else [{"role": "user", "content": instruction}]
    if response is None:
        return ask
    return ask + (response if is_chat(response) else [{"role": "assistant", "content": response}])


def field_of(turn: dict) -> str | None:
    """Return the field that a turn is of by its role, None if the role is unknown."""
    return FIELD_OF.get(_role(turn))


def _role(turn: dict) -> str:
    return str(turn.get(_first_key(turn, ROLE_KEYS))).strip().lower()


def _first_key(turn: dict, keys: Sequence[str]) -> str | None:
    """Return the first key that has a value: tables give every turn all keys."""
    for key in keys:  # a generator takes twice the time
        if turn.get(key) is not None:
            return key
    return None


def unused_keys(turn: dict) -> list[str]:
    """Return the keys of a turn whose values are not read."""
    used = (_first_key(turn, ROLE_KEYS), _first_key(turn, CONTENT_KEYS), *LOSS_MASK_KEYS)
    return [key for key in turn if key not in used]


def parse_chat(turns: list) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the field and text of each turn of a chat, and a reason for each that is left out.

    Turns in a row of one field are one, joined by a blank line.
    """
    left_out, spoken = [], []
    for turn in turns:
        field, text, reasons = _parse_turn(turn)
        left_out += reasons
        if text is not None:
            spoken.append((field, text))
    joined = [
        (field, SEPARATOR.join(text for _, text in group))
        for field, group in groupby(spoken, lambda turn: turn[0])
    ]
    has_question = False
    result = []
    for field, text in joined:
        if field == "response" and not has_question:
            left_out.append(NO_QUESTION)
            continue
        has_question = field == "instruction" or (has_question and field == "system")
        result.append((field, text))
    return result, left_out


def _parse_turn(turn) -> tuple[str, str | None, list[str]]:
    """Return the field and the text (or None) of a turn, and the reasons for what is left out."""
    if not isinstance(turn, dict):
        return "", None, [f"turn that is {type_name(turn)}, not an object"]
    role, content = _role(turn), turn.get(_first_key(turn, CONTENT_KEYS))
    if role in TOOL_ROLES:
        return "", None, [TOOL_ANSWER if role != "function_call" else TOOL_CALL]
    if role not in FIELD_OF:
        return "", None, [UNKNOWN_ROLE]
    if FIELD_OF[role] == "response" and any(_is_off(turn.get(key)) for key in LOSS_MASK_KEYS):
        return "", None, [NOT_TO_TRAIN_ON]
    text, reasons = _join_parts(scalar_to_text(content))
    if problem := find_problem("turn", text):
        calls = any(turn.get(key) for key in CALL_KEYS)
        return "", None, [*reasons, TOOL_CALL if calls and not text else problem.reason]
    return FIELD_OF[role], text, reasons


def _is_off(value) -> bool:
    return value is not None and str(value).lower() in ("0", "0.0", "false")


def _join_parts(content) -> tuple[object, list[str]]:
    """Join a content that is a list of parts; also return a reason for each part without text."""
    if not isinstance(content, list):
        return content, []
    texts, left_out = [], []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type", "") if isinstance(part, dict) else type_name(part)
            left_out.append(f"part of a turn, of type {str(kind)[:30]}")
    return SEPARATOR.join(texts), left_out
