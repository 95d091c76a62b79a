"""Rows for tests of data/, and the settings that read them from train.jsonl and heldout.jsonl."""

from __future__ import annotations

import json
from typing import Any

from tpaw_core.config.params import Data
from tpaw_core.data import encoding
from tpaw_core.data.encoding import EncodedRows
from tpaw_core.data.endings import Ending
from tpaw_core.data.rows import Row

PAIRS = [{"prompt": f"What is {n} + {n}?", "completion": f"{n + n}"} for n in range(10)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def settings(**changes: Any) -> Data:
    return Data(**{"path": "train.jsonl", "heldout_path": "heldout.jsonl", **changes})


def messages(row: dict[str, str]) -> dict[str, Any]:
    """A row as a conversation."""
    roles = ("user", row["prompt"]), ("assistant", row["completion"])
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def eos_ending(tokenizer: Any) -> Ending:
    """Targets end in EOS, and so do answers."""
    return Ending(tokenizer.eos_token_id, (tokenizer.eos_token_id,))


def encode_rows(rows: list[Row], tokenizer: Any, *, max_length: int = 128, max_skipped: float = 0.0) -> EncodedRows:
    """Rows that end in EOS, as token ids."""
    return encoding.encode(
        rows,
        tokenizer,
        eos_ending(tokenizer),
        max_length=max_length,
        max_skipped=max_skipped,
        name="rows",
        options={},
    )
