"""encoded/: the rows as token ids, and the tokenizer that made them: written once, read by every stage."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.artifacts.parquet import ROWS_AT_A_TIME, add_ids, opened
from tpaw_core.data.encoding import EncodedRows
from tpaw_core.data.endings import Ending
from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, records
from tpaw_core.workspace.paths import Workspace
from tpaw_core.workspace.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAKE, AGAIN = "make it with `tpaw encode`", "recreate it with `tpaw encode`"
ROWS_AGAIN = "restore it with `dvc checkout data`, or recreate it with `tpaw data`"
ROWS = b"rows"  # metadata: the digest of the rows' file


class EndingFile(Record):
    """encoded/tokenizer/ending.json."""

    end_id: int
    stop_ids: list[int]
    in_template: bool
    opening: str = ""
    pad_id: int


class Encoding(NamedTuple):
    """What holds for all rows."""

    ending: Ending
    pad_id: int


def write_encoding(
    workspace: Workspace,
    tokenizer: PreTrainedTokenizerBase,
    ending: Ending,
    rows: dict[str, EncodedRows],
) -> None:
    """``rows`` by the name of their file in data/; without rows a file is written all the same, empty."""
    with workspace.publish(workspace.tokenizer) as aside:
        tokenizer.save_pretrained(aside)
        content = EndingFile(
            end_id=ending.end_id,
            stop_ids=list(ending.stop_ids),
            in_template=ending.in_template,
            opening=ending.opening,
            pad_id=tokenizer.pad_token_id,
        )
        (aside / "ending.json").write_text(content.text())
    for name in ("train", "heldout", "validation"):
        with workspace.publish(workspace.encoded(name)) as aside:
            _write_rows(aside, rows.get(name), _digest(workspace, name))


def read_encoding(workspace: Workspace) -> Encoding:
    path = files.need(workspace.tokenizer / "ending.json", MAKE)
    found = records.read(path, EndingFile, AGAIN)
    if found.end_id not in found.stop_ids:
        raise TpawError(f"{path}: is damaged; {AGAIN}")
    return Encoding(Ending(found.end_id, tuple(found.stop_ids), found.in_template, found.opening), found.pad_id)


def read_encoded(workspace: Workspace, name: str, first: int | None = None) -> EncodedRows:
    """The rows of data/<name>.jsonl; ``first``: those among its first N.

    Raises TpawError where they or the rows in data/ are missing, damaged, or do not belong together.
    """
    path = files.need(workspace.encoded(name), MAKE)
    found = EncodedRows([], [], TokenRows(), TokenRows())
    with opened(path, ("prompt_id", "place", "prompt_ids", "target_ids")) as (metadata, batches):
        for batch in batches:
            row_ids, places = batch["prompt_id"].to_pylist(), batch["place"].to_pylist()
            if not all(isinstance(row_id, str) for row_id in row_ids):
                raise ValueError("prompt_id is not a text in every row")
            known = [*(found.places[-1:] or [-1]), *places]
            if not all(isinstance(place, int) for place in places) or not all(a < b for a, b in pairwise(known)):
                raise ValueError("its column place is not in increasing order")
            found.row_ids.extend(row_ids)
            found.places.extend(places)
            add_ids(found.prompts, batch["prompt_ids"], "prompt_ids")
            add_ids(found.chosen, batch["target_ids"], "target_ids")
    if made_from := (metadata or {}).get(ROWS, b""):
        files.need(_rows(workspace, name), ROWS_AGAIN)
    if made_from != _digest(workspace, name).encode():
        raise TpawError(f"{path}: was not made from the current data/{name}.jsonl; {AGAIN}")
    if first is None or not found.places or found.places[-1] < first:
        return found
    kept = bisect_left(found.places, first)
    return EncodedRows(found.row_ids[:kept], found.places[:kept], found.prompts[:kept], found.chosen[:kept])


def _rows(workspace: Workspace, name: str) -> Path:
    return workspace.data / f"{name}.jsonl"


def _digest(workspace: Workspace, name: str) -> str:
    path = _rows(workspace, name)
    return workspace.sha256(path) if path.exists() else ""


def _write_rows(path: Path, rows: EncodedRows | None, digest: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows or EncodedRows([], [], TokenRows(), TokenRows())
    lists = pa.list_(pa.int32())
    columns = {"prompt_id": pa.string(), "place": pa.int64(), "prompt_ids": lists, "target_ids": lists}
    schema = pa.schema(columns, metadata={ROWS: digest})

    def ids(values: TokenRows) -> Any:
        return pa.ListArray.from_arrays(pa.array(values.offsets, pa.int32()), pa.array(values.values, pa.int32()))

    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, max(1, len(rows.row_ids)), ROWS_AT_A_TIME):
            some = slice(start, start + ROWS_AT_A_TIME)
            texts, places = pa.array(rows.row_ids[some], pa.string()), pa.array(rows.places[some], pa.int64())
            arrays = [texts, places, ids(rows.prompts[some]), ids(rows.chosen[some])]
            file.write_table(pa.table(arrays, schema=schema))
