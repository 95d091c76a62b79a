"""Turns: what a chat template writes for a row when it prompts, and what it writes as the answer.

The prompt is what the template writes when it prompts. The target is what it writes after the prompt's last message in
the whole conversation, less what the prompt has there. Both places are found by a mark at the end of each text, so
that a text which occurs twice misleads nobody. Knows templates; must not know token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

from tpaw_core.data.messages import Message, Unusable
from tpaw_core.data.rows import Row
from tpaw_core.errors import TpawError

REASONING = ("reasoning_content", "reasoning", "thinking")  # what rows call an assistant's reasoning
REASONING_END = "</think>"  # templates take what an assistant's content has before it for reasoning
MARK = 5318008  # digits: neither a change of case nor JSON alters them


class Turn(NamedTuple):
    """The texts around an answer, as the template writes them."""

    prompt: str
    preamble: str  # what the template writes between the prompt and the answer's own text
    answer: str
    tail: str  # what it writes after it
    opening: str = ""  # the last word of the preamble that is not the row's, such as </think>

    @property
    def target(self) -> str:
        return self.preamble + self.answer


def render(tokenizer: Any, messages: list[Message], options: Mapping[str, Any], **more: Any) -> str:
    """Raises Unusable with the template's own words where it refuses the messages."""
    if not tokenizer.chat_template:
        raise TpawError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; set one in model.chat_template "
            "so that generation and training use the same prompt"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **{**options, **more})
    except Exception as error:  # a template may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unusable(f"the chat template rejects it ({reason})") from None


def turn(tokenizer: Any, row: Row, options: Mapping[str, Any]) -> Turn:
    """A row's prompt and answer, as the template writes them.

    What only the conversation writes before an answer, such as an empty block of reasoning, belongs to the target: the
    model has to write it too. What only the prompt writes belongs to the prompt.

    The arguments of tool calls are objects, as transformers has it. A template that cannot show them so gets JSON text,
    and one that shows no text as content gets content as a list of parts.
    Raises Unusable where the template does not show a text of the row, or where both write something of their own.
    """
    messages = [_with_arguments(message, as_text=False) for message in row.conversation]
    try:
        return _turn(tokenizer, row, messages, options)
    except Unusable:
        texts = [_with_arguments(message, as_text=True) for message in row.conversation]
        with suppress(Unusable):
            if texts != messages:
                return _turn(tokenizer, row, texts, options)
        if _reads_parts(tokenizer, options):
            return _turn(tokenizer, row, list(map(_in_parts, messages)), options)
        raise


def _reads_parts(tokenizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the template shows a text that is a part, and does not show it as plain content."""
    message = {"role": "user", "content": str(MARK)}
    return not _shows(tokenizer, message, options) and _shows(tokenizer, _in_parts(message), options)


def _shows(tokenizer: Any, message: Message, options: Mapping[str, Any]) -> bool:
    with suppress(Unusable):
        shown = render(tokenizer, [message], options)
        return str(MARK) in shown and not _as_python(message, shown)
    return False


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_arguments(message: Message, *, as_text: bool) -> Message:
    """With the arguments of its tool calls as objects or as JSON text; text that is not JSON stays as it is."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        given = function.get("arguments")
        if as_text and given is not None and not isinstance(given, str):
            call = _replaced(call, arguments=json.dumps(given, ensure_ascii=False))
        elif not as_text and isinstance(given, str):
            with suppress(ValueError, RecursionError):
                call = _replaced(call, arguments=json.loads(given))
        calls.append(call)
    return {**message, "tool_calls": calls}


def _turn(tokenizer: Any, row: Row, messages: list[Message], options: Mapping[str, Any]) -> Turn:
    def write(conversation: list[Message], tools: list[Any] | None, prompting: bool) -> str:
        more = {"tools": tools} if tools else {}
        return render(tokenizer, conversation, options, add_generation_prompt=prompting, **more)

    prompt, whole = write(messages[:-1], row.tools, True), write(messages, row.tools, False)
    marked = Marked(messages, row.tools, prompt + whole + row.text())
    asked, said = write(marked.messages[:-1], marked.tools, True), write(marked.messages, marked.tools, False)
    _refuse_hidden(row, marked, asked, said)
    *_, last, end = marked.ends
    called = marked.named.findall(said.rpartition(end)[2])  # calls are written behind the answer's text, or before it
    after_calls = marked.named.split(said)[-1] if called else None
    asked, said = marked.named.sub("", asked), marked.named.sub("", said)
    before = asked.rpartition(last)[2]  # what stands between the last message and the answer, when it prompts
    rest, _, tail = said.rpartition(last)[2].partition(end)
    shown = whole.removesuffix(tail)
    if not (prompt.endswith(before) and whole.endswith(tail) and shown.rstrip().endswith(rest.rstrip())):
        raise Unusable(
            "the text that the chat template writes around the answer depends on the row's content; set a different "
            "template in model.chat_template"
        )
    start = len(rest) - len(_shown_end(row.completion.strip(), rest))
    same = len(before) if rest.startswith(before) else min(_common(before, rest), start)
    own, preamble = before[same:], rest[same:start]
    if own and preamble.strip():
        raise Unusable(
            f"the chat template's generation prompt puts {before!r} before the answer, but a full conversation has "
            f"{rest[:start]!r} there; set a different template in model.chat_template, or adjust "
            "model.chat_template_kwargs"
        )
    if REASONING_END in own and REASONING_END in rest[start:]:
        raise Unusable(
            "the generation prompt already closes the reasoning block, but this row's answer contains reasoning"
        )
    thoughts = [str((row.answer or {}).get(name) or "").strip() for name in REASONING]
    if hidden := [name for name, text in zip(REASONING, thoughts, strict=True) if text not in preamble]:
        raise Unusable(f"the chat template leaves out the {hidden[0]} of this row's answer")
    opening = _opening(preamble, max(thoughts, key=len))
    answer = rest[max(start, same) :] + shown[len(shown.rstrip()) :]
    calls = tail.removesuffix(after_calls) if after_calls is not None else ""
    return Turn(prompt, "" if own else preamble, answer + calls, tail[len(calls) :], opening)


def _opening(preamble: str, reasoning: str) -> str:
    """The last word of the template's own, which may follow the row's reasoning without a space."""
    word = "".join(preamble.split()[-1:])
    if word.endswith(REASONING_END):
        return REASONING_END
    return "".join(preamble.rpartition(reasoning)[2].split()[-1:]) if reasoning else word


def _shown_end(answer: str, rest: str) -> str:
    """The part of the answer with which ``rest`` ends: all of it, unless the template writes its reasoning anew."""
    if rest.endswith(answer):
        return answer
    reasoning, _, said = answer.rpartition(REASONING_END)
    if reasoning.strip().removeprefix("<think>").strip() not in rest:
        raise Unusable(
            f"the chat template drops the part of this row's answer before {REASONING_END!r}; set a template in "
            "model.chat_template that keeps it"
        )
    return said.strip()


def _common(one: str, other: str) -> int:
    """How many characters both start with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _refuse_hidden(row: Row, marked: Marked, asked: str, said: str) -> None:
    """Raises Unusable for a text that the template does not write up to its end; an assistant's reasoning may go."""
    *prompt, answer = zip(row.conversation, marked.ends, strict=True)
    shown = [(message, end, asked, f"{message['role']!r} message") for message, end in prompt]
    for message, end, where, whose in [*shown, (*answer, said, "answer")]:
        *parts, _ = where.split(end) if end else ("", "")
        text = message["content"].strip()
        assistant = message["role"] == "assistant"
        form = text.rpartition(REASONING_END)[2].strip() if assistant else json.dumps(text, ensure_ascii=False)[1:-1]
        if not parts:
            raise Unusable(f"the chat template leaves out this row's {whose}")
        if end and not any(part.endswith((text, form)) for part in parts):
            raise Unusable(f"the chat template changes the text of this row's {whose}")
    if marked.ends[-2] not in said:
        raise Unusable("the chat template drops the last message of this row's prompt when an answer follows it")
    for kind, items, where in (
        ("tool", marked.tools, asked),
        ("tool call", _calls(marked.messages[:-1]), asked),
        ("tool call", _calls(marked.messages[-1:]), said),
    ):
        for item in items:
            if (name := _function(item).get("name")) and name not in where:
                raise Unusable(f"the chat template leaves out this row's {kind} {marked.named.sub('', name)!r}")
    if any(_as_python(message, asked + said) for message in marked.messages):
        raise Unusable("the chat template writes the arguments of a tool call as Python does, not as JSON")


class Marked:
    """Messages and tools with a mark at the end of each text and each name, none of which occurs in ``texts``."""

    def __init__(self, messages: list[Message], tools: list[Any] | None, texts: str) -> None:
        number = next(number for number in range(MARK, 10 * MARK) if str(number) not in texts)
        self.names = (f"_{number}_{place}_" for place in count())  # each tool and each call has its own
        self.named = re.compile(rf"_{number}_\d+_")
        self.ends = [
            f"{number}-{place}-{number}" if message["content"] or place >= len(messages) - 2 else ""
            for place, message in enumerate(messages)
        ]
        self.messages = [self._message(message, end) for message, end in zip(messages, self.ends, strict=True)]
        self.tools = [self._named(tool) for tool in tools or ()]

    def _message(self, message: Message, end: str) -> Message:
        content = message["content"]
        calls = {"tool_calls": [self._named(call) for call in message["tool_calls"]]} if _calls([message]) else {}
        if isinstance(content, str):
            return {**message, "content": content.rstrip() + end, **calls}
        return {**message, "content": [{**part, "text": part["text"].rstrip() + end} for part in content], **calls}

    def _named(self, item: Any) -> Any:
        """A tool or a call of one."""
        function = _function(item)
        if not isinstance(function.get("name"), str):
            return item
        return _replaced(item, name=function["name"] + next(self.names))


def _function(item: Any) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, dict) else None
    return function if isinstance(function, dict) else {}


def _replaced(item: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**item, "function": {**item["function"], **changes}} if "function" in item else {**item, **changes}


def _calls(messages: list[Message]) -> list[Any]:
    return [call for message in messages for call in message.get("tool_calls") or ()]


def _as_python(message: Message, shown: str) -> bool:
    """Whether a list or an object of the message is written as Python writes it, by a template that expects text."""
    values = [message["content"], *(_function(call).get("arguments") for call in _calls([message]))]
    return any(str(v) in shown and str(v) != json.dumps(v) for v in values if v and isinstance(v, (dict, list)))
