"""JSON that a stage has left behind, read back: it holds what its shape says, or the file is named as damaged."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, with_config

from tpaw_core.errors import TpawError

T = TypeVar("T")
RESTORE = "make it again, or restore it with `dvc checkout`"
STRICT = ConfigDict(strict=True, extra="forbid")
shape = with_config(STRICT)  # of a TypedDict from typing_extensions: these keys and types, and no others


def read(path: Path, kind: type[T], remedy: str = RESTORE) -> T:
    """A file of one value, such as a dict or what `shape` decorates.

    Raises TpawError where it is not JSON or holds anything else.
    """
    try:
        found: T = _adapter(kind).validate_json(path.read_bytes())  # type: ignore[arg-type]  # a type is hashable
    except ValueError:
        raise TpawError(f"{path}: is damaged; {remedy}") from None
    return found


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=None if hasattr(kind, "__pydantic_config__") else STRICT)


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of one object a line; none where there is no file.

    Raises TpawError naming the line.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise TpawError(f"{path}, line {number}: is damaged; {RESTORE}") from None
    return found
