from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpaw_core.artifacts.weights import NUMBERS, Weights, read_weights, scored_in, write_weights
from tpaw_core.config.params import Precision
from tpaw_core.errors import TpawError

PAIRS = pa.list_(pa.float64(), 2)
DIGEST = "d" * 64  # of the encoded rows


@pytest.fixture
def known() -> Weights:
    numbers = np.array([[-1.0, -2.0], [-3.0, -4.0]])
    return Weights(["a", "b"], ["digest"] * 2, numbers, numbers - 1, np.full((2, 2), 0.5))


def save(path: Path, kind: pa.DataType, row: Any, **others: pa.Array) -> Path:
    """One row of weights whose numbers are of this type."""
    numbers = {**dict.fromkeys(NUMBERS, pa.array([row], kind)), **others}
    pq.write_table(pa.table({"prompt_id": ["0" * 16], "opponent": ["1" * 64], **numbers}), path)
    return path


def test_weights_come_back_as_they_were_written(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    names = [f"{n:016d}" for n in range(4)]
    expected = Weights(names * 2, ["a" * 64] * 4 + ["b" * 64] * 4, *(draw.normal(size=(8, 3)) for _ in range(3)))
    write_weights(tmp_path / "3.parquet", expected, DIGEST, "float32")
    found = read_weights(tmp_path / "3.parquet", 3, DIGEST)
    assert (found.prompt_ids, found.opponents) == (expected.prompt_ids, expected.opponents)
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert ours.tobytes() == theirs.tobytes()
        assert ours.shape == theirs.shape == (8, 3)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (pa.list_(pa.float64()), [-1.0, -2.0], "one number for each of 2 players"),
        (pa.list_(pa.float32(), 2), [-1.0, -2.0], "one number for each of 2 players"),
        (pa.list_(pa.float64(), 3), [-1.0, -2.0, -3.0], "one number for each of 2 players"),
        (pa.float64(), -1.0, "one number for each of 2 players"),
        (PAIRS, None, "cannot be read"),
        (PAIRS, [-1.0, None], "cannot be read"),
        (PAIRS, [-1.0, math.inf], "not finite"),
        (PAIRS, [math.nan, -1.0], "not finite"),
    ],
    ids=str,
)
def test_a_column_that_is_not_one_finite_number_per_player_is_refused(
    kind: pa.DataType, row: Any, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "1.parquet", kind, row)
    with pytest.raises(TpawError, match=rf"{path}: cannot be read .*; recreate it") as caught:
        read_weights(path, 2)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_column_is_named(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "1.parquet", PAIRS, [-1.0, -2.0], **{name: pa.array([[-1.0, math.inf]], PAIRS)})
    with pytest.raises(TpawError, match=f"{name} is not finite in every row"):
        read_weights(path, 2)


@pytest.mark.parametrize("content", [b"", b"PAR1 no"])
def test_a_file_that_is_not_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    path.write_bytes(content)
    with pytest.raises(TpawError, match=rf"{path}: cannot be read"):
        read_weights(path, 2)


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt_id": ["0"], "opponent": ["1"]}), tmp_path / "1.parquet")
    with pytest.raises(TpawError, match="cannot be read"):
        read_weights(tmp_path / "1.parquet", 2)


def test_weights_of_other_encoded_rows_are_refused(tmp_path: Path, known: Weights) -> None:
    path = tmp_path / "3.parquet"
    write_weights(path, known, DIGEST, "float32")
    message = rf"{path}: was not made from the current encoded/train\.parquet; recreate it with `tpaw weights"
    with pytest.raises(TpawError, match=f"{message} --iteration 3`"):
        read_weights(path, 2, "e" * 64)
    assert read_weights(path, 2).prompt_ids == known.prompt_ids  # whichever rows they are


def test_a_file_from_before_rows_were_encoded_once_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "1.parquet", PAIRS, [-1.0, -2.0])
    with pytest.raises(TpawError, match="was not made from the current"):
        read_weights(path, 2, DIGEST)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_file_says_in_which_precision_it_was_scored(tmp_path: Path, known: Weights, precision: Precision) -> None:
    path = tmp_path / "1.parquet"
    write_weights(path, known, DIGEST, precision)
    assert scored_in(path) == precision
    assert read_weights(path, 2, DIGEST).prompt_ids == known.prompt_ids


def test_equal_weights_in_equal_precision_are_equal_bytes(tmp_path: Path, known: Weights) -> None:
    names: list[Precision] = ["float32", "float32", "bfloat16"]
    for number, precision in enumerate(names):
        write_weights(tmp_path / str(number), known, DIGEST, precision)
    first, same, other = ((tmp_path / str(number)).read_bytes() for number in range(3))
    assert first == same
    assert first != other


def test_a_file_from_before_precision_was_recorded_says_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt_id": ["a"]}), tmp_path / "1.parquet")
    assert scored_in(tmp_path / "1.parquet") is None


def test_an_unknown_precision_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    pq.write_table(pa.table({"prompt_id": ["a"]}).replace_schema_metadata({"precision": "float8"}), path)
    with pytest.raises(TpawError, match=r"1\.parquet: cannot be read \(precision 'float8' is none of float32"):
        scored_in(path)
