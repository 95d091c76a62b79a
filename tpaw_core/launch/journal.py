"""A journal: what a rank has so far, an entry per line, which the stage reads while the rank writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """One writer, one reader, each with an object of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def extend(self, entries: Iterable[Any]) -> None:
        """Entries of JSON's types; a number need not be finite."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def new(self) -> list[Any]:
        """The complete entries since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]
