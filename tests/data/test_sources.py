from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.rows import PAIRS, jsonl, messages, settings
from tpaw_core.data import prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

SHARED = Path(__file__).parents[3] / "shared" / "data"
Make = Callable[..., dict[str, int]]
Made = Callable[[], dict[str, bytes]]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def conversational(row: dict[str, str]) -> dict[str, Any]:
    first, second = messages(row)["messages"]
    return {"prompt": [first], "completion": [second]}


@pytest.mark.parametrize(
    "form", [lambda row: row, messages, conversational], ids=["plain", "messages", "conversational"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_form_of_a_row_gives_the_same_data(
    form: Any, suffix: str, make: Make, made: Made, workspace: Workspace
) -> None:
    counts = make()
    expected = made()["train.jsonl"], made()["heldout.jsonl"]
    rows = [form(row) for row in PAIRS]
    for name, part in (("other-train", rows[:8]), ("other-heldout", rows[8:])):
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(part), workspace.root / f"{name}.parquet")
        else:
            (workspace.root / f"{name}.jsonl").write_text(jsonl(part))
    other = settings(path=f"other-train.{suffix}", heldout_path=f"other-heldout.{suffix}")
    assert prepare.prepare(workspace, other, seed=42) == counts == {"train": 8, "heldout": 2}
    assert (made()["train.jsonl"], made()["heldout.jsonl"]) == expected


def test_columns_of_a_csv_have_the_names_the_recipe_gives(workspace: Workspace) -> None:
    for name, part in (("train.csv", PAIRS[:8]), ("heldout.csv", PAIRS[8:])):
        with (workspace.root / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [["frage", "antwort"], *([row["prompt"], row["completion"] + ", €"] for row in part)]
            )
    prepare.prepare(
        workspace,
        settings(path="train.csv", heldout_path="heldout.csv", prompt_column="frage", completion_column="antwort"),
        seed=1,
    )
    first = next(read_rows(workspace.train_rows))
    assert first.prompt == [{"role": "user", "content": "What is 0 + 0?"}]
    assert first.completion == "0, €"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train": b""}, r"train\.jsonl: is empty"),
        ({"heldout": b""}, r"heldout\.jsonl: is empty"),
        ({"train": b"\n\n"}, r"train\.jsonl: contains no usable rows"),
        ({"train": jsonl(PAIRS[:2]).encode() + b"{oops\n"}, r"train\.jsonl: line 3 is not JSON"),
        ({"train": b"\n" + jsonl(PAIRS[:1]).encode() + b"not JSON\n"}, r"train\.jsonl: line 3 is not JSON"),
        ({"train": jsonl(PAIRS[:1]).encode() + b'{"prompt": "\xff"}\n'}, r"train\.jsonl: is not UTF-8 text"),
        ({"train": b"[" * 100_000}, r"train\.jsonl: line 1 cannot be read"),
        ({"train": b'{"prompt": ' + b"9" * 10_000 + b"}"}, r"train\.jsonl: line 1 cannot be read"),
        ({"path": "missing.jsonl"}, r"missing\.jsonl: does not exist; fix data\.path"),
        (
            {"heldout_path": "missing.parquet"},
            r"missing\.parquet: does not exist; fix data\.path or data\.heldout_path",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_leaves_data_as_it_was(
    bad: dict[str, Any], message: str, make: Make, made: Made
) -> None:
    make()
    before = made()
    with pytest.raises(TpawError, match=message):
        make(**bad)
    assert made() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.parquet", b"PAR1 no", r"bad\.parquet: not a readable Parquet file"),
        ("bad.parquet", b"PAR1" + bytes([255] * 20) + parquet(PAIRS)[24:], r"bad\.parquet: not a readable"),
        # Two rows of no column: pyarrow's own batches would end the process.
        ("bad.parquet", parquet([{}, {}]), r"bad\.parquet: not a readable Parquet file: it has no columns"),
        ("bad.csv", b"prompt,completion\n\xff\xfe,b\n", r"bad\.csv: is not UTF-8 text"),
        ("bad.csv", b"", r"bad\.csv: is empty"),
        ("bad.csv", b"prompt,completion\n", r"bad\.csv: contains no usable rows"),
    ],
)
def test_a_file_of_another_format_that_cannot_be_read_is_named(
    name: str, content: bytes, message: str, make: Make, made: Made, workspace: Workspace
) -> None:
    make()
    before = made()
    (workspace.root / name).write_bytes(content)
    with pytest.raises(TpawError, match=message):
        make(path=name)
    assert made() == before


def test_a_hub_name_while_offline_is_refused_and_says_why(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        TpawError, match=r"data\.path 'nobody/nothing', split 'train': .*HF_HUB_OFFLINE is set: unset it"
    ):
        prepare.prepare(workspace, settings(path="nobody/nothing", heldout_path=None), seed=1)
    assert not workspace.data.exists()


@pytest.mark.skipif(not SHARED.exists(), reason=f"the real rows are not at {SHARED}")
def test_gsm8k_is_read_whole(workspace: Workspace) -> None:
    gsm8k = SHARED / "gsm8k"
    columns = {"prompt_column": "question", "completion_column": "answer"}
    counts = prepare.prepare(
        workspace, settings(path=str(gsm8k / "train.jsonl"), heldout_path=str(gsm8k / "test.jsonl"), **columns), seed=1
    )
    assert counts == {"train": 7473, "heldout": 1319}
    assert all(re.search(r"\n#### [-\d,.]+$", row.completion) for row in read_rows(workspace.heldout_rows))
