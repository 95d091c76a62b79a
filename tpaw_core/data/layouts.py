"""Layouts: which columns of a row hold its conversation, and its tools.

- `messages`: OpenAI's; `conversations`: ShareGPT's.
- `prompt` with `completion` (each text or messages), and `prompt` with `chosen` or `chosen` alone: TRL's.
- `instruction` with `output`: Alpaca's. `input`, where there is any, follows the instruction after an empty line;
  `history`, pairs of question and answer, comes before it.

A column `system` becomes the system's turn, and `tools` (a list, or one as JSON text) goes to the chat template. Any
other column whose name says that it is part of a prompt must hold nothing that the conversation lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tpaw_core.config.params import Data
from tpaw_core.data.messages import Message, Unusable, kind, read_messages

LAYOUTS = (
    "rows are read from 'messages' (OpenAI), 'conversations' (ShareGPT), 'prompt' with 'completion' or 'chosen' (TRL), "
    "'instruction' with 'output' (Alpaca), or the columns in data.prompt_column and data.completion_column"
)
# They change what a model is to see, so a row is refused rather than read without them.
NOT_READ = ("functions", "chat_template_kwargs", "image", "images", "audio", "audios", "video", "videos")
# What data sets call a part of the prompt; it may repeat what the conversation holds.
PARTS = {
    "prompt", "prompts", "instruction", "instructions", "question", "questions", "query", "problem", "input",
    "inputs", "context", "contexts", "passage", "passages", "document", "documents", "article", "background",
    "history", "system", "system_prompt", "choices", "options",
}  # fmt: skip


def read_conversation(item: dict[Any, Any], data: Data) -> list[Message]:
    """The conversation of a row, which ends with the assistant's turn. Raises Unusable."""
    for column in NOT_READ:
        if item.get(column):
            raise Unusable(f"has {column!r}, which is not supported; remove this column if you do not need it")
    if str(item.get("label")).strip().lower() == "false":  # text in CSV
        raise Unusable("its 'label' is false: its completion is marked as undesirable")
    prompt, target = data.prompt_column, data.completion_column
    chosen_by_name = (prompt, target) != ("prompt", "completion") and (prompt in item or target in item)
    if isinstance(item.get("messages"), list) and not chosen_by_name:
        column, messages = "messages", read_messages(item["messages"], "'messages'")
    elif item.get(prompt) is not None and item.get(target) is not None:
        column, messages = target, _pair(item, prompt, target)
    elif item.get("conversations") is not None and not chosen_by_name:
        column, messages = "conversations", read_messages(item["conversations"], "'conversations'")
    elif item.get("chosen") is not None and not chosen_by_name:
        column, messages = "chosen", _preferred(item)
    elif item.get("instruction") is not None and item.get("output") is not None and not chosen_by_name:
        column, messages = "output", _pair(item, "instruction", "output")
    else:
        raise Unusable(_not_found(item, prompt, target))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unusable(f"{column!r} must contain a prompt and end with an assistant message")
    messages = _with_system(item, messages)
    read = {target: {target, prompt}, "chosen": {"chosen", "prompt"}}.get(column, {column})
    _refuse_left_out(item, messages[:-1], read)
    return messages


def _refuse_left_out(item: dict[Any, Any], prompt: list[Message], read: set[str]) -> None:
    """Refuse a column that holds a part of the prompt which ``prompt`` lacks; ``read``: columns that were read."""
    others = [name for name in item if name not in read and str(name).strip().lower() in PARTS and item[name]]
    said = _plain("\n".join(message["content"] for message in prompt)) if others else ""
    for column in others:
        if not all(_plain(text) in said for text in _texts(item[column])):
            raise Unusable(
                f"has a column {column!r} whose text is not in the prompt; add it to the prompt, or remove the "
                "column if "
                "it is irrelevant"
            )


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value; of a message, what it says."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        said = [value[key] for key in ("content", "value") if key in value]
        yield from _texts(said if said and {"role", "from"} & value.keys() else list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _plain(text: str) -> str:
    return " ".join(text.split())


def read_tools(item: dict[Any, Any]) -> list[Any] | None:
    """The tools that a row offers. Raises Unusable."""
    tools = item.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise Unusable("its 'tools' is not valid JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("its 'tools' is not a list of objects")
    return tools


def _pair(item: dict[Any, Any], prompt: str, target: str) -> list[Message]:
    """A prompt and its answer; an answer that repeats the prompt, as preference pairs do, is the whole conversation."""
    asked, answer = item[prompt], item[target]
    if isinstance(asked, str):
        before = _turns_of_alpaca(item, asked) if prompt == "instruction" else [_turn("user", asked)]
    else:
        before = read_messages(asked, "prompt")
    if isinstance(answer, str):
        return [*before, _turn("assistant", answer)]
    if not isinstance(answer, list):
        raise Unusable(
            f"its target in {target!r} is {kind(answer)}, not text; put it in quotes. If a hub dataset guessed the "
            "type, download the file and set data.path to it"
        )
    given = read_messages(answer, repr(target))
    if not given or given[0]["role"] == "assistant":
        return [*before, *given]
    if isinstance(asked, str):
        same = any(message["role"] == "user" and message["content"].strip() == asked.strip() for message in given)
    else:
        same = given[: len(before)] == before
    if not same:
        raise Unusable(f"the prompt at the start of its {target!r} differs from its {prompt!r}")
    return given


def _preferred(item: dict[Any, Any]) -> list[Message]:
    if item.get("prompt") is not None:
        return _pair(item, "prompt", "chosen")
    if isinstance(item["chosen"], str):
        raise Unusable("its 'chosen' is plain text and there is no 'prompt', so the start of the answer is unknown")
    return read_messages(item["chosen"], "'chosen'")


def _turns_of_alpaca(item: dict[Any, Any], instruction: str) -> list[Message]:
    more, history = item.get("input") or "", item.get("history") or []
    if not isinstance(more, str):
        raise Unusable(f"its 'input' is {kind(more)}, not text")
    turns = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Unusable("its 'history' is not a list of [question, answer] pairs")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    return [*turns, _turn("user", f"{instruction}\n\n{more}" if more.strip() else instruction)]


def _with_system(item: dict[Any, Any], messages: list[Message]) -> list[Message]:
    said = item.get("system")
    if said is None or said == "":
        return messages
    if not isinstance(said, str):
        raise Unusable(f"its 'system' is {kind(said)}, not text")
    if messages[0]["role"] != "system":
        return [_turn("system", said), *messages]
    if messages[0]["content"] != said:
        raise Unusable("its 'system' differs from the system message in its messages")
    return messages


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _not_found(item: dict[Any, Any], prompt: str, target: str) -> str:
    if item.get("messages") is not None and not isinstance(item["messages"], list):
        return f"its 'messages' is {kind(item['messages'])}, not a list of messages"
    missing = prompt if item.get(prompt) is None else target
    return f"has no {missing!r}; fields are {', '.join(map(str, item)) or 'none'}; {LAYOUTS}"
