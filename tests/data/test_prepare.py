from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpaw_core.config import params_file
from tpaw_core.config.params import Data
from tpaw_core.data import prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.errors import TpawError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
PAIRS = [{"prompt": f"What is {n} + {n}?", "completion": f"{n + n}"} for n in range(10)]
Prepare = Callable[..., dict[str, int]]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def settings(**changes: Any) -> Data:
    return Data(**{"path": "train.jsonl", "heldout_path": "heldout.jsonl", **changes})


def made() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("data").glob("*")}


@pytest.fixture
def prepare(workspace_folder: Path) -> Prepare:
    """Prepare data/ from rows (or raw bytes) of train.jsonl and held-out rows."""

    def run(train: Any = PAIRS[:8], heldout: Any = PAIRS[8:], **changes: Any) -> dict[str, int]:
        for name, content in (("train.jsonl", train), ("heldout.jsonl", heldout)):
            raw = content if isinstance(content, bytes) else jsonl(content).encode()
            (workspace_folder / name).write_bytes(raw)
        return prepare.prepare(settings(**changes), seed=42)

    return run


def messages(row: dict[str, str]) -> dict[str, Any]:
    roles = ("user", row["prompt"]), ("assistant", row["completion"])
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def conversational(row: dict[str, str]) -> dict[str, Any]:
    first, second = messages(row)["messages"]
    return {"prompt": [first], "completion": [second]}


@pytest.mark.parametrize(
    "form", [lambda row: row, messages, conversational], ids=["plain", "messages", "conversational"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_form_of_a_row_gives_the_same_data(form: Any, suffix: str, prepare: Prepare) -> None:
    counts = prepare()
    expected = made()["train.jsonl"], made()["heldout.jsonl"]
    rows = [form(row) for row in PAIRS]
    for name, part in (("other-train", rows[:8]), ("other-heldout", rows[8:])):
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(part), f"{name}.parquet")
        else:
            Path(f"{name}.jsonl").write_text(jsonl(part))
    other = settings(path=f"other-train.{suffix}", heldout_path=f"other-heldout.{suffix}")
    assert prepare.prepare(other, seed=42) == counts == {"train": 8, "heldout": 2}
    assert (made()["train.jsonl"], made()["heldout.jsonl"]) == expected


def test_columns_of_a_csv_have_the_names_the_recipe_gives(workspace_folder: Path) -> None:
    for name, part in (("train.csv", PAIRS[:8]), ("heldout.csv", PAIRS[8:])):
        with open(name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [["frage", "antwort"], *([row["prompt"], row["completion"] + ", €"] for row in part)]
            )
    prepare.prepare(
        settings(path="train.csv", heldout_path="heldout.csv", prompt_column="frage", completion_column="antwort"),
        seed=1,
    )
    first = next(read_rows(Path("data/train.jsonl")))
    assert first.prompt == [{"role": "user", "content": "What is 0 + 0?"}]
    assert first.completion == "0, €"


def test_a_conversation_of_many_turns_keeps_its_last_answer_as_target(prepare: Prepare) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": f"turn {n}"} for n, role in enumerate(roles)]
    prepare([{"messages": turns}])
    (row,) = read_rows(Path("data/train.jsonl"))
    assert row.prompt == turns[:-1]
    assert row.completion == "turn 4"


def test_a_rows_id_is_its_content(prepare: Prepare) -> None:
    prepare(PAIRS[:8])
    ids = {row.completion: row.prompt_id for row in read_rows(Path("data/train.jsonl"))}
    assert len(set(ids.values())) == 8
    prepare([PAIRS[5], {**PAIRS[6], "completion": "another"}])
    five, six = read_rows(Path("data/train.jsonl"))
    assert five.prompt_id == ids["10"]
    assert six.prompt_id not in ids.values()


def test_the_demo_has_4000_and_1000_rows_and_no_prompt_in_both(workspace_folder: Path) -> None:
    demo = params_file.load(ROOT / "recipes" / "demo.yaml").data
    assert prepare.prepare(demo, seed=42) == {"train": 4000, "heldout": 1000}
    train, heldout = (list(read_rows(Path("data") / name)) for name in ("train.jsonl", "heldout.jsonl"))
    assert (len(train), len(heldout)) == (4000, 1000)
    prompts = [row.prompt[0]["content"] for row in (*train, *heldout)]
    assert len(set(prompts)) == 5000
    first = made()
    for path in Path("data").iterdir():
        path.unlink()
    prepare.prepare(demo, seed=42)
    assert made() == first
    prepare.prepare(demo, seed=43)
    assert made()["train.jsonl"] != first["train.jsonl"]
    assert made()["heldout.jsonl"] != first["heldout.jsonl"]


def test_rows_are_made_again_where_anything_that_decides_them_changed(prepare: Prepare) -> None:
    prepare()
    first = made()
    stamp = Path("data/train.jsonl").stat().st_mtime_ns
    prepare()
    assert Path("data/train.jsonl").stat().st_mtime_ns == stamp
    assert prepare(max_train_rows=3) == {"train": 3, "heldout": 2}
    assert prepare([*PAIRS[:7]]) == {"train": 7, "heldout": 2}
    prepare()
    assert made() == first
    Path("data/heldout.jsonl").write_text("tampered")
    prepare()
    assert made() == first


TOO_MANY = "cannot be used; first: row 1: "


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train": b""}, r"train\.jsonl: is empty"),
        ({"heldout": b""}, r"heldout\.jsonl: is empty"),
        ({"train": b"\n\n"}, r"train\.jsonl: holds no rows"),
        ({"train": jsonl(PAIRS[:2]).encode() + b"{oops\n"}, r"train\.jsonl: line 3 is not JSON"),
        ({"train": b"\n" + jsonl(PAIRS[:1]).encode() + b"not JSON\n"}, r"train\.jsonl: line 3 is not JSON"),
        ({"train": jsonl(PAIRS[:1]).encode() + b'{"prompt": "\xff"}\n'}, r"train\.jsonl: is not UTF-8 text"),
        ({"train": b"[" * 100_000}, r"train\.jsonl: line 1 cannot be read"),
        ({"train": b'{"prompt": ' + b"9" * 10_000 + b"}"}, r"train\.jsonl: line 1 cannot be read"),
        ({"train": [{"prompt": "What?"}]}, TOO_MANY + "has no 'completion'; fields are prompt"),
        ({"train": [{"completion": "That."}]}, TOO_MANY + "has no 'prompt'"),
        ({"train": [{}]}, TOO_MANY + "has no 'prompt'; fields are none"),
        ({"train": [{"prompt": "What?", "completion": " \n"}]}, TOO_MANY + "its target is empty"),
        ({"train": [{"prompt": "What?", "completion": None}]}, TOO_MANY + "has no 'completion'"),
        ({"train": [{"prompt": "What?", "completion": 4}]}, TOO_MANY + "its target is empty"),
        ({"train": [{"prompt": " ", "completion": "That."}]}, TOO_MANY + "its prompt is empty"),
        ({"train": [{"prompt": 3, "completion": "That."}]}, TOO_MANY + "its prompt is neither text nor a list"),
        ({"train": [{"prompt": ["What?"], "completion": "That."}]}, TOO_MANY + "its prompt is neither text nor a list"),
        ({"train": [["What?", "That."]]}, TOO_MANY + "is list, not an object"),
        ({"train": [{"messages": []}]}, TOO_MANY + "'messages' must hold a prompt"),
        ({"train": [messages(PAIRS[0])["messages"][:1]]}, TOO_MANY + "is list"),
        ({"train": [{"messages": messages(PAIRS[0])["messages"][:1]}]}, TOO_MANY + "'messages' must hold a prompt"),
        ({"train": [{"messages": messages(PAIRS[0])["messages"][::-1]}]}, TOO_MANY + "'messages' must hold a prompt"),
        ({"train": b'{"prompt": "a\\ud800", "completion": "b"}\n'}, TOO_MANY + "holds a character that is not valid"),
        ({"heldout": PAIRS[7:]}, r"heldout\.jsonl: 1 held-out prompts are also in train, the first 'What is 7 \+ 7\?'"),
        ({"heldout": PAIRS[7:8], "drop_overlap": True}, "every held-out prompt is also in train"),
        ({"heldout_path": None}, "data.heldout_path: name the file with the held-out rows"),
        ({"path": "missing.jsonl"}, r"missing\.jsonl: does not exist; mend data\.path"),
        (
            {"heldout_path": "missing.parquet"},
            r"missing\.parquet: does not exist; mend data\.path or data\.heldout_path",
        ),
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_data_as_it_was(
    bad: dict[str, Any], message: str, prepare: Prepare
) -> None:
    prepare()
    before = made()
    with pytest.raises(TpawError, match=message):
        prepare(**bad)
    assert made() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.parquet", b"PAR1 no", r"bad\.parquet: not a readable Parquet file"),
        ("bad.csv", b"prompt,completion\n\xff\xfe,b\n", r"bad\.csv: is not UTF-8 text"),
        ("bad.csv", b"", r"bad\.csv: is empty"),
        ("bad.csv", b"prompt,completion\n", r"bad\.csv: holds no rows"),
        ("bad.csv", b'prompt,completion\n"' + b"a" * 200_000 + b'",b\n', r"bad\.csv: line 2"),
    ],
)
def test_a_file_of_another_format_that_cannot_be_read_is_named(
    name: str, content: bytes, message: str, prepare: Prepare
) -> None:
    prepare()
    before = made()
    Path(name).write_bytes(content)
    with pytest.raises(TpawError, match=message):
        prepare(path=name)
    assert made() == before


def test_few_unusable_rows_are_counted_and_reported_and_many_stop(
    prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*PAIRS[:8], {"prompt": "no target"}, {"prompt": "none here", "completion": ""}]
    assert prepare(rows, max_skipped=0.2) == {"train": 8, "heldout": 2}
    assert "train.jsonl: 2 of 10 rows cannot be used; first: row 9: has no 'completion'" in capsys.readouterr().out
    with pytest.raises(TpawError, match=r"2 of 10 rows cannot be used.* raise data\.max_skipped \(now 0\.19\)"):
        prepare(rows, max_skipped=0.19)


def test_repeated_rows_are_left_out_and_reported(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare([*PAIRS[:8], *PAIRS[:3]]) == {"train": 8, "heldout": 2}
    assert "3 of 11 rows repeat an earlier row" in capsys.readouterr().out


def test_held_out_rows_that_are_in_train_can_be_left_out(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(heldout=PAIRS[6:], drop_overlap=True) == {"train": 8, "heldout": 2}
    assert [row.completion for row in read_rows(Path("data/heldout.jsonl"))] == ["16", "18"]
    assert "2 of 4 held-out rows left out" in capsys.readouterr().out


def test_a_hub_name_while_offline_is_refused_and_says_why(
    workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        TpawError, match=r"data\.path 'nobody/nothing', split 'train': .*HF_HUB_OFFLINE is set: unset it"
    ):
        prepare.prepare(settings(path="nobody/nothing", heldout_path=None), seed=1)
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist; make it with `tpaw data`"), ("", "holds no rows"), ("{", "line 1 is not JSON")],
)
def test_rows_that_were_never_made_are_asked_for(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(TpawError, match=rf"train\.jsonl: {message}"):
        list(read_rows(tmp_path / "train.jsonl"))


# MAWPS ----------------------------------------------------------------------------------------------------------------

MAWPS = {"Question": "Tom has number0 pens and buys number1 .", "Numbers": "3.0 4.5", "Equation": "+ number0 number1"}


@pytest.mark.parametrize(
    ("equation", "answer"),
    [
        ("+ number0 number1", "7.5"),
        ("- number0 number1", "-1.5"),
        ("/ number0 number1", "0.67"),
        ("* + number0 number1 2", "15.0"),
        ("* + number0 2 + number1 1", "27.5"),
        ("number1", "4.5"),
    ],
)
def test_a_mawps_row_keeps_its_numbers_masked_and_its_target_is_the_equation(
    equation: str, answer: str, prepare: Prepare
) -> None:
    row = {**MAWPS, "Equation": equation, "Answer": answer}
    prepare([row], [{**row, "Question": "other"}], format="mawps")
    (made,) = read_rows(Path("data/train.jsonl"))
    assert made.prompt == [{"role": "user", "content": MAWPS["Question"]}]
    assert made.completion == f"#### {equation}"


@pytest.mark.parametrize(
    "changes",
    [
        {"Numbers": "three 4"},
        {"Equation": "+ number0"},
        {"Equation": "number0 number1"},
        {"Equation": "+ number0 number2"},
        {"Equation": "/ number0 0"},
        {"Answer": "8.5"},
        {"Answer": "?"},
        {"Answer": None},
    ],
)
def test_a_broken_mawps_row_is_refused(changes: dict[str, Any], prepare: Prepare) -> None:
    with pytest.raises(TpawError, match=r"1 of 1 rows cannot be used; first: row 1: "):
        prepare([{**MAWPS, "Answer": "7.5", **changes}], format="mawps")


needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"the real rows are not at {SHARED}")


@needs_shared
def test_mawps_fold_0_is_read_and_its_equations_hold(workspace_folder: Path) -> None:
    fold = SHARED / "mwp" / "mawps" / "fold0"
    lines = {name: len(list(csv.DictReader((fold / name).open()))) for name in ("train.csv", "dev.csv")}
    counts = prepare.prepare(
        settings(path=str(fold / "train.csv"), heldout_path=str(fold / "dev.csv"), format="mawps", drop_overlap=True), 1
    )
    assert counts["train"] > 0.8 * lines["train.csv"]
    assert counts["heldout"] > 0.6 * lines["dev.csv"]
    assert all(re.fullmatch(r"#### [-+*/ \d.number]+", row.completion) for row in read_rows(Path("data/train.jsonl")))


@needs_shared
def test_gsm8k_is_read_whole(workspace_folder: Path) -> None:
    gsm8k = SHARED / "gsm8k"
    columns = {"prompt_column": "question", "completion_column": "answer"}
    counts = prepare.prepare(
        settings(path=str(gsm8k / "train.jsonl"), heldout_path=str(gsm8k / "test.jsonl"), **columns), seed=1
    )
    assert counts == {"train": 7473, "heldout": 1319}
    assert all(re.search(r"\n#### [-\d,.]+$", row.completion) for row in read_rows(Path("data/heldout.jsonl")))
