"""Where rows come from: JSON lines, Parquet, CSV or a data set of the hub, one item at a time."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_core.config.params import Data
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files


class Source(NamedTuple):
    name: str  # for messages
    items: Iterable[Any]


def is_file(path: Path) -> bool:
    """Whether a recipe means a file; anything else is a hub id."""
    return path.exists() or path.suffix in (".jsonl", ".json", ".parquet", ".csv")


def read_file(path: Path) -> Source:
    files.need(path, "fix data.path or data.heldout_path, or put the file there")
    if path.stat().st_size == 0:
        raise TpawError(f"{path}: is empty; it needs one row per line")
    read = {".csv": _csv, ".parquet": _parquet}.get(path.suffix, read_jsonl)
    return Source(str(path), read(path))


def _csv(path: Path) -> Iterator[Any]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            yield from rows
        except csv.Error as error:
            raise TpawError(f"{path}: line {rows.reader.line_num} is not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise TpawError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if not file.schema_arrow.names:  # its batches would end the process
            raise ValueError("it has no columns")
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise TpawError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def read_jsonl(path: Path) -> Iterator[Any]:
    number = 0
    with path.open(encoding="utf-8") as file:
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)
        except json.JSONDecodeError as error:
            what = f"line {number} is not JSON ({error.msg})"
            raise TpawError(f"{path}: {what}; each line must be one JSON object") from None
        except UnicodeDecodeError as error:
            raise TpawError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            raise TpawError(f"{path}: line {number} cannot be read ({str(error).split(';')[0]})") from None


def read_hub(data: Data, split: str) -> Source:
    import datasets

    try:
        return Source(f"{data.path}[{split}]", datasets.load_dataset(data.path, data.dataset_config, split=split))
    except Exception as error:  # the library raises a dozen kinds; all mean the same here
        offline = " HF_HUB_OFFLINE is set: unset it, or name a local file." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise TpawError(
            f"data.path {data.path!r}, split {split!r}: cannot be loaded from the hub.{offline} {_first(error)}"
        ) from None


def _first(error: Exception) -> str:
    return f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
