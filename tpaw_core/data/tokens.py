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
        rows.extend(values, offsets)
        return rows

    def extend(self, values: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
        """More rows, as `of` takes them: the first offset is 0, and what lies behind the last one is left out."""
        ends = np.asarray(offsets[1:], np.int64) + len(self._values)
        self._values.frombytes(np.ascontiguousarray(values[: offsets[-1]], np.int32).view(np.uint8).data)
        self._ends.frombytes(ends.view(np.uint8).data)

    def append(self, row: Iterable[int]) -> None:
        self._values.extend(row)
        self._ends.append(len(self._values))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def values(self) -> NDArray[np.int32]:
        return np.asarray(self._values, np.int32)

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.asarray(self._ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Row ``index`` as array("i"); a slice, without a step, as rows of their own."""
        if isinstance(index, slice):
            start, end, _ = index.indices(len(self))
            offsets = self.offsets[start : max(start, end) + 1]
            return TokenRows.of(self.values[offsets[0] :], offsets - offsets[0])
        if index < 0:
            raise IndexError(index)
        return self._values[self._ends[index] : self._ends[index + 1]]  # raises IndexError behind the last row


class Pairs(Sequence[Pair]):
    """Each prompt with its response of the first rows, then of the second, and so on; made when it is asked for."""

    def __init__(self, prompts: TokenRows, *responses: TokenRows) -> None:
        self._prompts, self._responses, self._rows = prompts, responses, len(prompts)

    def __len__(self) -> int:
        return self._rows * len(self._responses)

    def __getitem__(self, index: Any) -> Any:
        if index < 0:
            raise IndexError(index)
        which, row = divmod(index, self._rows or 1)
        return self._prompts[row], self._responses[which][row]

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        return np.concatenate([rows.lengths for rows in self._responses])


class Some(Sequence[Pair]):
    """The pairs at some places."""

    def __init__(self, pairs: Sequence[Pair], places: NDArray[np.int64]) -> None:
        self._pairs, self._places = pairs, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._pairs[int(self._places[index])]
