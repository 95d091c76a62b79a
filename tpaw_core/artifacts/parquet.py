"""What all Parquet files here share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpaw_core.errors import TpawError
from tpaw_core.workspace import records


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Report the file as damaged where its bytes are not what they should be."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        raise TpawError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {records.RESTORE}") from None
