from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.rows import encode_rows, eos_ending
from tpaw_core.artifacts.synthetic import equal_share, read_responses, write_synthetic
from tpaw_core.data.endings import Response
from tpaw_core.data.rows import Row
from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError

NAMES = ["0" * 16, "1" * 16]
DIGEST = "d" * 64  # of the encoded rows


def table(ids: Any, kind: pa.DataType | None = None, names: list[str] = NAMES) -> pa.Table:
    return pa.table({"prompt_id": names, "rejected_ids": pa.array(ids, kind or pa.list_(pa.int32()))})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two answers, of three ids and of none."""
    pq.write_table(table([[5, 6, 7], []]), tmp_path / "1.parquet")
    return tmp_path / "1.parquet"


def test_answers_come_back_as_they_were_generated(rows: list[Row], tokenizer: Any, tmp_path: Path) -> None:
    """Also their texts, for people; a prompt that leaves no room has no answer and no row."""
    encoded = encode_rows(rows[:5], tokenizer)
    kept = encoded._replace(row_ids=encoded.row_ids[1:], chosen=TokenRows(list(encoded.chosen)[1:]))
    texts = ["7", rows[2].completion, "3 + 4 = 7\n#### 7", ""]
    ending = eos_ending(tokenizer)
    closed = [ending.close(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    responses = [ending.cut(ids, 100) for ids in closed[:-1]] + [Response(array("i"), "length")]
    write_synthetic(tmp_path / "2.parquet", 2, "a" * 64, rows[:5], kept, responses, tokenizer, DIGEST)
    found = read_responses(tmp_path / "2.parquet", kept.row_ids, digest=DIGEST)
    assert list(found) == [response.ids for response in responses]
    written = pq.read_table(tmp_path / "2.parquet").to_pylist()
    assert [row["prompt_id"] for row in written] == kept.row_ids
    assert [row["rejected"] for row in written] == texts
    assert [row["finish_reason"] for row in written] == ["stop", "stop", "stop", "length"]
    assert [row["chosen"] for row in written] == [row.completion for row in rows[1:5]]
    assert [row["prompt"] for row in written] == [row.prompt for row in rows[1:5]]
    assert {(row["iteration"], row["opponent"]) for row in written} == {(2, "a" * 64)}
    assert equal_share(tmp_path / "2.parquet") == 0.25


def test_responses_equal_their_target_by_ids_and_not_by_text(rows: list[Row], tokenizer: Any, tmp_path: Path) -> None:
    encoded, path = encode_rows(rows[:2], tokenizer), tmp_path / "1.parquet"
    letters = [i for c in rows[1].completion for i in tokenizer(c, add_special_tokens=False)["input_ids"]]
    responses = [eos_ending(tokenizer).cut(ids, 100) for ids in (encoded.chosen[0], [*letters, encoded.chosen[1][-1]])]
    write_synthetic(path, 1, "a" * 64, rows[:2], encoded, responses, tokenizer, DIGEST)
    written = pq.read_table(path)
    assert written["rejected"].to_pylist() == [row.completion for row in rows[:2]]
    assert written["equal"].to_pylist() == [True, False]
    assert equal_share(path) == 0.5
    pq.write_table(written.drop_columns(["equal"]), path)  # as before responses were compared
    assert equal_share(path) is None


def test_answers_are_given_in_the_order_asked_for(path: Path) -> None:
    assert list(map(list, read_responses(path, NAMES))) == [[5, 6, 7], []]
    assert list(map(list, read_responses(path, NAMES[::-1]))) == [[], [5, 6, 7]]
    assert list(map(list, read_responses(path, NAMES[:1]))) == [[5, 6, 7]]


def test_missing_rows_are_counted_and_named(path: Path) -> None:
    message = rf"{path}: is missing 2 rows of data/train\.jsonl, starting with 2{{16}}; recreate it"
    with pytest.raises(TpawError, match=message):
        read_responses(path, [*NAMES, "2" * 16, "3" * 16])


def test_answers_to_other_encoded_rows_are_refused(path: Path) -> None:
    pq.write_table(table([[5, 6, 7], []]).replace_schema_metadata({"encoded": DIGEST}), path)
    assert len(read_responses(path, NAMES, digest=DIGEST)) == 2
    again = "recreate it with `tpaw generate --iteration 1`"
    with pytest.raises(TpawError, match=rf"{path}: was not made from the current encoded/train\.parquet; {again}"):
        read_responses(path, NAMES, digest="e" * 64)


def test_a_file_from_before_rows_were_encoded_once_is_refused(path: Path) -> None:
    with pytest.raises(TpawError, match="was not made from the current"):
        read_responses(path, NAMES, digest=DIGEST)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TpawError, match=r"1\.parquet: does not exist; recreate it"):
        read_responses(tmp_path / "1.parquet", NAMES)
    assert equal_share(tmp_path / "1.parquet") is None


@pytest.mark.parametrize(
    "broken",
    [
        table([[5], None]),
        table([["5"], ["6"]], pa.list_(pa.string())),
        table([[0.5], [0.25]], pa.list_(pa.float64())),
        table([5, 6], pa.int32()),
        pa.table({"prompt_id": NAMES}),
        pa.table({"rejected_ids": pa.array([[5], [6]], pa.list_(pa.int32()))}),
    ],
    ids=["null", "texts", "fractions", "no lists", "no ids", "no names"],
)
def test_ids_that_are_not_lists_of_integers_are_refused(broken: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    pq.write_table(broken, path)
    with pytest.raises(TpawError, match=rf"{path}: cannot be read \(.*\); recreate it, or restore it"):
        read_responses(path, NAMES)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    pq.write_table(table([[5]], names=["0" * 16]), path)
    path.write_bytes(path.read_bytes().replace(b"0" * 16, b"0" * 11 + b"\xaa" + b"0" * 4))
    with pytest.raises(TpawError, match="cannot be read"):
        read_responses(path, ["0" * 16])


@pytest.mark.parametrize("content", [b"", b"PAR1 no"])
def test_a_file_that_is_not_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    path.write_bytes(content)
    with pytest.raises(TpawError, match=rf"{path}: cannot be read"):
        read_responses(path, NAMES)
