from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.rows import encode_rows
from tpaw_core.artifacts import checkpoint, encoded, parquet
from tpaw_core.artifacts.encoded import read_encoded, read_encoding, write_encoding
from tpaw_core.data.encoding import EncodedRows
from tpaw_core.data.endings import Ending
from tpaw_core.data.rows import Row
from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

NAMES = ("train", "heldout", "validation")


def known(encoded: EncodedRows) -> tuple[Any, ...]:
    return encoded.row_ids, encoded.places, *([list(ids) for ids in rows] for rows in encoded[2:])


@pytest.fixture
def kept(rows: list[Row], tokenizer: Any) -> EncodedRows:
    """Five rows of six: the third cannot be used."""
    hostile = Row("hostile", [{"role": "user", "content": f"7{tokenizer.eos_token}"}], "7")
    return encode_rows([*rows[:2], hostile, *rows[2:5]], tokenizer, max_skipped=0.5)


@pytest.fixture
def ending(tokenizer: Any) -> Ending:
    return Ending(tokenizer.eos_token_id, (tokenizer.eos_token_id, 7), in_template=True)


@pytest.fixture
def write(tokenizer: Any, ending: Ending, kept: EncodedRows) -> Callable[[Workspace], None]:
    """Rows for training and held-out ones, none for validation."""

    def run(workspace: Workspace) -> None:
        workspace.data.mkdir(exist_ok=True)
        workspace.train_rows.write_text("rows for training")
        workspace.heldout_rows.write_text("held-out rows")
        write_encoding(workspace, tokenizer, ending, {"train": kept, "heldout": kept})

    return run


@pytest.fixture
def made(workspace: Workspace, write: Callable[[Workspace], None]) -> Workspace:
    write(workspace)
    return workspace


def test_rows_ending_and_tokenizer_come_back_as_they_were_written(
    made: Workspace, kept: EncodedRows, ending: Ending, tokenizer: Any
) -> None:
    assert kept.places == [0, 1, 3, 4, 5]
    for name in ("train", "heldout"):
        assert known(read_encoded(made, name)) == known(kept)
    assert read_encoding(made) == (ending, tokenizer.pad_token_id)
    loaded, text = checkpoint.load_tokenizer(made.tokenizer), "Ada has 12 apples.\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("first", "places"), [(0, []), (1, [0]), (3, [0, 1]), (4, [0, 1, 3]), (6, [0, 1, 3, 4, 5])])
def test_the_first_rows_are_counted_by_their_place_in_the_file(
    first: int, places: list[int], made: Workspace, kept: EncodedRows
) -> None:
    """Rows that cannot be used count too: the answers are read beside the first rows of data/."""
    found = read_encoded(made, "train", first)
    numbers = [number for number, place in enumerate(kept.places) if place in places]
    expected = [[value[number] for number in numbers] for value in known(kept)]
    assert found.places == places
    assert list(known(found)) == expected
    assert known(read_encoded(made, "train", 100)) == known(read_encoded(made, "train"))


def test_without_validation_rows_their_file_is_there_and_empty(made: Workspace) -> None:
    assert made.encoded("validation").exists()
    assert not made.validation_rows.exists()
    for first in (None, 3):
        assert known(read_encoded(made, "validation", first)) == ([], [], [], [])


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_rows_of_other_data_are_refused(change: str, made: Workspace) -> None:
    if change == "edited":
        made.train_rows.write_text("other rows")
        message = rf"{made.encoded('train')}: was not made from the current data/train\.jsonl; recreate it with `tpaw"
    else:
        made.train_rows.unlink()
        message = rf"{made.train_rows}: does not exist; restore it with `dvc checkout data`, or recreate it with `tp"
    with pytest.raises(TpawError, match=message):
        read_encoded(made, "train")
    assert read_encoded(made, "heldout").row_ids


def test_validation_rows_that_were_added_since_are_refused(made: Workspace) -> None:
    made.validation_rows.write_text("rows")
    with pytest.raises(TpawError, match=r"validation\.parquet: was not made from the current data/validation\.jsonl"):
        read_encoded(made, "validation")


def test_a_file_with_another_file_s_rows_is_refused(made: Workspace) -> None:
    made.encoded("heldout").write_bytes(made.encoded("train").read_bytes())
    with pytest.raises(TpawError, match=r"heldout\.parquet: was not made from the current data/heldout\.jsonl"):
        read_encoded(made, "heldout")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def without(column: str) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pq.read_table(path).drop_columns([column]), path)


def with_ids(values: list[Any], kind: pa.DataType) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        table = pq.read_table(path)
        place = table.schema.get_field_index("target_ids")
        pq.write_table(table.set_column(place, "target_ids", pa.array(values, kind)), path)

    return run


@pytest.mark.parametrize(
    "harm",
    [
        cut,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PAR1 no"),
        with_ids([[5], None, [6], [7], [8]], pa.list_(pa.int32())),
        with_ids([5, 6, 7, 8, 9], pa.int32()),
    ],
    ids=["cut", "empty", "no Parquet", "null", "no lists"],
)
def test_a_damaged_file_is_refused(harm: Callable[[Path], None], made: Workspace) -> None:
    harm(made.encoded("train"))
    with pytest.raises(TpawError, match=rf"{made.encoded('train')}: cannot be read"):
        read_encoded(made, "train")


@pytest.mark.parametrize("column", ["prompt_id", "place", "prompt_ids", "target_ids"])
def test_a_missing_column_is_refused(column: str, made: Workspace) -> None:
    without(column)(made.encoded("train"))
    with pytest.raises(TpawError, match="cannot be read"):
        read_encoded(made, "train")


@pytest.mark.parametrize(
    ("kind", "values"), [(pa.list_(pa.float64()), [[0.5]] * 5), (pa.list_(pa.string()), [["5"]] * 5)], ids=str
)
def test_ids_that_are_not_integers_are_refused(kind: pa.DataType, values: list[Any], made: Workspace) -> None:
    with_ids(values, kind)(made.encoded("train"))
    with pytest.raises(TpawError, match="cannot be read"):
        read_encoded(made, "train")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(name: str, workspace: Workspace) -> None:
    message = rf"{workspace.encoded(name)}: does not exist; make it with `tpaw encode`"
    with pytest.raises(TpawError, match=message):
        read_encoded(workspace, name)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"end_id": 1}', b'{"end_id": "one", "stop_ids": [], "pad_id": 0}'])
def test_a_damaged_ending_is_refused(content: bytes, made: Workspace) -> None:
    (made.tokenizer / "ending.json").write_bytes(content)
    with pytest.raises(TpawError, match=r"ending\.json: is damaged; recreate it with `tpaw encode`"):
        read_encoding(made)


def test_a_missing_ending_is_named(workspace: Workspace) -> None:
    with pytest.raises(TpawError, match=r"ending\.json: does not exist; make it with `tpaw encode`"):
        read_encoding(workspace)


def test_equal_inputs_give_equal_bytes(write: Callable[[Workspace], None], tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(workspace := Workspace(tmp_path / name))
        folder = workspace.tokenizer.parent
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert found[0] == found[1]
    assert {f"{name}.parquet" for name in NAMES} < {str(path) for path in found[0]}


def test_many_rows_are_written_and_read_in_parts(
    workspace: Workspace, tokenizer: Any, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of lists holds fewer than 2**31 ids in Arrow."""
    for module in (parquet, encoded):
        monkeypatch.setattr(module, "ROWS_AT_A_TIME", 2)
    ids = TokenRows([number] * (number % 3) for number in range(7))
    rows = EncodedRows([f"{n:016d}" for n in range(7)], [*range(7)], ids, ids[:7])
    write_encoding(workspace, tokenizer, ending, {"train": rows})
    assert pq.ParquetFile(workspace.encoded("train")).num_row_groups == 4
    assert known(read_encoded(workspace, "train")) == known(rows)
    for first in range(8):
        assert known(read_encoded(workspace, "train", first)) == tuple(part[:first] for part in known(rows))


def test_rows_of_many_lengths_keep_theirs(workspace: Workspace, tokenizer: Any, ending: Ending) -> None:
    prompts, targets = TokenRows(), TokenRows()
    for number in range(5):
        prompts.append(range(1, number + 2))
        targets.append([3] * (7 * number % 5))
    rows = EncodedRows([f"{n:016d}" for n in range(5)], list(range(5)), prompts, targets)
    write_encoding(workspace, tokenizer, ending, {"train": rows})
    assert known(read_encoded(workspace, "train")) == known(rows)
