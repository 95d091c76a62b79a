"""Rows for tests of data/, and the settings that read them from train.jsonl and heldout.jsonl."""

from __future__ import annotations

import json
from typing import Any

from tpaw_core.config.params import Data

PAIRS = [{"prompt": f"What is {n} + {n}?", "completion": f"{n + n}"} for n in range(10)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def settings(**changes: Any) -> Data:
    return Data(**{"path": "train.jsonl", "heldout_path": "heldout.jsonl", **changes})


def messages(row: dict[str, str]) -> dict[str, Any]:
    """A row as a conversation."""
    roles = ("user", row["prompt"]), ("assistant", row["completion"])
    return {"messages": [{"role": role, "content": content} for role, content in roles]}
