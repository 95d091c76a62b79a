from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.rows import PAIRS, jsonl, settings
from tpaw_core.data import prepare
from tpaw_core.workspace.paths import Workspace


@pytest.fixture
def make(workspace: Workspace) -> Callable[..., dict[str, int]]:
    """Prepare data/ from rows (or raw bytes) of train.jsonl and of heldout.jsonl; gives the numbers of rows."""

    def run(train: Any = PAIRS[:8], heldout: Any = PAIRS[8:], **changes: Any) -> dict[str, int]:
        for name, content in (("train.jsonl", train), ("heldout.jsonl", heldout)):
            raw = content if isinstance(content, bytes) else jsonl(content).encode()
            (workspace.root / name).write_bytes(raw)
        return prepare.prepare(workspace, settings(**changes), seed=42)

    return run


@pytest.fixture
def made(workspace: Workspace) -> Callable[[], dict[str, bytes]]:
    """The files of data/."""
    return lambda: {path.name: path.read_bytes() for path in workspace.data.glob("*")}
