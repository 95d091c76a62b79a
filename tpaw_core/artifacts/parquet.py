"""What all Parquet files here share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError
from tpaw_core.workspace import records

ENCODED = b"encoded"  # metadata: the digest of the encoded rows that a file belongs to
ROWS_AT_A_TIME = 1 << 16  # Arrow counts the ids of a column of lists in 31 bits


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Report the file as damaged where its bytes are not what they should be."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        raise TpawError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {records.RESTORE}") from None


@contextmanager
def opened(path: Path, columns: Collection[str]) -> Iterator[tuple[Any, Iterator[Any]]]:
    """A file's metadata and its rows, as record batches with these columns. Raises TpawError where it is damaged."""
    import pyarrow.parquet as pq

    with readable(path), pq.ParquetFile(path) as file:
        if missing := {*columns} - {*file.schema_arrow.names}:
            raise ValueError(f"it has no column {min(missing)}")
        yield file.schema_arrow.metadata, file.iter_batches(ROWS_AT_A_TIME, columns=list(columns))


def add_ids(rows: TokenRows, column: Any, name: str) -> None:
    """Append a column of lists of token ids. Raises ValueError where it holds something else."""
    import pyarrow as pa

    if column.null_count or not pa.types.is_list(column.type) or not pa.types.is_integer(column.type.value_type):
        raise ValueError(f"{name} is not a list of token ids in every row")
    values, offsets = column.flatten().to_numpy(), column.offsets.to_numpy()
    if len(values) and not 0 <= values.min() <= values.max() < 1 << 31:
        raise ValueError(f"{name} holds a number that is no token id")
    rows.extend(values, offsets - offsets[0])


def texts(column: Any) -> list[str]:
    """A column's texts, equal ones as one object."""
    found: list[str] = []
    for part in column.dictionary_encode().chunks:
        names = part.dictionary.to_pylist()
        found += map(names.__getitem__, part.indices.to_pylist())
    return found


def refuse_other_rows(path: Path, metadata: Mapping[bytes, bytes] | None, digest: str | None, again: str) -> None:
    """Raise TpawError where a file does not belong to the encoded rows with this digest; None: whichever they are."""
    if digest is not None and (metadata or {}).get(ENCODED, b"") != digest.encode():
        raise TpawError(f"{path}: was not made from the current encoded/train.parquet; recreate it with `{again}`")
