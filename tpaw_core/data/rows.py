"""A row: a prompt with its target response; which items of a source are usable, and why the others are not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpaw_core.config.params import Data
from tpaw_core.data.formats import read_json_lines
from tpaw_core.data.layouts import LAYOUTS, read_conversation, read_tools
from tpaw_core.data.messages import Message, Unusable
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files

REQUIRED, OPTIONAL = ("prompt_id", "prompt", "completion"), ("tools", "answer")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    prompt_id: str  # digest of what follows
    prompt: list[Message]
    completion: str  # the target: the content of the assistant's last turn
    tools: list[Any] | None = None  # for the chat template
    answer: Message | None = None  # what the assistant's last turn has beside role and content

    @property
    def conversation(self) -> list[Message]:
        """The prompt with the assistant's whole last turn."""
        return [*self.prompt, {"role": "assistant", "content": self.completion, **(self.answer or {})}]

    def text(self) -> str:
        """The row's line in data/."""
        more = {name: value for name in OPTIONAL if (value := getattr(self, name)) is not None}
        return json.dumps({**{name: getattr(self, name) for name in REQUIRED}, **more}, ensure_ascii=False) + "\n"


def prompt_digest(row: Row) -> bytes:
    """The same for prompts that ask the same: ids are drawn anew each time, and messages carry dates and numbers."""
    asked = [_asked(message) for message in row.prompt]
    return hashlib.sha256(json.dumps([asked, row.tools], sort_keys=True).encode()).digest()


def _asked(message: Message) -> list[Any]:
    """What a message says and calls. Templates take spaces around a text away."""
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        calls = [{**call, "id": None} if isinstance(call, dict) else call for call in calls]
    return [message["role"], message["content"].strip(), calls]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of data/train.jsonl or data/heldout.jsonl, one at a time."""
    files.need(path, "make it with `tpaw data`")
    number = 0
    for number, row in enumerate(read_json_lines(path), start=1):
        if not isinstance(row, dict) or not all(name in row for name in REQUIRED):
            raise TpawError(
                f"{path}: row {number} is not in the format that `tpaw data` writes; put your own rows in another "
                "file and set "
                "data.path to it"
            )
        yield Row(**{name: row[name] for name in (*REQUIRED, *OPTIONAL) if name in row})
    if not number:
        raise TpawError(f"{path}: contains no rows; recreate it with `tpaw data`")


def refuse_if_too_many(name: str, reasons: list[str], total: int, max_skipped: float) -> None:
    """Report rows that cannot be used. Raises TpawError where their share is above ``max_skipped``."""
    if not reasons:
        return
    first = "; ".join(reasons[:3])
    if LAYOUTS in first:  # once is enough
        first = f"{first.replace(f'; {LAYOUTS}', '')}; {LAYOUTS}"
    summary = f"{name}: {len(reasons)} of {total} rows cannot be used; the first reasons: {first}"
    if len(reasons) > max_skipped * total:
        raise TpawError(f"{summary}. Fix the rows, or raise data.max_skipped (now {max_skipped})")
    logger.info(summary)


def usable_row(item: Any, data: Data) -> Row:
    """One item of a source as a row. Raises Unusable."""
    if not isinstance(item, dict):
        raise Unusable(f"is {type(item).__name__}, not an object with named fields")
    messages, tools = read_conversation(item, data), read_tools(item)
    *prompt, last = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
    _refuse_weight(messages[-1].get("weight", 1))
    answer = {key: value for key, value in last.items() if key not in ("role", "content")} or None
    completion = last["content"]
    if not completion.strip():
        if answer and "tool_calls" in answer:
            raise Unusable("its last message only calls a tool, so there is no text to train on")
        raise Unusable("its target is empty")
    if not any(message["content"].strip() for message in prompt):
        raise Unusable("its prompt is empty")
    if prompt[-1]["role"] == "assistant":
        raise Unusable(
            "its prompt ends with an assistant turn, so the answer would be a second one in a row; merge the two, or "
            "end "
            "the prompt with a user turn"
        )
    more = [] if tools is None and answer is None else [tools, answer]
    try:
        identity = json.dumps([prompt, completion, *more], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Unusable("contains a character that is not valid Unicode (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:  # a date or bytes of Parquet, a number that is not finite
        raise Unusable(f"contains a value that JSON cannot represent ({error})") from None
    return Row(hashlib.sha256(identity).hexdigest()[:16], prompt, completion, tools, answer)


def _refuse_weight(weight: Any) -> None:
    """OpenAI's weight of the target: 0 or 1."""
    if weight == 0:
        raise Unusable("its answer has weight 0, which excludes it from training")
    if weight != 1:
        raise Unusable(f"its answer has weight {weight!r}; it must be 0 or 1")
