"""JSON that a stage wrote, read back; a file that does not match its schema is reported as damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from tpaw_core.errors import TpawError

T = TypeVar("T")
RESTORE = "recreate it, or restore it with `dvc checkout`"


class Record(BaseModel):
    """The schema of one JSON file, or of a part of it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    def text(self) -> str:
        return json.dumps(self.model_dump(by_alias=True), indent=2) + "\n"


def read(path: Path, schema: type[T], remedy: str = RESTORE) -> T:
    """A file that holds one value: a `Record`, or a plain dict with typed values.

    Raises TpawError where it is not JSON or does not match the schema.
    """
    try:
        return TypeAdapter(schema).validate_json(path.read_bytes(), strict=True)
    except ValueError:
        raise TpawError(f"{path}: is damaged; {remedy}") from None


def lines(path: Path) -> list[dict[str, Any]]:
    """A file with one object per line; empty where there is no file.

    Raises TpawError naming the line.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise TpawError(f"{path}, line {number}: is damaged; {RESTORE}") from None
    return found
