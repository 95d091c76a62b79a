"""A message of a conversation, as rows keep it: role, content as text, and what else a chat template may read.

Reads OpenAI's keys (role, content as text or as parts of text) and ShareGPT's (from, value).
"""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")


class Unusable(ValueError):
    """One row that cannot be used, and why."""


def read_messages(given: Any, what: str) -> list[Message]:
    """The messages of a column; ``what`` names it in the reason. Keys without a value are dropped, others are kept."""
    must = f"its {what} must be {'text or ' if what == 'prompt' else ''}a list of messages"
    if not isinstance(given, list):
        raise Unusable(f"{must}, but is {kind(given)}")
    for number, message in enumerate(given, start=1):
        if not isinstance(message, dict):
            raise Unusable(f"{must}, but item {number} is {kind(message)}")
    return [_message(message, f"message {number} of its {what}") for number, message in enumerate(given, start=1)]


def kind(value: Any) -> str:
    """What a value is, in words, for the reasons that rows are refused for."""
    match value:
        case None:
            return "empty"
        case str():
            return "text"
        case bool() | int() | float():
            return f"the value {value!r}"
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


def _message(given: dict[str, Any], place: str) -> Message:
    # Arrow gives every message every key; an empty list of tool calls is as good as none.
    kept = {key: value for key, value in given.items() if value is not None and value != []}
    if "from" in kept and "role" not in kept:
        speaker, content = kept.pop("from"), kept.pop("value", None)
        if not isinstance(speaker, str) or speaker not in SHAREGPT:
            raise Unusable(f"{place} is from {speaker!r}; allowed: {', '.join(SHAREGPT)}")
        role: Any = SHAREGPT[speaker]
    else:
        role, content = kept.pop("role", None), kept.pop("content", None)
        if not isinstance(role, str) or not role:
            raise Unusable(f"{place} has no role")
    if kept.get("function_call"):
        raise Unusable(f"{place} has a 'function_call', which is not supported; write it as 'tool_calls'")
    if not _are_calls(kept.get("tool_calls") or []):
        raise Unusable(f"the 'tool_calls' of {place} is not a list of objects, each with the name of a function")
    if content is None and not kept.get("tool_calls"):
        raise Unusable(f"{place} has no content")
    return {"role": role, "content": "" if content is None else _text(content, place), **dict(sorted(kept.items()))}


def _are_calls(given: Any) -> bool:
    calls = [call.get("function", call) for call in given if isinstance(call, dict)] if isinstance(given, list) else []
    named = [call for call in calls if isinstance(call, dict) and isinstance(call.get("name"), str)]
    return isinstance(given, list) and len(named) == len(given)


def _text(content: Any, place: str) -> str:
    """Content as one text; parts are put together without a space, as templates that read parts do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable(f"the content of {place} is {kind(content)}; it must be text")
    texts = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise Unusable(f"the content of {place} holds {kind(part)}; its parts must be text")
        if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise Unusable(
                f"the content of {place} contains a part of type {part.get('type')!r}; only text is supported"
            )
        texts.append(part["text"])
    return "".join(texts)
