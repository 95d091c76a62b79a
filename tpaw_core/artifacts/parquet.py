"""What all Parquet files here share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tpaw_core.errors import TpawError
from tpaw_core.workspace import records

ENCODED = b"encoded"  # metadata: the digest of the encoded rows that a file belongs to


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Report the file as damaged where its bytes are not what they should be."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        raise TpawError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {records.RESTORE}") from None


def refuse_other_rows(path: Path, metadata: Mapping[bytes, bytes] | None, digest: str | None, again: str) -> None:
    """Raise TpawError where a file does not belong to the encoded rows with this digest; None: whichever they are."""
    if digest is not None and (metadata or {}).get(ENCODED, b"") != digest.encode():
        raise TpawError(f"{path}: was not made from the current encoded/train.parquet; recreate it with `{again}`")
