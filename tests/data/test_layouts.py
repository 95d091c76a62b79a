"""Columns that rows come in, what else a row carries, and why a row is refused."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tpaw_core.config.params import Data
from tpaw_core.data.messages import Unusable
from tpaw_core.data.rows import Row, prompt_digest, read_rows, usable_row
from tpaw_core.errors import TpawError

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
REJECTED = {"role": "assistant", "content": "No."}


def row(item: Any, **settings: Any) -> Row:
    return usable_row(item, Data(path="rows.jsonl", **settings))


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SAME: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "Why?", "completion": "Because."},
    "conversational": {"prompt": [USER], "completion": [ANSWER]},
    "messages and text": {"prompt": [USER], "completion": "Because."},
    "messages": {"messages": [USER, ANSWER], "prompt": "Why?", "id": 3},
    "parts": {"messages": [{**USER, "content": parts("Wh", "y?")}, {**ANSWER, "content": ["Because."]}]},
    "parts of Arrow": {"messages": [{**USER, "content": [{**parts("Why?")[0], "image_url": None}]}, ANSWER]},
    "keys of Arrow": {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": []}], "tools": []},
    "weight 1": {"messages": [USER, {**ANSWER, "weight": 1}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    "conversations of OpenAI's": {"conversations": [USER, ANSWER]},
    "pair": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    "pair of messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [REJECTED]},
    "pair with the prompt in it": {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, REJECTED]},
    "pair without a prompt": {"chosen": [USER, ANSWER], "rejected": [USER, REJECTED]},
    "Alpaca": {"instruction": "Why?", "input": "", "output": "Because."},
    "Alpaca without input": {"instruction": "Why?", "output": "Because.", "system": "", "history": []},
    "what its prompt holds, again": {"messages": [USER, ANSWER], "question": " Why? ", "context": [], "Input": ""},
    "good by its label": {"prompt": "Why?", "completion": "Because.", "label": True},
}


@pytest.mark.parametrize("name", SAME)
def test_a_row_is_the_same_in_every_layout(name: str) -> None:
    found = row(SAME[name])
    identity = json.dumps([[USER], "Because."], ensure_ascii=False).encode()
    assert found == Row(hashlib.sha256(identity).hexdigest()[:16], [USER], "Because.")
    assert found.text() == json.dumps(
        {"prompt_id": found.prompt_id, "prompt": [USER], "completion": "Because."}
    ) + "\n"  # fmt: skip
    assert found.conversation == [USER, ANSWER]


def test_sharegpt_of_many_turns_has_openais_roles() -> None:
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("tool", "t"), ("gpt", "last")]
    found = row({"conversations": [{"from": speaker, "value": said} for speaker, said in turns]})
    assert [message["role"] for message in found.prompt] == ["system", "user", "assistant", "tool"]
    assert found.completion == "last"


def test_alpacas_input_follows_its_instruction() -> None:
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Hi", "Ho"]], "system": "s"}
    said = [m["content"] for m in row(alpaca).conversation]
    assert said == ["s", "Hi", "Ho", "Add.\n\n1 and 2", "3"]
    assert row(alpaca, prompt_column="instruction", completion_column="output") == row(alpaca)


def test_a_system_column_is_the_systems_turn() -> None:
    assert row({"system": "Be brief.", "messages": [USER, ANSWER]}).prompt == [SYSTEM, USER]
    assert row({"system": "Be brief.", "messages": [SYSTEM, USER, ANSWER]}).prompt == [SYSTEM, USER]
    named = row({"system": "Be brief.", "q": "Why?", "chosen": "x"}, prompt_column="q", completion_column="chosen")
    assert named.prompt == [SYSTEM, USER]
    with pytest.raises(Unusable, match="its 'system' differs from the system message"):
        row({"system": "Be long.", "messages": [SYSTEM, USER, ANSWER]})


def test_columns_by_name_win_over_what_is_found() -> None:
    item = {"messages": [USER, ANSWER], "question": "Who?", "answer": "I."}
    names = {"prompt_column": "question", "completion_column": "answer"}
    assert row(item, **names).completion == "I."
    with pytest.raises(Unusable, match="has a column 'question' whose text is not in the prompt"):
        row(item)
    assert row({"messages": [USER, ANSWER]}, **names).completion == "Because."
    with pytest.raises(Unusable, match="has no 'answer'; fields are messages, question, answer; rows are read from"):
        row({**item, "answer": None}, **names)


def test_tools_and_all_that_a_message_carries_are_kept(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {"enum": [None, 1]}}}}]
    given = [
        {**USER, "name": "kid", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": parts("8")},
        {**ANSWER, "reasoning_content": "It is so.", "refusal": None},
    ]
    found = row({"messages": given, "tools": tools})
    assert found.prompt == [
        {**USER, "name": "kid"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "8", "tool_call_id": "c1"},
    ]
    assert found.tools == tools
    assert found.answer == {"reasoning_content": "It is so."}
    assert found.conversation[-1] == {**ANSWER, "reasoning_content": "It is so."}
    assert row({"messages": given, "tools": json.dumps(tools)}) == found
    path = tmp_path / "train.jsonl"
    path.write_text(found.text(), encoding="utf-8")
    assert list(read_rows(path)) == [found]
    others = ({"messages": given}, {"messages": [*given[:-1], ANSWER], "tools": tools})
    assert len({found.prompt_id, *(row(other).prompt_id for other in others)}) == 3


def test_a_prompt_is_the_same_whatever_ids_its_calls_were_given() -> None:
    def asked(number: str, tools: Any = None) -> bytes:
        calls = [{"id": number, "function": {"name": "f", "arguments": "{}"}}]
        turns = [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "8"}]
        return prompt_digest(row({"messages": [USER, *turns, ANSWER], "tools": tools}))

    assert asked("c1") == asked("c2") != asked("c1", [{"name": "f"}])


def test_what_a_message_carries_beside_its_text_does_not_make_another_prompt() -> None:
    plain = prompt_digest(row({"messages": [USER, ANSWER]}))
    for more in ({"timestamp": "2024-05-05", "turn": 7}, {"content": " Why?\n"}):
        assert prompt_digest(row({"messages": [{**USER, **more}, ANSWER]})) == plain


REFUSED: list[tuple[Any, str]] = [
    ("text", "is str, not an object"),
    ({}, r"has no 'prompt'; fields are none; rows are read from 'messages' \(OpenAI\), 'conversations'"),
    ({"prompt": "Why?"}, "has no 'completion'; fields are prompt"),
    ({"prompt": "Why?", "completion": 4}, "its target in 'completion' is the value 4, not text; put it in quotes"),
    (
        {"prompt": "Why?", "completion": datetime(2024, 5, 5)},
        "its target in 'completion' is a datetime, not text; put it in quotes",
    ),
    ({"prompt": "Why?", "completion": " \n"}, "its target is empty"),
    ({"prompt": "Why?", "completion": []}, "'completion' must contain a prompt and end with an assistant message"),
    ({"prompt": 3, "completion": "x"}, "its prompt must be text or a list of messages, but is the value 3"),
    ({"prompt": ["Why?"], "completion": "x"}, "its prompt must be text or a list of messages, but item 1 is text"),
    ({"prompt": " ", "completion": "x"}, "its prompt is empty"),
    ({"prompt": "Why?", "completion": "x", "label": False}, "its 'label' is false"),
    ({"prompt": "Why?", "completion": "x", "label": "False"}, "its 'label' is false"),
    ({"prompt": "Why?", "completion": "x", "images": ["a.png"]}, "has 'images', which is not supported"),
    ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "has 'functions', which is not supported"),
    ({"messages": [USER, ANSWER], "tools": "{"}, "its 'tools' is not valid JSON"),
    ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "its 'tools' is not a list of objects"),
    ({"messages": [USER, ANSWER], "system": ["s"]}, "its 'system' is a list, not text"),
    ({"messages": []}, "'messages' must contain a prompt"),
    ({"messages": [USER]}, "'messages' must contain a prompt and end with an assistant message"),
    ({"messages": '[{"role": "user"}]'}, "its 'messages' is text, not a list of messages"),
    (
        {"messages": [USER, ANSWER, ANSWER]},
        "its prompt ends with an assistant turn, so the answer would be a second one",
    ),
    ({"prompt": [USER, ANSWER], "completion": [ANSWER]}, "its prompt ends with an assistant turn"),
    ({"messages": [{"content": "Why?"}, ANSWER]}, "message 1 of its 'messages' has no role"),
    ({"messages": [{"role": "user"}, ANSWER]}, "message 1 of its 'messages' has no content"),
    *(
        ({"messages": [USER, ANSWER | {"tool_calls": calls}]}, "the 'tool_calls' of message 2 .* is not a list of")
        for calls in (5, '[{"name": "f"}]', [5], [{"id": "c"}], [{"function": "f"}], {"name": "f"})
    ),
    ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "message 2 .* has a 'function_call'"),
    (
        {"messages": [{**USER, "content": {"text": "x"}}, ANSWER]},
        "the content of message 1 .* is an object; it must be",
    ),
    (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
        "of type 'image_url'; only",
    ),
    (
        {"messages": [{**USER, "content": [{"type": "input_audio", "text": "x"}]}, ANSWER]},
        "a part of type 'input_audio'",
    ),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "its answer has weight 0, which excludes it from training"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "its answer has weight 0.5; it must be 0 or 1"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
        "its last message only calls a tool",
    ),
    ({"messages": [{**USER, "at": datetime(2024, 5, 5)}, ANSWER]}, "contains a value that JSON cannot represent"),
    ({"messages": [{**USER, "score": float("nan")}, ANSWER]}, "contains a value that JSON cannot represent"),
    ({"messages": [USER, {**ANSWER, "note": "\ud800"}]}, "contains a character that is not valid Unicode"),
    (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "message 1 of its 'conversations' is from 'narrator'; allowed: ",
    ),
    ({"conversations": "x"}, "its 'conversations' must be a list of messages, but is text"),
    ({"conversations": [{"from": "human"}, ANSWER]}, "message 1 of its 'conversations' has no content"),
    ({"chosen": "Human: Why? Assistant: x"}, "its 'chosen' is plain text and there is no 'prompt'"),
    ({"prompt": "Who?", "chosen": [USER, ANSWER]}, "the prompt at the start of its 'chosen' differs from its 'prompt'"),
    (
        {"prompt": [SYSTEM], "chosen": [USER, ANSWER]},
        "the prompt at the start of its 'chosen' differs from its 'prompt'",
    ),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "its 'input' is a list, not text"),
    (
        {"instruction": "a", "history": ["b"], "output": "c"},
        "its 'history' is not a list of \\[question, answer\\] pairs",
    ),
]

PLAIN = {"prompt": "Why?", "completion": "x"}
LEFT_OUT: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"instruction": "Sum up.", "context": "A text.", "output": "x"}, {}, "context"),
    ({"instruction": "Sum up.", "input": "A text.", "System_Prompt": "s", "output": "x"}, {}, "System_Prompt"),
    ({**PLAIN, "input": "A text."}, {}, "input"),
    ({**PLAIN, "chosen": "x", "history": [["Who?", "I."]]}, {}, "history"),
    ({"prompt": "Why?", "chosen": "x", " Context": {"title": ["t"]}}, {}, " Context"),
    ({"messages": [USER, ANSWER], "documents": ["A text."]}, {}, "documents"),
    ({"messages": [USER, ANSWER], "prompt": [SYSTEM, USER]}, {}, "prompt"),
    ({"conversations": [USER, ANSWER], "instruction": "Be brief."}, {}, "instruction"),
    ({"instruction": "Sum up.", "input": "A text.", "output": "x"}, {"prompt_column": "input"}, "instruction"),
    ({"question": "Which?", "choices": ["a", "b"], "output": "a"}, {"prompt_column": "question"}, "choices"),
]


@pytest.mark.parametrize(("item", "names", "column"), LEFT_OUT)
def test_a_part_of_the_prompt_is_never_left_out_in_silence(
    item: dict[str, Any], names: dict[str, str], column: str
) -> None:
    with pytest.raises(Unusable, match=f"has a column '{column}' whose text is not in the prompt; add it"):
        row(item, **({**names, "completion_column": "output"} if names else {}))


@pytest.mark.parametrize(("item", "reason"), REFUSED)
def test_a_row_is_refused_in_its_own_words(item: Any, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        row(item)


def test_lines_in_data_that_are_no_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Why?", "completion": "x"}\n')
    with pytest.raises(
        TpawError, match=r"train\.jsonl: row 1 is not in the format that `tpaw data` writes; put your own rows in"
    ):
        list(read_rows(path))
