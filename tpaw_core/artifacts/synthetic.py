"""synthetic/<t>.parquet: the answers of checkpoint t-1 to the prompts that iteration t plays on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts.parquet import ENCODED, add_ids, opened, readable, refuse_other_rows
from tpaw_core.data.rows import Row
from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, records

if TYPE_CHECKING:
    from tpaw_core.data.encoding import EncodedRows
    from tpaw_core.data.endings import Response


ROWS_AT_A_TIME = 1000


def write_synthetic(
    path: Path,
    iteration: int,
    opponent: str,
    rows: Iterable[Row],
    encoded: EncodedRows,
    responses: Sequence[Response],
    tokenizer: Any,
    digest: str,
) -> None:
    """A few rows at a time: their texts are read from the file once more. ``digest``: of the encoded rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "prompt_id": pa.string(),
            "iteration": pa.int64(),
            "opponent": pa.string(),
            "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "chosen": pa.string(),
            "rejected": pa.string(),
            "rejected_ids": pa.list_(pa.int32()),
            "finish_reason": pa.string(),
            "equal": pa.bool_(),  # to the target, id for id
        },
        metadata={ENCODED: digest},
    )
    kept = set(encoded.row_ids)  # a prompt without room for an answer has none
    answered = zip((row for row in rows if row.prompt_id in kept), responses, encoded.chosen, strict=True)
    with pq.ParquetWriter(path, schema) as file:
        while some := list(islice(answered, ROWS_AT_A_TIME)):
            ids = [list(r.ids) for _, r, _ in some]
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            columns = zip(
                *(
                    (
                        *(row.prompt_id, iteration, opponent, row.prompt, row.completion, text, own),
                        *(r.finish_reason, own == list(target)),
                    )
                    for (row, r, target), text, own in zip(some, texts, ids, strict=True)
                ),
                strict=True,
            )
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            file.write_batch(pa.record_batch(arrays, schema=schema))


def read_responses(path: Path, row_ids: list[str], digest: str | None = None) -> TokenRows:
    """The ids that an opponent generated, in the order of ``row_ids``.

    Raises TpawError where a row is missing, or the file belongs to other encoded rows than those with ``digest``.
    """
    import pyarrow as pa

    path, names, found = files.need(path, records.RESTORE), [], TokenRows()
    with opened(path, ("prompt_id", "rejected_ids")) as (metadata, batches):
        for batch in batches:
            add_ids(found, batch["rejected_ids"], "rejected_ids")
            names += batch["prompt_id"].cast(pa.string()).to_pylist()
    refuse_other_rows(path, metadata, digest, f"tpaw generate --iteration {path.stem}")
    if names == row_ids:
        return found
    place = {name: number for number, name in enumerate(names)}
    missing = [name for name in row_ids if name not in place]
    if missing:
        raise TpawError(
            f"{path}: is missing {len(missing)} rows of data/train.jsonl, starting with {missing[0]}; recreate it"
        )
    return TokenRows(found[place[name]] for name in row_ids)


def equal_share(synthetic: Path) -> float | None:
    """The share of responses in synthetic/<t>.parquet whose ids are those of their target; None where it is not known.

    Two sequences of ids may make the same text, and to the objective they differ.
    """
    if not synthetic.exists():
        return None
    import pyarrow.parquet as pq

    with readable(synthetic):
        if "equal" not in pq.read_schema(synthetic).names:
            return None
        equal = pq.read_table(synthetic, columns=["equal"])["equal"].to_pylist()
    return sum(equal) / len(equal)
