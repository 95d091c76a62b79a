"""encoded/: the rows as token ids, and the tokenizer that made them: written once, read by every stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.artifacts.parquet import readable
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = files.need(workspace.encoded(name), MAKE)
    with readable(path):
        table = pq.read_table(path).combine_chunks()
        if missing := {"prompt_id", "place", "prompt_ids", "target_ids"} - set(table.column_names):
            raise ValueError(f"it has no column {min(missing)}")
        row_ids, places = table["prompt_id"].to_pylist(), table["place"].to_pylist()
        if not all(isinstance(row_id, str) for row_id in row_ids):
            raise ValueError("prompt_id is not a text in every row")
        if not all(isinstance(place, int) for place in places) or [-1, *places] != sorted({-1, *places}):
            raise ValueError("its column place is not in increasing order")
        columns = []
        for column in ("prompt_ids", "target_ids"):
            ids = table[column].combine_chunks()
            if ids.null_count or not pa.types.is_list(ids.type) or ids.type.value_type != pa.int32():
                raise ValueError(f"{column} is not a list of token ids in every row")
            values = ids.values.to_numpy()
            if (values < 0).any():
                raise ValueError(f"{column} holds a token id below 0")
            columns.append(TokenRows.of(values, ids.offsets.to_numpy()))
    if made_from := (table.schema.metadata or {}).get(ROWS, b""):
        files.need(_rows(workspace, name), ROWS_AGAIN)
    if made_from != _digest(workspace, name).encode():
        raise TpawError(f"{path}: was not made from the current data/{name}.jsonl; {AGAIN}")
    found = EncodedRows(row_ids, places, *columns)
    if first is None or not places or places[-1] < first:
        return found
    kept = [number for number, place in enumerate(places) if place < first]
    return EncodedRows(
        [row_ids[n] for n in kept],
        [places[n] for n in kept],
        TokenRows(found.prompts[n] for n in kept),
        TokenRows(found.chosen[n] for n in kept),
    )


def _rows(workspace: Workspace, name: str) -> Path:
    return workspace.data / f"{name}.jsonl"


def _digest(workspace: Workspace, name: str) -> str:
    path = _rows(workspace, name)
    return workspace.sha256(path) if path.exists() else ""


def _write_rows(path: Path, rows: EncodedRows | None, digest: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows or EncodedRows([], [], TokenRows(), TokenRows())

    def ids(values: TokenRows) -> Any:
        return pa.ListArray.from_arrays(pa.array(values.offsets, pa.int32()), pa.array(values.values, pa.int32()))

    columns = {
        "prompt_id": pa.array(rows.row_ids, pa.string()),
        "place": pa.array(rows.places, pa.int64()),
        "prompt_ids": ids(rows.prompts),
        "target_ids": ids(rows.chosen),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({ROWS: digest}), path)
