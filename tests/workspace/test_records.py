from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from tpaw_core.errors import TpawError
from tpaw_core.workspace import records
from tpaw_core.workspace.records import Record


class Part(Record):
    name: str


class Whole(Record):
    number: int
    share: float
    parts: list[Part]
    kind: str = Field(default="plain", alias="type")


WHOLE = Whole(number=1, share=0.5, parts=[Part(name="a"), Part(name="b")])
SOUND = {"number": 1, "share": 0.5, "parts": [{"name": "a"}, {"name": "b"}], "type": "plain"}


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(WHOLE.text())
    assert json.loads(WHOLE.text()) == SOUND
    assert WHOLE.text().endswith("}\n")
    assert records.read(tmp_path / "a.json", Whole) == WHOLE


def test_what_has_a_default_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({k: v for k, v in SOUND.items() if k != "type"}))
    assert records.read(tmp_path / "a.json", Whole) == WHOLE


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b"null",
        json.dumps([SOUND]).encode(),
        json.dumps({k: v for k, v in SOUND.items() if k != "number"}).encode(),
        json.dumps({**SOUND, "extra": 1}).encode(),
        json.dumps({**SOUND, "number": "1"}).encode(),
        json.dumps({**SOUND, "number": 1.0}).encode(),
        json.dumps({**SOUND, "number": True}).encode(),
        json.dumps({**SOUND, "parts": [{"name": None}]}).encode(),
        json.dumps({**SOUND, "parts": {"name": "a"}}).encode(),
    ],
)
def test_a_file_that_does_not_match_its_schema_is_damaged(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(TpawError, match=rf"{path}: is damaged; recreate it, or restore it with `dvc checkout`"):
        records.read(path, Whole)
    with pytest.raises(TpawError, match=rf"{path}: is damaged; do this"):
        records.read(path, Whole, "do this")


def test_a_plain_dict_has_typed_values(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"train": 1.5}')
    assert records.read(path, dict[str, float]) == {"train": 1.5}
    path.write_text('{"train": "1.5"}')
    with pytest.raises(TpawError, match="is damaged"):
        records.read(path, dict[str, float])


def test_a_record_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        WHOLE.number = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "expected"), [(None, []), ("", []), ('{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}])]
)
def test_lines_are_objects(content: str | None, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    assert records.lines(path) == expected


@pytest.mark.parametrize("line", ["{", "3", "[1]", "null", "[" * 100_000])
def test_a_line_that_is_not_an_object_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(TpawError, match=rf"{path}, line 2: is damaged; recreate it"):
        records.lines(path)
