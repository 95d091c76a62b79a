"""Files, folders and data sets that rows come in: each gives the same rows, or is refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpaw_core.config.params import Data
from tpaw_core.data import prepare
from tpaw_core.data.rows import Row, read_rows
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

# Text that readers like to take for something else.
TARGETS = [
    "2024-05-05",
    "007",
    "1,000",
    "1e3",
    "true",
    "null",
    "NA",
    " 2 ",
    "a\nb",
    'say "hi"; it\'s, well',
    "Größe\u2028🦉",
]
ROWS = [{"prompt": f"What is {n}?\tTell me; please, now", "completion": text} for n, text in enumerate(TARGETS)]
HELDOUT = [{"prompt": "held out", "completion": "yes"}]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "heldout.jsonl").write_text(jsonl(HELDOUT))
    return Workspace(tmp_path)


@pytest.fixture
def read(workspace: Workspace) -> Callable[..., list[Row]]:
    """The training rows that `tpaw data` makes of a source in the workspace."""

    def run(path: str, **changes: Any) -> list[Row]:
        prepare.prepare(workspace, Data(**{"path": path, "heldout_path": "heldout.jsonl", **changes}), 1)
        return list(read_rows(workspace.train_rows))

    return run


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def pairs(rows: list[Row]) -> list[dict[str, str]]:
    return [{"prompt": row.prompt[0]["content"], "completion": row.completion} for row in rows]


def table(**options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], **options)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def named(path: Path, **options: Any) -> None:
    table(**options)(path)
    path.write_bytes(b"\xef\xbb\xbfsep=|\r\n" + path.read_bytes())


def spaced(path: Path) -> None:
    """A space behind every separator, and one behind the last name."""
    quoted = ([f'"{text}"' for text in (row["prompt"], row["completion"].replace('"', '""'))] for row in ROWS)
    path.write_text("\n".join(["prompt, completion ", *(", ".join(pair) for pair in quoted)]))


def indexed(path: Path) -> None:
    """A table that was written with its index, read, and written again."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [[n, n, row["prompt"], row["completion"]] for n, row in enumerate(ROWS)]
        csv.writer(file).writerows([["", "", "prompt", "completion"], *rows])


def parquet(kind: Any = None, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        made = pa.Table.from_pylist(ROWS)
        if kind is not None:
            made = made.cast(pa.schema([(name, kind) for name in made.column_names]))
        pq.write_table(made, path, **options)

    return write


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "JSON lines": ("rows.jsonl", lambda path: path.write_text(jsonl(ROWS))),
    "JSON lines with a BOM": ("rows.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS).encode())),
    "Windows line ends": ("rows.jsonl", lambda path: path.write_bytes(jsonl(ROWS).replace("\n", "\r\n").encode())),
    "empty lines, no last end": (
        "r.jsonl",
        lambda path: path.write_text("\n" + jsonl(ROWS).replace("\n", "\n\n")[:-2]),
    ),
    "JSON lines called .json": ("rows.json", lambda path: path.write_text("\n" + jsonl(ROWS))),
    "JSON lines called .txt": ("rows.txt", lambda path: path.write_text(jsonl(ROWS))),
    "a JSON array": ("rows.json", lambda path: path.write_text(json.dumps(ROWS))),
    "a JSON array on many lines": ("rows.json", lambda path: path.write_text("\ufeff\n" + json.dumps(ROWS, indent=1))),
    "gzip": ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + jsonl(ROWS).encode()))),
    "gzip not called so": ("rows.jsonl", lambda path: path.write_bytes(gzip.compress(jsonl(ROWS).encode()))),
    "an array, gzipped": ("rows.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
    "CSV": ("rows.csv", table()),
    "CSV of a spreadsheet": ("rows.csv", table(delimiter=";", encoding="utf-8-sig")),
    "CSV, all in quotes": ("rows.CSV", table(quoting=csv.QUOTE_ALL)),
    "CSV with tabs": ("rows.csv", table(delimiter="\t")),
    "TSV": ("rows.tsv", table(delimiter="\t", encoding="utf-8-sig")),
    "CSV that names its separator": ("rows.csv", lambda path: named(path, delimiter="|")),
    "CSV with spaces": ("rows.csv", lambda path: spaced(path)),
    "CSV with two indices": ("rows.csv", lambda path: indexed(path)),
    "an object around the rows": ("rows.json", lambda path: path.write_text(json.dumps({"v": 1, "data": ROWS}))),
    "the same on many lines": ("rows.json", lambda path: path.write_text(json.dumps({"rows": ROWS}, indent=2))),
    "Parquet": ("rows.parquet", parquet()),
    "Parquet, zstd": ("rows.pq", parquet(pa.large_string(), compression="zstd")),
    "Parquet with dictionaries": ("rows.parquet", parquet(pa.dictionary(pa.int32(), pa.string()))),
    "Parquet without a name": ("rows", parquet(row_group_size=2)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_gives_its_rows_as_text(kind: str, workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    name, write = FILES[kind]
    write(workspace.root / name)
    assert pairs(read(name)) == ROWS


def test_a_folder_of_shards_is_read_whole(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    folder = workspace.root / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("About these rows.")
    (folder / "LICENSE").write_text("Any.")
    (folder / ".gitattributes").write_text("*.parquet lfs")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "a.jsonl").write_text(jsonl(ROWS[:3]))
    (folder / "b.json").write_text(json.dumps(ROWS[3:5]))
    (folder / "c.csv.gz").write_bytes(gzip.compress(b"prompt,completion\r\nWhat?,That.\r\n"))
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), folder / "more" / "0.parquet")
    assert pairs(read("rows")) == [*ROWS[:5], {"prompt": "What?", "completion": "That."}, *ROWS[5:]]
    first = workspace.train_rows.read_bytes()
    (folder / "a.jsonl").write_text(jsonl(ROWS[:2]))
    assert len(read("rows")) == len(ROWS)
    assert workspace.train_rows.read_bytes() != first

    (folder / "b.json").write_text(json.dumps([*ROWS[3:5], {"prompt": "x"}]))
    with pytest.raises(
        TpawError, match=r"rows: 1 of 12 rows cannot be used; the first reasons: b\.json, row 3: has no 'completion'"
    ):
        read("rows")
    (folder / "z.jsonl.bz2").write_bytes(bz2.compress(b"{}"))
    with pytest.raises(
        TpawError, match=r"z\.jsonl\.bz2: is in an unsupported format \(supported: JSON lines, .*move it"
    ):
        read("rows")


def test_a_text_in_a_csv_may_be_long(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    (workspace.root / "rows.csv").write_text(f"prompt,completion\n{'a ' * 100_000},b\n")
    (row,) = read("rows.csv")
    assert len(row.prompt[0]["content"]) == 200_000


def test_empty_shards_are_passed_over(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    folder = workspace.root / "rows"
    folder.mkdir()
    (folder / "0.jsonl").write_text(jsonl(ROWS))
    (folder / "1.jsonl").touch()
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(b""))
    assert pairs(read("rows")) == ROWS


@pytest.mark.parametrize(
    "place",
    ["{}-00000-of-00001.jsonl", "{}/0.jsonl", "gsm_{}.jsonl", "gsm.{}.jsonl", "gsm-{}-0.jsonl", "my_{}/0.jsonl"],
)
def test_a_folder_of_splits_gives_each_its_own(
    place: str, workspace: Workspace, read: Callable[..., list[Row]]
) -> None:
    for split, rows in (("train", ROWS), ("test", HELDOUT), ("validation", HELDOUT[:1])):
        path = workspace.root / "rows" / place.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(jsonl(rows))
    assert pairs(read("rows", heldout_path=None)) == ROWS
    assert pairs(list(read_rows(workspace.heldout_rows))) == HELDOUT
    assert pairs(read("rows")) == ROWS
    with pytest.raises(TpawError, match=r"rows: has the splits test, train, validation, not train_sft; set data\."):
        read("rows", train_split="train_sft")
    (workspace.root / "rows" / "more.jsonl").write_text(jsonl(HELDOUT))
    with pytest.raises(TpawError, match=r"more\.jsonl, whose name indicates no split; move one of them"):
        read("rows")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["training", "testing"], "testing, training"),
        (["gsmTrain", "gsmTest"], ""),
        (["x_train_final", "x_held-out"], "held-out, train_final"),
    ],
)
def test_splits_of_other_names_are_never_read_together(
    names: list[str], splits: str, workspace: Workspace, read: Callable[..., list[Row]]
) -> None:
    (workspace.root / "rows").mkdir()
    for name, rows in zip(names, (ROWS, HELDOUT), strict=True):
        (workspace.root / "rows" / f"{name}.jsonl").write_text(jsonl(rows))
    if splits:
        with pytest.raises(TpawError, match=rf"rows: has the splits {splits}, not train; set data\.train_split"):
            read("rows")
    else:
        assert pairs(read("rows", heldout_path=None)) == ROWS


def test_words_that_only_end_like_a_split_name_none(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    (workspace.root / "rows").mkdir()
    for name, row in zip(["latest", "protest", "retrain", "evaluator"], ROWS, strict=False):
        (workspace.root / "rows" / f"{name}.jsonl").write_text(jsonl([row]))
    assert len(read("rows")) == 4


def test_a_refusal_lists_what_is_read_once(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    (workspace.root / "rows.jsonl").write_text(jsonl([{"a": "b"}, {"a": "c"}, {"d": "e"}]))
    with pytest.raises(
        TpawError, match=r"row 1: has no 'prompt'; .*row 3: has no 'prompt'; fields are d; rows"
    ) as found:
        read("rows.jsonl")
    assert str(found.value).count("'messages' (OpenAI)") == 1


def test_data_sets_of_save_to_disk_are_read(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    train, heldout = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(HELDOUT)
    train.save_to_disk(str(workspace.root / "one"), num_shards=2)
    assert pairs(read("one")) == ROWS
    datasets.DatasetDict({"train": train, "test": heldout}).save_to_disk(str(workspace.root / "both"))
    assert pairs(read("both", heldout_path=None)) == ROWS
    with pytest.raises(TpawError, match=r"both: has no split 'test_sft'; set data\.train_split"):
        read("both", heldout_path=None, heldout_split="test_sft")
    with pytest.raises(TpawError, match=r"data\.heldout_path: set it to the file"):
        read("one", heldout_path=None)
    for path in (workspace.root / "one").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TpawError, match=r"one: is not a readable `save_to_disk` dataset"):
        read("one")


def test_objects_of_many_shapes_come_out_of_arrow_as_they_went_in(
    workspace: Workspace, read: Callable[..., list[Row]]
) -> None:
    """Arrow gives all objects of a column the same keys; `datasets` may write them as JSON text instead."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Call {name}"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": name, "arguments": given}}],
                },
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": "Done."},
            ],
            "tools": [{"name": name, "parameters": {key: {"type": "integer"} for key in given}}],
        }
        for name, given in (("f", {"a": 1}), ("g", {"b": 2, "c": [3]}))
    ]
    (workspace.root / "rows.jsonl").write_text(jsonl(rows))
    expected = read("rows.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), workspace.root / "rows.parquet")
    assert read("rows.parquet") == expected
    datasets.Dataset.from_list(rows).save_to_disk(str(workspace.root / "saved"))
    assert read("saved") == expected
    kinds = {"messages": datasets.List(datasets.Json()), "tools": datasets.Json()}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(workspace.root / "json.parquet")
    assert read("json.parquet") == expected


BROKEN: list[tuple[str, bytes, str]] = [
    (
        "r.json",
        b'[{"prompt": "a", "completion": "b"}',
        r"line 1 is not valid JSON \(neither a comma nor the array's end\)",
    ),
    ("r.json", b'[\n{"prompt": "a", "completion": "b"},\n]', r"line 3 is not valid JSON \(a comma with no row"),
    ("r.json", b'[{"prompt": "a", "completion": "b"}]\n[]', r"line 2 is not valid JSON \(text after the array\)"),
    ("r.json", b"[]", "contains no usable rows"),
    ("r.json", b'[{"prompt": "a",\n "completion"}]', r"line 2 is not valid JSON"),
    ("r.json", b"[" * 100_000, r"line 1 cannot be read"),
    ("r.json", b'{\n "prompt": "a",\n "completion": "b"\n}', r"line 1 is not JSON .* name it \.json"),
    (
        "r.json",
        b'{"data": [{"prompt": "a"}]}',
        r"row 1: has no 'completion'; fields are prompt; rows are read from 'messages'",
    ),
    ("r.jsonl", b'[{"prompt": "a", "completion": "b"}]', "row 1: is list, not an object"),
    ("r.jsonl.gz", gzip.compress(jsonl(ROWS).encode())[:-20], "is damaged"),
    ("r.jsonl.gz", b"\x1f\x8bno", "is damaged"),
    ("r.txt", b"What? That.", "is in an unsupported format; supported: JSON lines, a JSON array, CSV"),
    ("r.xlsx", b"PK\x03\x04\x00\x00", "is in an unsupported format"),
    ("r.csv", b"prompt,completion\nWhat is 1,000 + 1?,5\n", "line 2 has 3 fields, but the header has 2; quote fields"),
    ("r.csv", b"prompt,completion\nWhat?\n", r"row 1: has no 'completion'"),
    ("r.csv", b"prompt,prompt\na,b\n", "has two columns named 'prompt'"),
    ("r.csv", b'prompt,completion\n"a,b\nc,d\n', "is not CSV"),
    ("r.csv", b'prompt,completion\n"say \\"hi\\", now",x\n', r'line 2 is not CSV .*; a quote .* is written twice, ""'),
    ("r.csv", "prompt,completion\nGröße,1\n".encode("cp1252"), "is not UTF-8 text .*; save it as UTF-8"),
    ("r.tsv", b"prompt,completion\na,b\n", "row 1: has no 'prompt'; fields are prompt,completion; rows are read"),
    ("r.parquet", b"PAR1 and more", "not a readable Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_refused_by_name(
    name: str, content: bytes, message: str, workspace: Workspace, read: Callable[..., list[Row]]
) -> None:
    (workspace.root / name).write_bytes(content)
    with pytest.raises(TpawError, match=rf"{name}.*{message}"):
        read(name)
    assert not list(workspace.data.glob("*"))


def test_folders_without_rows_are_refused(workspace: Workspace, read: Callable[..., list[Row]]) -> None:
    folder = workspace.root / "rows"
    folder.mkdir()
    (folder / "README.md").write_text("None yet.")
    with pytest.raises(TpawError, match="rows: contains no data files; supported: JSON lines"):
        read("rows")
    (folder / "a.jsonl").write_bytes(b"")
    with pytest.raises(TpawError, match="rows: contains no data files"):
        read("rows")
    (workspace.root / "other").mkdir()
    (folder / "linked").symlink_to(workspace.root / "other")
    with pytest.raises(TpawError, match="linked: is a symbolic link to a folder"):
        read("rows")


@pytest.mark.parametrize(
    "source", ["data/train.jsonl", "./rows/../data/train.jsonl", "linked", "linked.jsonl", "links", ".", "data"]
)
def test_a_source_in_data_is_refused_and_nothing_is_touched(
    source: str, workspace: Workspace, read: Callable[..., list[Row]]
) -> None:
    for folder in ("data", "rows", "links"):
        (workspace.root / folder).mkdir()
    (workspace.root / "data" / "train.jsonl").write_text(jsonl(ROWS))
    (workspace.root / "linked").symlink_to("data")
    (workspace.root / "linked.jsonl").symlink_to("data/train.jsonl")
    (workspace.root / "links" / "a.jsonl").symlink_to("../data/train.jsonl")
    if source == ".":
        (workspace.root / "linked").unlink()
    for changes in ({"path": source}, {"path": "heldout.jsonl", "heldout_path": source}):
        with pytest.raises(
            TpawError, match=r"(is inside|contains files from) .*data/, which `tpaw data` writes; .*Nothing was"
        ):
            read(**changes)
    assert [path.name for path in workspace.data.iterdir()] == ["train.jsonl"]
    assert workspace.train_rows.read_text() == jsonl(ROWS)


def test_what_was_put_into_data_by_hand_is_not_advised_away(workspace: Workspace) -> None:
    workspace.data.mkdir()
    workspace.train_rows.write_text(jsonl(ROWS))
    with pytest.raises(
        TpawError, match=r"origin\.json: does not exist; move data/ away if it contains the only copy of your rows"
    ):
        prepare.verify(workspace, must_exist=True)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(read: Callable[..., list[Row]], tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in ("Why?", "This.", "That.")]
    pq.write_table(pa.Table.from_arrays(columns, ["prompt", "completion", "completion"]), tmp_path / "r.parquet")
    with pytest.raises(TpawError, match="has two columns named 'completion'; rename one"):
        read("r.parquet")
