from __future__ import annotations

from array import array

import numpy as np
import pytest

from tpaw_core.data.tokens import Pairs, Some, TokenRows

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
    assert list(TokenRows.of(np.array([], np.int32), np.array([0]))) == []


def test_rows_are_added_to_others() -> None:
    rows = TokenRows(ROWS)
    rows.extend(np.array([1, 2, 3, 99], np.int64), np.array([0, 0, 3], np.int32))
    assert list(map(list, rows)) == [*ROWS, [], [1, 2, 3]]
    assert rows.lengths.tolist() == [3, 0, 1, 0, 3]


@pytest.mark.parametrize(("start", "end"), [(0, 3), (1, 2), (None, 2), (2, None), (1, 9), (3, 5), (2, 1)])
def test_a_slice_is_rows_of_its_own(start: int | None, end: int | None) -> None:
    some = TokenRows(ROWS)[start:end]
    assert list(map(list, some)) == ROWS[start:end]
    some.append([4])
    assert list(map(list, some)) == [*ROWS[start:end], [4]]


def test_pairs_are_each_prompt_with_the_first_responses_then_with_the_next() -> None:
    prompts, one, other = TokenRows([[1], [2]]), TokenRows([[3], [4, 5]]), TokenRows([[6], []])
    pairs = Pairs(prompts, one, other)
    expected = [([1], [3]), ([2], [4, 5]), ([1], [6]), ([2], [])]
    assert [(list(prompt), list(response)) for prompt, response in pairs] == expected
    assert pairs.response_lengths.tolist() == [1, 2, 1, 0]
    some = Some(pairs, np.array([3, 0, 3]))
    assert [(list(prompt), list(response)) for prompt, response in some] == [expected[n] for n in (3, 0, 3)]
    assert (len(pairs), len(some)) == (4, 3)
    assert list(Pairs(TokenRows(), TokenRows())) == []
    with pytest.raises(IndexError):
        pairs[4]
