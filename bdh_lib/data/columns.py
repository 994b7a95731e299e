"""Which columns of a record are its system text, instruction and response, its chat or its text."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from bdh_lib.data.chats import (
    ROLES_BY_FIELD,
    alternate,
    as_turns,
    field_of,
    is_chat,
    parse_chat,
    turns_of,
    unused_keys,
)
from bdh_lib.data.formats import FIELDS, SEPARATOR
from bdh_lib.data.values import Problem, find_problem, is_absent, scalar_to_text
from bdh_lib.errors import UserError

ALIASES = {  # names of columns by what they hold, in small letters; the first one found counts
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "instruction": ("instruction", "prompt", "question", "query", "problem", "inputs", "input"),
    "response": (
        *("response", "output", "completion", "answer", "answers", "target", "targets"),
        *("reply", "solution", "chosen"),
    ),
    "context": ("context", "input", "passage"),  # appended to the instruction
    "history": ("history",),  # pairs of a question and a reply before the instruction
    "choices": ("choices", "options"),  # a response that is the number of one is none
    "text": ("text",),
    "label": ("label", "kto_tag"),  # false: the response is an example of a bad one
}
BAD_RESPONSE = "{} is false, for a bad response (to train on it all the same: --columns label=)"
ANSWERS = re.compile(r"\{['\"](text|answer_start)['\"]: *(\[|array\()")  # SQuAD's, in a CSV
ONE_OF_CHOICES = (
    "response is the number or letter of one of {} (to train on it all the same: "
    "--columns choices=)"
)
UNREAD = {  # why a column that COLUMNS names for one of these fields is read in no record
    "messages": "holds no chat: messages=COLUMN takes turns with a role and a content, or their "
    "JSON; plain text is system=, instruction= or response=COLUMN",
    "history": "holds no chat: history=COLUMN takes pairs of a question and a reply, before an "
    "instruction",
    "text": "is not read beside a system text, an instruction or a response; system=, "
    "instruction= and response= without a column leave those out",
}
FURTHER_ANSWER = "answers beside the first one of a record"


class Parsed(NamedTuple):
    """What a record holds that can be trained on, and what of it is left out."""

    kind: str  # "chat", "fields", "text", or "unknown" where nothing can be read
    structure: str  # a name for people, by the columns that are read
    columns: tuple[str, ...] = ()
    turns: Sequence[tuple[str, str]] = ()  # (field of formats.FIELDS, text), in their order
    problems: Mapping[str, Problem] = MappingProxyType({})  # by field that is not among the turns
    left_out: Sequence[str] = ()  # a reason for each turn, or part of one, that is not

    def reason(self, field: str) -> str:
        """Say why a field is not among the turns."""
        return self.problems[field].reason if field in self.problems else f"{field} missing"

    def is_broken(self, field: str) -> bool:
        """Say whether a field is there and cannot be trained on."""
        return field in self.problems and not self.problems[field].is_absent


def parse_columns_setting(setting: str | None) -> dict[str, str]:
    """Return the columns by field of COLUMNS, as in "instruction=query,context=", where "" is none.

    Raises UserError.
    """
    result = {}
    for pair in setting.split(",") if setting else []:
        field, equals, column = map(str.strip, pair.partition("="))
        if not equals or field not in ALIASES or field in result:
            raise UserError(
                f"COLUMNS is {setting!r}, with {pair!r} in it; it must be like "
                f"instruction=query,response=answer: fields among {', '.join(ALIASES)}, each once, "
                "and the columns of the data"
            )
        result[field] = column
    return result


def check_read(setting: str | None, read: Collection[str], unused: Collection[str]) -> None:
    """Raise UserError if COLUMNS names a column that is filled and read in no record.

    `read` and `unused` are the names of columns that are read in a record, and that are not.
    """
    read = {name.strip().lower() for name in read}
    unread = {name.strip().lower() for name in unused} - read
    for field, column in parse_columns_setting(setting).items():
        if field in UNREAD and column.lower() in unread:
            raise UserError(f"COLUMNS is {setting!r}, and {column} {UNREAD[field]}")


@lru_cache(maxsize=1024)
def choose_columns(names: tuple[str, ...], setting: str | None = None) -> dict[str, str]:
    """Return the column by field of a record with columns of these names.

    COLUMNS chooses first, then ALIASES do.
    """
    by_name = {name.strip().lower(): name for name in reversed(names)}
    chosen = parse_columns_setting(setting)
    result = {f: c if c in names else by_name.get(c.lower()) for f, c in chosen.items()}
    for field, aliases in ALIASES.items():
        if field not in chosen:
            free = (by_name[a] for a in aliases if a in by_name)
            result[field] = next((name for name in free if name not in result.values()), None)
    return {field: name for field, name in result.items() if name is not None}


def parse_record(record: dict | list | str, setting: str | None = None) -> Parsed:
    """Find what a record holds: a chat, the fields of an instruction, or plain text.

    COLUMNS names its columns. A bare list is a chat; a str says why the record is unreadable.
    """
    if isinstance(record, str):
        return Parsed("unknown", "unreadable", problems=dict.fromkeys(FIELDS, Problem(record)))
    if isinstance(record, list):
        return _chat("list of turns", record, ())
    record = with_nested(record)
    names = _columns_of(record, setting)
    values = {field: as_turns(record[name]) for field, name in names.items()}
    parsed = _parse_known_columns(values, names) or _parse_only_chat(record, setting)
    if parsed is None:
        return Parsed("unknown", f"unknown ({', '.join(record)[:80]})")
    return _without_bad_response(parsed, values, names)


def with_nested(record: dict) -> dict:
    """Return a record with the values of each of its objects as columns, too: "translation.en"."""
    objects = [(name, value) for name, value in record.items() if isinstance(value, dict)]
    return record | {f"{name}.{key}": v for name, value in objects for key, v in value.items()}


def _parse_only_chat(record: dict, setting: str | None) -> Parsed | None:
    """Return the chat of a record without columns of known names, if it holds just one."""
    chats = {name: turns for name in record if is_chat(turns := as_turns(record[name]))}
    if setting or len(chats) != 1:
        return None
    name, turns = chats.popitem()
    return _chat(name, turns, (name,))


def _parse_known_columns(values: dict, names: dict[str, str]) -> Parsed | None:
    """Return what the columns by field hold, or None if no field has one."""
    messages = values.get("messages")
    has_fields = values.keys() & {"instruction", "response"}
    if isinstance(messages, list) and (messages or not has_fields):
        return _parse_messages(values, names, alternate(messages))
    if messages is not None and not has_fields:
        name = names["messages"]
        problem = Problem(f"{name} is {type(messages).__name__}, not a list of turns or its JSON")
        return Parsed("unknown", name, (name,), (), dict.fromkeys(ROLES_BY_FIELD, problem))
    if (turns := turns_of(values.get("instruction"), values.get("response"))) is not None:
        return _parse_chat_columns(values, names, ("instruction", "response"), turns)
    if values.keys() & ROLES_BY_FIELD.keys():
        return _parse_fields(values, names)
    return _parse_text(values["text"], names["text"]) if "text" in values else None


def _parse_messages(values: dict, names: dict[str, str], turns: list) -> Parsed:
    """Return a chat; where a question ends it, the response may stand in a column of its own."""
    response = values.get("response")
    is_open = is_chat(turns) and field_of(turns[-1]) == "instruction"
    if not is_open or is_absent(response):
        return _parse_chat_columns(values, names, ("messages",), turns)
    turns = turns_of(turns, [response] if isinstance(response, dict) else response)
    return _parse_chat_columns(values, names, ("messages", "response"), turns)


def _without_bad_response(parsed: Parsed, values: dict, names: dict[str, str]) -> Parsed:
    """Leave out the responses of a record whose label is false, as KTO has them."""
    label = str(values.get("label")).strip().lower()  # in a table it is text
    if label not in ("true", "false") or "response" not in dict(parsed.turns):
        return parsed
    parsed = parsed._replace(columns=(*parsed.columns, names["label"]))
    if label == "true":
        return parsed
    turns = [turn for turn in parsed.turns if turn[0] != "response"]
    problem = Problem(BAD_RESPONSE.format(names["label"]))
    return parsed._replace(turns=turns, problems={**parsed.problems, "response": problem})


def _columns_of(record: dict, setting: str | None) -> dict[str, str]:
    """Return the column of each field.

    Tables give every record all columns, so one that is null or empty counts where no other does.
    """
    filled = tuple(name for name, value in record.items() if not is_absent(value))
    names = dict(choose_columns(filled, setting))
    if len(filled) < len(record) and not names.keys() & {"messages", "text"}:
        others = choose_columns(tuple(record), setting).items()
        names |= {f: name for f, name in others if f not in names and name not in names.values()}
    return names


def _parse_text(value, column: str) -> Parsed:
    if problem := find_problem("text", text := scalar_to_text(value)):
        return Parsed("text", "text", (column,), (), {"text": problem})
    return Parsed("text", "text", (column,), [("text", text)])


def _parse_fields(values: dict, names: dict[str, str]) -> Parsed:
    """Take each field from a column of its own; the context is appended to the instruction."""
    fields = [field for field in (*ROLES_BY_FIELD, "context") if field in values]
    texts = {field: scalar_to_text(values[field]) for field in fields}
    left_out = []
    if "response" in texts:
        texts["response"], has_more = _first_answer(texts["response"])
        if has_more:
            left_out.append(FURTHER_ANSWER)
    problems = {
        field: find_problem(field, texts[field]) for field in ROLES_BY_FIELD if field in texts
    }
    if _is_choice(texts.get("response"), values.get("choices")):
        problems["response"] = Problem(ONE_OF_CHOICES.format(names["choices"]))
    if isinstance(texts.get("response"), str) and ANSWERS.match(texts["response"]):
        problems["response"] = Problem("response is a record of answers as text, not an answer")
    if "instruction" in texts and "context" in texts:
        texts["instruction"], problems["instruction"] = _append_context(**texts)
    problems = {field: problem for field, problem in problems.items() if problem}
    turns = [(f, texts[f]) for f in ROLES_BY_FIELD if f in texts and f not in problems]
    if (history := _parse_history(values.get("history"))) and "instruction" in dict(turns):
        at = turns.index(("instruction", texts["instruction"]))
        turns[at:at] = history
        texts["history"] = history
    order = ("system", "history", "instruction", "context", "response")
    read = [names[f] for f in order if f in texts and (f != "context" or "instruction" in texts)]
    return Parsed("fields", "/".join(read), tuple(read), turns, problems, left_out)


def _is_choice(response, choices) -> bool:
    """Tell whether a response only points at one of several choices beside it, as 3 or B do."""
    answer = response.strip() if isinstance(response, str) else ""
    if len(answer) != 1 or not answer.isalnum():
        return False
    if isinstance(choices, str):
        with suppress(ValueError, RecursionError):
            choices = json.loads(choices)
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # beside their labels
        choices = choices["text"]
    if isinstance(choices, dict):
        points = answer in choices or (answer.isdigit() and len(choices) > 1)
        return points and answer not in map(str, choices.values())
    if isinstance(choices, list):
        return len(choices) > 1 and answer not in map(str, choices)
    is_list = isinstance(choices, str) and choices[:1] in ("[", "{")  # as Python prints it
    return is_list and not re.search(rf"['\"]{answer}['\"]", choices)


def _parse_history(value) -> list[tuple[str, str]]:
    """Return the turns of pairs of a question and a reply; none where one of them is not text."""
    pairs = value if isinstance(value, list) else []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return []
    turns = [turn for pair in pairs for turn in zip(("instruction", "response"), pair, strict=True)]
    return [] if any(find_problem(*turn) for turn in turns) else turns


def _append_context(instruction, context, **_others) -> tuple[object, Problem | None]:
    """Join both by a blank line; give also why the result cannot be trained on."""
    if isinstance(context, list) and all(isinstance(part, str) for part in context):
        context = SEPARATOR.join(context)
    problem = find_problem("context", context)
    if problem and not problem.is_absent:
        return instruction, problem
    if problem or not isinstance(instruction, str):
        return instruction, find_problem("instruction", instruction)
    text = SEPARATOR.join(part for part in (instruction, context) if part.strip())
    return text, find_problem("instruction", text)


def _first_answer(value) -> tuple[object, bool]:
    """Return the first of several answers, as SQuAD lists them, and whether there are others."""
    if isinstance(value, dict):
        value = value.get("text", value.get("value", value))
    if isinstance(value, list) and all(isinstance(answer, str) for answer in value):
        return (value[0] if value else ""), len(set(value)) > 1
    return value, False


def _parse_chat_columns(values: dict, names: dict[str, str], fields, turns: list) -> Parsed:
    """Return a chat in the columns of `fields`; a system text may stand in a column of its own."""
    read = [names[field] for field in names if field in fields]
    system = scalar_to_text(values.get("system"))
    if find_problem("system", system) is None:
        turns = [{"role": "system", "content": system}, *turns]
        read = [names["system"], *read]
    return _chat("/".join(read), turns, tuple(read))


def _chat(structure: str, turns: list, columns: tuple[str, ...]) -> Parsed:
    turns, left_out = parse_chat(turns)
    return Parsed("chat", structure, columns, turns, {}, left_out)


def unused_values(record: dict | list, parsed: Parsed) -> Counter:
    """Return the bytes by name of each column, and of each key of turns, that is not read.

    The name of a key of turns is as "messages[].reasoning_content".
    """
    sizes = Counter()
    is_table = isinstance(record, dict)
    for name, value in _columns_or_parts(record, parsed) if is_table else [("", record)]:
        if is_table and name not in parsed.columns:
            sizes[name] += _size(value)
        elif parsed.kind == "chat" and isinstance(value := as_turns(value), list):
            for turn in (turn for turn in value if isinstance(turn, dict)):
                for key in unused_keys(turn):
                    sizes[f"{name}[].{key}"] += _size(turn[key])
    return +sizes


def _columns_or_parts(record: dict, parsed: Parsed) -> Iterator[tuple[str, object]]:
    """Yield each column by name, and the values of an object instead of it.

    An object is taken apart where one of its values is read, or where nothing of the record is.
    """
    for name, value in record.items():
        parts = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {}
        is_whole = name in parsed.columns or (parsed.turns and not parts.keys() & {*parsed.columns})
        yield from [(name, value)] if is_whole or not parts else parts.items()


def _size(value) -> int:
    """Return the bytes of a value, which is JSON where it is not text; 0 where nothing is there."""
    if is_absent(value):
        return 0
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return len(text.encode(errors="surrogatepass"))
