"""Formats: a file of rows, one item at a time; text stays text, whatever it looks like.

JSON lines and JSON arrays, CSV and TSV (each also gzipped), Parquet. The JSON reader of `datasets` makes timestamps of
text like 2024-05-05, and its CSV reader numbers of 007, so these two are read here.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tpaw_core.errors import TpawError
from tpaw_core.workspace import files

JSON_LINES, CSV, PARQUET = (".jsonl", ".ndjson"), (".csv", ".tsv"), (".parquet", ".pq")
FORMATS = (
    "JSON lines, a JSON array, CSV, TSV (each also .gz), Parquet, a folder of these, a data set of `save_to_disk`, "
    "a hub id"
)
ENCLOSING = ("data", "rows", "examples", "instances")
SPACE = re.compile(r"[ \t\r\n]*")


def has_format(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return _suffix(path) in (".json", *JSON_LINES, *CSV, *PARQUET)


def read_file(path: Path) -> Iterator[Any]:
    """The rows of a file; its name and first bytes decide the format. Raises TpawError naming the file and the line."""
    if files.need(path, "fix data.path or data.heldout_path, or put the file there").stat().st_size == 0:
        raise TpawError(f"{path}: is empty")
    with path.open("rb") as file:
        magic = file.read(4)
    suffix = _suffix(path)
    if suffix in PARQUET or magic == b"PAR1":
        return _read_parquet(path)
    if suffix in CSV:
        return _read_csv(path, suffix)
    if suffix in JSON_LINES:
        return read_json_lines(path)
    start = _first_character(path)
    if suffix != ".json" and start not in ("{", "["):
        raise TpawError(f"{path}: is in an unsupported format; supported: {FORMATS}")
    if start == "[":
        return _read_json_array(path)
    rows = _enclosed(path)
    return read_json_lines(path) if rows is None else iter(rows)


def read_json_lines(path: Path) -> Iterator[Any]:
    number = 0
    with _text(path) as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
        except json.JSONDecodeError as error:
            what = f"line {number} is not JSON ({error.msg})"
            raise TpawError(
                f"{path}: {what}; each line must be one JSON object; if the file is a single JSON array, name it .json"
            ) from None
        except (RecursionError, ValueError) as error:  # a number of thousands of digits, brackets thousands deep
            if isinstance(error, UnicodeDecodeError):
                raise
            raise TpawError(f"{path}: line {number} cannot be read ({str(error).split(';')[0]})") from None


def without_nulls(value: Any) -> Any:
    """A value of Arrow without the keys that other rows have: Arrow gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """A file as text, unpacked where it is gzipped."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    how: Any = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, **how) if packed else path.open(**how) as text:
        try:
            yield text
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 text ({error.reason} at byte {error.start})"
            raise TpawError(f"{path}: {what}; save it as UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TpawError(f"{path}: is damaged ({error}); download or copy it again") from None


def _first_character(path: Path) -> str:
    with _text(path) as file:
        return next((line.strip()[0] for line in file if line.strip()), "")


def _read_json_array(path: Path) -> Iterator[Any]:
    with _text(path) as file:
        text = file.read()
    place = _skip(text, text.index("[") + 1)
    try:
        while text[place : place + 1] != "]":
            item, place = json.JSONDecoder().raw_decode(text, place)
            yield item
            place = _skip(text, place)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
                if text[place : place + 1] == "]":
                    raise json.JSONDecodeError("a comma with no row after it", text, place)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("neither a comma nor the array's end", text, place)
        if (end := _skip(text, place + 1)) != len(text):
            raise json.JSONDecodeError("text after the array", text, end)
    except json.JSONDecodeError as error:
        raise TpawError(f"{path}: line {error.lineno} is not valid JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        line = text.count("\n", 0, place) + 1
        raise TpawError(f"{path}: line {line} cannot be read ({str(error).split(';')[0]})") from None


def _enclosed(path: Path) -> list[Any] | None:
    """The rows of a file that is one object with a list of rows under "data" or the like; None for any other."""
    with _text(path) as file:
        first = next((line for line in file if line.strip()), "")
        try:
            try:
                found = json.loads(first)
                alone = not any(line.strip() for line in file)
            except json.JSONDecodeError:
                found, alone = json.loads(first + file.read()), True
        except (RecursionError, ValueError):
            return None  # its reader says what is wrong
    enclosed = found if alone and isinstance(found, dict) else {}
    lists = [enclosed[key] for key in ENCLOSING if isinstance(enclosed.get(key), list)]
    return lists[0] if len(lists) == 1 else None


def _skip(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _read_csv(path: Path, suffix: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module allows by itself
    with _text(path) as file:
        reader = csv.reader(file, strict=True, **_dialect(file, suffix))
        try:
            header = [name.strip() for name in next(reader, [])]
            # A column without a name is the index of a table; there may be several.
            if repeated := [name for name in header if name and header.count(name) > 1]:
                raise TpawError(f"{path}: has two columns named {repeated[0]!r}; rename one")
            for fields in reader:
                if len(fields) > len(header):
                    what = f"line {reader.line_num} has {len(fields)} fields, but the header has {len(header)}"
                    raise TpawError(f"{path}: {what}; quote fields that contain the separator")
                if fields:
                    yield {name: field for name, field in zip(header, fields, strict=False) if name}
        except csv.Error as error:
            what = f"line {reader.line_num} is not CSV ({error})"
            raise TpawError(f'{path}: {what}; a quote within quoted text is written twice, "", not \\"') from None


def _dialect(file: TextIO, suffix: str) -> dict[str, Any]:
    """The separator, and whether a space follows it; leaves ``file`` where its header starts.

    A spreadsheet names the separator in a line of its own (sep=;), or writes semicolons where the comma is in numbers.
    """
    header = file.readline()
    start = 0
    if named := re.fullmatch(r'"?sep=(.)"?', header.rstrip("\r\n"), re.IGNORECASE):
        start, header = file.tell(), file.readline()
    file.seek(start)
    if named:
        mark = named[1]
    elif suffix == ".tsv":
        mark = "\t"
    else:  # what cuts the header into most fields
        mark = max(",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    names = header.split(mark)[1:]
    return {"delimiter": mark, "skipinitialspace": bool(names) and all(name.startswith(" ") for name in names)}


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not names:  # its batches would end the process
                raise ValueError("it has no columns")
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"it has two columns named {repeated[0]!r}; rename one")
            decode = _json_columns(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield decode(without_nulls(row))
    except (pyarrow.ArrowException, KeyError, ValueError, OSError) as error:
        raise TpawError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _json_columns(schema: Any) -> Callable[[Any], Any]:
    """How a row's JSON columns are read: `datasets` writes objects of many shapes (tools, arguments) as JSON text."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return lambda row: row
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    return lambda row: features.decode_example({name: row.get(name) for name in features})
