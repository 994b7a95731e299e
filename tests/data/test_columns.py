"""What a record holds, by the names of its columns, and what of it is left out."""

import decimal
import json

import numpy as np
import pytest

from bdh_lib.data import chats, columns
from bdh_lib.data.formats import format_prompt, training_texts
from bdh_mlx import UserError

SYSTEM, INSTRUCTION, RESPONSE = ("system", "s"), ("instruction", "q"), ("response", "a")


def chat(*turns, **others):
    return {"messages": [{"role": role, "content": text} for role, text in turns]} | others


def texts(record, mode="full"):
    turns = columns.parse_record(record).turns
    return ["".join(piece for _, piece in text) for text in training_texts(turns, mode)[0]]


RECORDS = {
    "ours": ({"system": "s", "instruction": "q", "response": "a"}, [SYSTEM, INSTRUCTION, RESPONSE]),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [("instruction", "Add.\n\n1 2"), ("response", "3")],
    ),
    "history": (
        {"instruction": "q", "input": "c", "output": "a", "system": "s", "history": [["1", "2"]]},
        [SYSTEM, ("instruction", "1"), ("response", "2"), ("instruction", "q\n\nc"), RESPONSE],
    ),
    "no history": ({"instruction": "q", "output": "a", "history": []}, [INSTRUCTION, RESPONSE]),
    "history that is none": (
        {"instruction": "q", "output": "a", "history": [["1", None]]},
        [INSTRUCTION, RESPONSE],
    ),
    "no input": ({"instruction": "q", "input": "", "output": "a"}, [INSTRUCTION, RESPONSE]),
    "input alone": ({"input": "q", "output": "a"}, [INSTRUCTION, RESPONSE]),
    "Dolly": (
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        [("instruction", "q\n\nc"), RESPONSE],
    ),
    "capitals": ({"Instruction": "q", " RESPONSE ": "a"}, [INSTRUCTION, RESPONSE]),
    "OpenOrca": (
        {"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
        [SYSTEM, INSTRUCTION, RESPONSE],
    ),
    "SQuAD": (
        {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [3]}},
        [("instruction", "q\n\nc"), RESPONSE],
    ),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [INSTRUCTION, RESPONSE]),
    "numbers": (
        {"question": 5, "answer": 4.5, "system": True},
        [("system", "true"), ("instruction", "5"), ("response", "4.5")],
    ),
    "decimals": (
        {"question": "q", "answer": decimal.Decimal("1.50")},
        [INSTRUCTION, ("response", "1.50")],
    ),
    "text": ({"text": "plain", "url": "u"}, [("text", "plain")]),
    "messages": (
        chat(("system", "s"), ("user", "q"), ("assistant", "a")),
        [SYSTEM, INSTRUCTION, RESPONSE],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [INSTRUCTION, RESPONSE],
    ),
    "LMSYS": (
        {"conversation": [{"role": "user", "content": "q"}, {"role": "chatgpt", "content": "a"}]},
        [INSTRUCTION, RESPONSE],
    ),
    "system beside a chat": (
        chat(("user", "q"), ("assistant", "a"), system="s"),
        [SYSTEM, INSTRUCTION, RESPONSE],
    ),
    "bare list": (
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [INSTRUCTION, RESPONSE],
    ),
    "TRL": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        [SYSTEM, INSTRUCTION, RESPONSE],
    ),
    "TRL, preferences": (
        {
            "prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
        [INSTRUCTION, RESPONSE],
    ),
    "text and a reply in turns": (
        {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]},
        [INSTRUCTION, RESPONSE],
    ),
    "chat as JSON": (
        {"messages": json.dumps(chat(("user", "q"), ("assistant", "a"))["messages"])},
        [INSTRUCTION, RESPONSE],
    ),
    "turns as JSON": (
        {"messages": [json.dumps(t) for t in chat(("user", "q"), ("assistant", "a"))["messages"]]},
        [INSTRUCTION, RESPONSE],
    ),
    "TRL as JSON": (
        {
            "prompt": '[{"role": "user", "content": "q"}]',
            "completion": '[{"role": "assistant", "content": "a"}]',
        },
        [INSTRUCTION, RESPONSE],
    ),
    "JSON that is not a chat": (
        {"prompt": "q", "completion": '[{"from": "Rome", "value": 5}]'},
        [INSTRUCTION, ("response", '[{"from": "Rome", "value": 5}]')],
    ),
    "brackets that are not JSON": (
        {"prompt": "[" * 100_000, "completion": "{a}"},
        [("instruction", "[" * 100_000), ("response", "{a}")],
    ),
    "LLaMA-Factory, preferences": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [INSTRUCTION, RESPONSE],
    ),
    "a question in turns and a text": (chat(("user", "q"), answer="a"), [INSTRUCTION, RESPONSE]),
    "a whole chat and a text": (
        chat(("user", "q"), ("assistant", "a"), answer="b"),
        [INSTRUCTION, RESPONSE],
    ),
    "LIMA": (
        {"conversations": ["q", "a", "and?"], "source": "x"},
        [INSTRUCTION, RESPONSE, ("instruction", "and?")],
    ),
    "Open-Assistant": (
        {"conversation": [{"role": "prompter", "text": "q"}, {"role": "assistant", "text": "a"}]},
        [INSTRUCTION, RESPONSE],
    ),
    "Claude": (
        {"messages": [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "a"}]},
        [INSTRUCTION, RESPONSE],
    ),
    "Gemini": (
        {
            "messages": [
                {"role": "user", "parts": [{"text": "q"}]},
                {"role": "model", "parts": [{"text": "a"}]},
            ]
        },
        [INSTRUCTION, RESPONSE],
    ),
    "turns of a table with keys of two kinds": (
        {
            "messages": [
                {"role": None, "content": None, "from": "human", "value": "q"},
                {"role": "assistant", "content": "a", "from": None, "value": None},
            ]
        },
        [INSTRUCTION, RESPONSE],
    ),
    "an empty list of turns": (
        {"messages": [], "instruction": "q", "answers": [], "output": "a"},
        [INSTRUCTION, RESPONSE],
    ),
    "only chat, of another name": (
        {"id": 1, "dialogue": [{"role": "user", "content": "q"}], "tools": [{"name": "t"}]},
        [INSTRUCTION],
    ),
    "only chat, within an object": (
        {"url": "u", "body": {"messages": [{"role": "user", "content": "q"}], "model": "m"}},
        [INSTRUCTION],
    ),
    "parts": (
        chat(("user", [{"type": "text", "text": "q"}]), ("assistant", ["a"])),
        [INSTRUCTION, RESPONSE],
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_structure_gives_its_turns(name):
    record, turns = RECORDS[name]
    assert columns.parse_record(record).turns == turns


@pytest.mark.parametrize("field", [field for field in columns.ALIASES if field != "choices"])
def test_every_documented_name_of_a_column_is_read(field):
    for name in columns.ALIASES[field]:
        record = {"instruction": "i", name.upper(): "x"} if field == "context" else {name: "x"}
        if field == "messages":
            record = {name: [{"role": "user", "content": "x"}]}
        if field == "label":
            record = {"response": "x", name: True}
        if field == "history":
            record = {"instruction": "i", name: [["x", "y"]]}
        parsed = columns.parse_record(record)
        assert "x" in parsed.turns[0][1] and set(parsed.columns) == set(record)


def test_columns_that_are_not_read_are_named_with_their_bytes():
    record = {"question": "q", "answer": "a", "solution": "é", "score": 1.5, "tags": ["x"], "n": ""}
    unused = dict(columns.unused_values(record, columns.parse_record(record)))
    assert unused == {"solution": 2, "score": 3, "tags": 5}


@pytest.mark.parametrize(
    "choices",
    [["w", "x"], {"text": ["w", "x"], "label": ["A", "B"]}, {"A": "w", "B": "x"}, "['w' 'x']"],
)
def test_a_response_that_points_at_a_choice_is_none(choices):
    for response in ("1", 1, "B"):
        record = {"question": "q", "choices": choices, "answer": response}
        parsed = columns.parse_record(record)
        assert parsed.turns == [INSTRUCTION]
        assert parsed.reason("response").startswith("response is the number or letter of one of")
        kept = columns.parse_record(record, "choices=").turns
        assert kept == [INSTRUCTION, ("response", str(response))]
    for response, reason in (("w", None), ("either", None), ("", "response empty")):
        record = {"question": "q", "options": ["w", "x"], "answer": response}
        problem = columns.parse_record(record).problems.get("response")
        assert (problem and problem.reason) == reason


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        ([], "5"),
        (["4", "5"], "5"),
        ('["4","5"]', "5"),
        ("['4', '5']", "5"),
        ({"A": "4", "B": "5"}, "5"),
        ({"text": ["4", "5"], "label": ["A", "B"]}, "5"),
        ({"temperature": "0.7"}, "!"),
        ({"temperature": "0.7"}, "7"),
    ],
)
def test_a_short_answer_that_points_at_no_choice_is_one(choices, answer):
    record = {"question": "q", "options": choices, "answer": answer}
    assert columns.parse_record(record).turns == [INSTRUCTION, ("response", answer)]


def test_a_response_beside_a_chat_is_read_or_named():
    for turns, names in (([("user", "q")], ()), ([("user", "q"), ("assistant", "a")], ("answer",))):
        record = chat(*turns, answer="b")
        assert (*columns.unused_values(record, columns.parse_record(record)),) == names
    empty = columns.parse_record(chat(("user", "q"), answer=""))
    assert empty.turns == [INSTRUCTION] and not empty.left_out


def test_values_of_an_object_are_columns():
    record = {"translation": {"en": "q", "fr": "a", "de": "z"}, "meta": {"n": 5}}
    chosen = "instruction=translation.en,response=translation.fr"
    parsed = columns.parse_record(record, chosen)
    assert parsed.turns == [INSTRUCTION, RESPONSE]
    assert columns.unused_values(record, parsed) == {"translation.de": 1, "meta": 8}
    unread = columns.parse_record(record)
    assert unread.kind == "unknown" and not unread.turns
    names = {*columns.unused_values(record, unread)}
    assert names == {"translation.en", "translation.fr", "translation.de", "meta.n"}
    squad = {"question": "q", "answers": {"text": ["a"], "answer_start": [3]}}
    assert not columns.unused_values(squad, columns.parse_record(squad))


def test_one_of_two_chats_is_not_guessed():
    turns = [{"role": "user", "content": "q"}]
    record = {"one": turns, "two": turns}
    assert columns.parse_record(record).kind == "unknown"
    assert columns.parse_record(record, "messages=two").columns == ("two",)
    assert columns.parse_record({"one": turns}, "text=two").kind == "unknown"


def test_a_history_that_is_not_read_is_named():
    for history in ([["1", None]], [["1"]], ["1"], "1", {"a": 1}):
        record = {"instruction": "q", "output": "a", "history": history}
        assert [*columns.unused_values(record, columns.parse_record(record))] == ["history"]
    record = {"output": "a", "history": [["1", "2"]]}
    assert [*columns.unused_values(record, columns.parse_record(record))] == ["history"]


def test_a_value_of_any_type_may_stand_beside_the_text():
    record = {"prompt": "q", "completion": "a", "pixels": np.array([1, 2]), "none": None}
    parsed = columns.parse_record(record)
    assert parsed.turns == [INSTRUCTION, RESPONSE]
    assert [*columns.unused_values(record, parsed)] == ["pixels"]


def test_keys_of_turns_that_are_not_read_are_named_with_their_bytes():
    record = chat(("user", "q"), ("assistant", "a"), ("tool", "t"))
    record["messages"][1] |= {"reasoning_content": "thé", "name": None, "tool_calls": []}
    record["messages"][2] |= {"tool_call_id": "c1", "text": "other"}
    keys = {"reasoning_content": 4, "tool_call_id": 2, "text": 5}
    as_json = {"messages": json.dumps(record["messages"])}
    for column, given in (("messages", record), ("", record["messages"]), ("messages", as_json)):
        unused = columns.unused_values(given, columns.parse_record(given))
        assert unused == {f"{column}[].{key}": size for key, size in keys.items()}


@pytest.mark.parametrize(
    ("chosen", "turns"),
    [
        (
            "instruction=query,response=reply,system=persona,context=passage",
            [("system", "s"), ("instruction", "q\n\nc"), ("response", "a")],
        ),
        ("system=Persona, context=", [("system", "s"), ("instruction", "q"), ("response", "a")]),
        ("response=passage", [("instruction", "q"), ("response", "c")]),
        ("messages=turns", [("instruction", "x"), ("response", "a")]),
        ("messages=turns,response=", [("instruction", "x")]),
        ("text=persona,instruction=,response=", [("text", "s")]),
    ],
)
def test_columns_may_be_named(chosen, turns):
    record = {"persona": "s", "query": "q", "passage": "c", "reply": "a"}
    record["turns"] = [{"role": "user", "content": "x"}]
    assert columns.parse_record(record, chosen).turns == turns


@pytest.mark.parametrize("chosen", ["instruction", "answer=x", "response=a,response=b", "=", ","])
def test_names_of_columns_that_mean_nothing_are_refused(chosen):
    with pytest.raises(UserError, match="must be like instruction=query,response=answer"):
        columns.parse_columns_setting(chosen)


@pytest.mark.parametrize(
    ("record", "problems"),
    [
        ({"instruction": "q", "response": None}, {"response": "response is null, not text"}),
        ({"instruction": {"a": 1}}, {"instruction": "instruction is dict, not text"}),
        ({"instruction": "q", "context": {"a": 1}}, {"instruction": "context is dict, not text"}),
        ({"instruction": " ", "response": "\ud800"}, {"instruction": "instruction empty"}),
        ({"response": float("nan")}, {"response": "response is float, not text"}),
        ({"question": "q", "answers": {"text": []}}, {"response": "response empty"}),
        *(
            ({"question": "q", "answers": answers}, {"response": "response is a record of answers"})
            for answers in (
                '{"text": ["a"], "answer_start": [1]}',
                "{'text': array(['a'], dtype=object), 'answer_start': array([1])}",
                "{'answer_start': [1], 'text': ['a']}",
            )
        ),
        ({"text": 5}, {}),
        ({"other": 1}, {}),
    ],
)
def test_what_is_no_text_has_a_reason(record, problems):
    parsed = columns.parse_record(record)
    assert bool(parsed.problems) == bool(problems)
    for field, reason in problems.items():
        assert parsed.problems[field].reason.startswith(reason)
        assert field not in dict(parsed.turns)


def test_turns_in_a_row_are_one_by_a_blank_line():
    asked = [("user", "Here is my text"), ("user", ""), ("user", "Sum it up")]
    record = chat(
        ("system", "s"), ("developer", "t"), *asked, ("assistant", "a"), ("assistant", "b")
    )
    parsed = columns.parse_record(record)
    assert parsed.turns == [
        ("system", "s\n\nt"),
        ("instruction", "Here is my text\n\nSum it up"),
        ("response", "a\n\nb"),
    ]
    assert parsed.left_out == ["turn empty"]


@pytest.mark.parametrize("reply", ["assistant", "gpt", "chatgpt", "model", "bot", "ai", "Model"])
@pytest.mark.parametrize("ask", ["user", "human", "Human", "prompter"])
@pytest.mark.parametrize("system", ["system", "developer", "System"])
def test_roles_by_other_names(system, ask, reply):
    parsed = columns.parse_record(chat((system, "s"), (ask, "q"), (reply, "a")))
    assert parsed.turns == [SYSTEM, INSTRUCTION, RESPONSE]


def test_calls_of_tools_are_left_out_and_the_question_is_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    record = chat(("user", "price?"))
    record["messages"] += [call, {"role": "tool", "content": "3"}]
    record["messages"] += [{"role": "assistant", "content": "It is 3"}]
    parsed = columns.parse_record(record)
    assert parsed.turns == [("instruction", "price?"), ("response", "It is 3")]
    assert parsed.left_out == [chats.TOOL_CALL, chats.TOOL_ANSWER]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": "0"}, {"weight": 0.0}, {"train": False}, {"loss": "False"}]
)
def test_a_reply_that_is_marked_as_not_to_train_on_is_left_out(mark):
    record = chat(("user", "q"), ("assistant", "wrong"), ("user", "no"), ("assistant", "a"))
    for turn in record["messages"][:2]:
        turn |= mark  # a question is context in any case
    record["messages"][3] |= {"weight": 1, "train": None}
    parsed = columns.parse_record(record)
    assert parsed.turns == [("instruction", "q\n\nno"), RESPONSE]
    assert parsed.left_out == [chats.NOT_TO_TRAIN_ON]
    assert not columns.unused_values(record, parsed)


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_a_response_that_is_labelled_as_bad_is_no_response(name):
    pair = {"prompt": "q", "completion": "a"}
    for record in (pair, chat(("user", "q"), ("assistant", "a"))):
        assert columns.parse_record(record | {name: True}).turns == [INSTRUCTION, RESPONSE]
        bad = columns.parse_record(record | {name: False})
        assert bad.turns == [INSTRUCTION] and bad.is_broken("response")
        assert bad.reason("response").startswith(f"{name} is false, for a bad response")
        kept = columns.parse_record(record | {name: False}, "label=")
        assert kept.turns == [INSTRUCTION, RESPONSE]
        in_a_table = columns.parse_record(record | {name: "False"})
        assert in_a_table.turns == [INSTRUCTION] and in_a_table.is_broken("response")
        for label in (0, "0", None, "True"):  # a class, as in data for classifiers
            assert columns.parse_record(record | {name: label}).turns == [INSTRUCTION, RESPONSE]
    assert columns.parse_record({"text": "a", name: False}).turns == [("text", "a")]


def test_each_turn_that_is_left_out_has_a_reason():
    image = [{"type": "image_url"}, {"type": "text", "text": "q"}]
    record = chat(("assistant", "Hi!"), ("user", image), ("narrator", "x"), ("assistant", "a"))
    record["messages"] += [5, {"role": "user", "content": {"a": 1}}]
    as_json = {"messages": [json.dumps(turn) for turn in record["messages"] if turn != 5]}
    assert columns.parse_record(as_json).turns == [INSTRUCTION, RESPONSE]
    parsed = columns.parse_record(record)
    assert parsed.turns == [INSTRUCTION, RESPONSE]
    assert sorted(parsed.left_out) == sorted(
        [
            "part of a turn, of type image_url",
            chats.UNKNOWN_ROLE,
            "turn that is int, not an object",
            "turn is dict, not text",
            chats.NO_QUESTION,
        ]
    )


def test_a_reply_needs_a_question_since_the_last_reply():
    between = chat(("user", "q"), ("system", "s"), ("assistant", "a"))
    assert columns.parse_record(between).turns == [INSTRUCTION, SYSTEM, RESPONSE]
    after = chat(("user", "q"), ("assistant", "a"), ("system", "s"), ("assistant", "b"))
    parsed = columns.parse_record(after)
    assert parsed.turns == [INSTRUCTION, RESPONSE, SYSTEM]
    assert parsed.left_out == [chats.NO_QUESTION]


def test_the_last_system_text_is_the_one_of_a_question():
    first = [("system", "s"), ("user", "1"), ("assistant", "2")]
    record = chat(*first, ("system", "t"), ("user", "3"))
    assert texts(record, "both") == [
        "### System:\ns\n\n### Instruction:\n1",
        "### System:\nt\n\n### Instruction:\n3",
    ]
    turns = columns.parse_record(record).turns
    assert format_prompt(turns, "both") == "### System:\nt\n\n### Instruction:\n3"
    assert format_prompt(turns, "system") == "t"


LONG = chat(("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))


def test_a_chat_is_one_text_of_full_and_one_of_each_question_elsewhere():
    assert texts(LONG) == [
        "### System:\ns\n\n### Instruction:\n1\n\n### Response:\n2"
        "\n\n### Instruction:\n3\n\n### Response:\n4\n---"
    ]
    assert texts(LONG, "instruction") == ["1", "3"]
    assert texts(LONG, "both") == [
        "### System:\ns\n\n### Instruction:\n1",
        "### System:\ns\n\n### Instruction:\n3",
    ]
    assert texts(LONG, "system") == ["s"]


def test_a_question_at_the_end_of_a_chat_is_asked_and_not_trained_on_in_full():
    open_chat = {"messages": [*LONG["messages"], {"role": "user", "content": "5"}]}
    assert texts(open_chat) == texts(LONG)
    assert texts(open_chat, "instruction") == ["1", "3", "5"]
    turns = columns.parse_record(open_chat).turns
    assert format_prompt(turns, "full") == (
        texts(LONG)[0].removesuffix("\n---") + "\n\n### Instruction:\n5\n\n### Response:\n"
    )
    assert format_prompt(turns, "instruction") == "5"
    assert format_prompt(turns, "both") == "### System:\ns\n\n### Instruction:\n5"
