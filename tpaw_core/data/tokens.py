"""Token ids: what a sequence and a pair of sequences are, and many rows of them in one flat array.

Knows numbers; must not know texts, tokenizers or models.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # prompt ids, response ids


class TokenRows(Sequence[Ids]):
    """Rows of token ids, to append to and to index; four bytes per token, however many rows there are."""

    def __init__(self, rows: Iterable[Iterable[int]] = ()) -> None:
        self._values, self._ends = array("i"), array("q", [0])
        for row in rows:
            self.append(row)

    @classmethod
    def of(cls, values: NDArray[np.int32], offsets: NDArray[np.int64]) -> TokenRows:
        """Row i is ``values[offsets[i]:offsets[i + 1]]``."""
        rows = cls()
        rows._values.frombytes(np.ascontiguousarray(values, np.int32).tobytes())
        rows._ends = array("q", np.ascontiguousarray(offsets, np.int64).tobytes())
        return rows

    def append(self, row: Iterable[int]) -> None:
        self._values.extend(row)
        self._ends.append(len(self._values))

    @property
    def values(self) -> NDArray[np.int32]:
        return np.asarray(self._values, np.int32)

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.asarray(self._ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Row ``index`` as array("i")."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._values[self._ends[index] : self._ends[index + 1]]
