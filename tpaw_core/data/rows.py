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
from tpaw_core.data.sources import read_jsonl
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files

Message = dict[str, str]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    prompt_id: str  # digest of prompt and completion
    prompt: list[Message]
    completion: str


class Unusable(ValueError):
    """One row that cannot be used, and why."""


def prompt_digest(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row.prompt).encode()).digest()


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of data/train.jsonl or data/heldout.jsonl, one at a time."""
    files.need(path, "make it with `tpaw data`")
    empty = True
    for row in read_jsonl(path):
        empty = False
        yield Row(**{k: row[k] for k in ("prompt_id", "prompt", "completion")})
    if empty:
        raise TpawError(f"{path}: holds no rows; make it again with `tpaw data`")


def refuse_if_too_many(name: str, reasons: list[str], total: int, max_skipped: float) -> None:
    """Report rows that cannot be used. Raises TpawError where their share is above ``max_skipped``."""
    if not reasons:
        return
    summary = f"{name}: {len(reasons)} of {total} rows cannot be used; first: {'; '.join(reasons[:3])}"
    if len(reasons) > max_skipped * total:
        raise TpawError(f"{summary}. Fix the rows, or raise data.max_skipped (now {max_skipped})")
    logger.info(summary)


def usable_row(item: Any, data: Data) -> Row:
    """One item of a source as a row. Raises Unusable."""
    if not isinstance(item, dict):
        raise Unusable(f"is {type(item).__name__}, not an object with named fields")
    if isinstance(item.get("messages"), list):
        *prompt, last = item["messages"] or [None]
        if not prompt or not isinstance(last, dict) or last.get("role") != "assistant":
            raise Unusable("'messages' must hold a prompt and end with the assistant's target")
        completion = last.get("content")
    else:
        for column in (data.prompt_column, data.completion_column):
            if item.get(column) is None:
                raise Unusable(f"has no {column!r}; fields are {', '.join(map(str, item)) or 'none'}")
        prompt, completion = item[data.prompt_column], item[data.completion_column]
        if isinstance(completion, list):
            completion = (
                completion[0].get("content") if len(completion) == 1 and isinstance(completion[0], dict) else None
            )
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    if not isinstance(completion, str) or not completion.strip():
        raise Unusable("its target is empty")
    if not isinstance(prompt, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt
    ):
        raise Unusable("its prompt is neither text nor a list of messages with role and content")
    messages = [{"role": str(m.get("role", "user")), "content": m["content"]} for m in prompt]
    if not any(m["content"].strip() for m in messages):
        raise Unusable("its prompt is empty")
    try:
        identity = hashlib.sha256(json.dumps([messages, completion], ensure_ascii=False).encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise Unusable("holds a character that is not valid Unicode (a lone surrogate)") from None
    return Row(identity, messages, completion)
