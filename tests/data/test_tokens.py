from __future__ import annotations

from array import array

import numpy as np
import pytest

from tpaw_core.data.tokens import TokenRows

ROWS = [[5, 6, 7], [], [8]]


def test_rows_come_back_as_they_were_appended() -> None:
    rows = TokenRows(ROWS)
    rows.append(iter([9, 10]))
    assert len(rows) == 4
    assert list(map(list, rows)) == [*ROWS, [9, 10]]
    assert rows[0] == array("i", [5, 6, 7])


def test_rows_can_be_made_of_flat_arrays_and_given_back_as_such() -> None:
    rows = TokenRows(ROWS)
    assert rows.values.tolist() == [5, 6, 7, 8]
    assert rows.values.dtype == np.int32
    assert rows.offsets.tolist() == [0, 3, 3, 4]
    assert rows.offsets.dtype == np.int64
    assert list(TokenRows.of(rows.values, rows.offsets)) == list(rows)


def test_of_takes_arrays_that_are_not_contiguous() -> None:
    values = np.arange(8, dtype=np.int32)[::2]
    assert list(map(list, TokenRows.of(values, np.array([0, 2, 4])))) == [[0, 2], [4, 6]]


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        TokenRows(ROWS)[index]


def test_no_rows() -> None:
    assert list(TokenRows()) == []
    assert TokenRows().offsets.tolist() == [0]
