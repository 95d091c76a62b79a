from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import PAIRS, messages
from tpaw_core.config import params_file
from tpaw_core.data import prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

ROOT = Path(__file__).parents[2]
Make = Callable[..., dict[str, int]]
Made = Callable[[], dict[str, bytes]]


def test_a_conversation_of_many_turns_keeps_its_last_answer_as_target(make: Make, workspace: Workspace) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": f"turn {n}"} for n, role in enumerate(roles)]
    make([{"messages": turns}])
    (row,) = read_rows(workspace.train_rows)
    assert row.prompt == turns[:-1]
    assert row.completion == "turn 4"


def test_a_rows_id_is_its_content(make: Make, workspace: Workspace) -> None:
    make(PAIRS[:8])
    ids = {row.completion: row.prompt_id for row in read_rows(workspace.train_rows)}
    assert len(set(ids.values())) == 8
    make([PAIRS[5], {**PAIRS[6], "completion": "another"}])
    five, six = read_rows(workspace.train_rows)
    assert five.prompt_id == ids["10"]
    assert six.prompt_id not in ids.values()


def test_the_demo_has_4000_and_1000_rows_and_no_prompt_in_both(workspace: Workspace, made: Made) -> None:
    demo = params_file.load(ROOT / "recipes" / "demo.yaml").data
    assert prepare.prepare(workspace, demo, seed=42) == {"train": 4000, "heldout": 1000}
    train, heldout = (list(read_rows(workspace.data / name)) for name in ("train.jsonl", "heldout.jsonl"))
    assert (len(train), len(heldout)) == (4000, 1000)
    prompts = [row.prompt[0]["content"] for row in (*train, *heldout)]
    assert len(set(prompts)) == 5000
    first = made()
    for path in workspace.data.iterdir():
        path.unlink()
    prepare.prepare(workspace, demo, seed=42)
    assert made() == first
    prepare.prepare(workspace, demo, seed=43)
    assert made()["train.jsonl"] != first["train.jsonl"]
    assert made()["heldout.jsonl"] != first["heldout.jsonl"]


def test_rows_are_made_again_where_anything_that_decides_them_changed(
    make: Make, made: Made, workspace: Workspace
) -> None:
    make()
    first = made()
    stamp = workspace.train_rows.stat().st_mtime_ns
    make()
    assert workspace.train_rows.stat().st_mtime_ns == stamp
    assert make(max_train_rows=3) == {"train": 3, "heldout": 2}
    assert make([*PAIRS[:7]]) == {"train": 7, "heldout": 2}
    make()
    assert made() == first
    workspace.heldout_rows.write_text("tampered")
    make()
    assert made() == first


TOO_MANY = "cannot be used; the first reasons: row 1: "


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train": [{"prompt": "What?"}]}, TOO_MANY + "has no 'completion'; fields are prompt"),
        ({"train": [{"completion": "That."}]}, TOO_MANY + "has no 'prompt'"),
        ({"train": [{}]}, TOO_MANY + "has no 'prompt'; fields are none"),
        ({"train": [{"prompt": "What?", "completion": " \n"}]}, TOO_MANY + "its target is empty"),
        ({"train": [{"prompt": "What?", "completion": None}]}, TOO_MANY + "has no 'completion'"),
        ({"train": [{"prompt": "What?", "completion": ""}]}, TOO_MANY + "its target is empty"),
        (
            {"train": [{"prompt": "What?", "completion": 4}]},
            TOO_MANY + "its target in 'completion' is the value 4",
        ),
        ({"train": [{"prompt": " ", "completion": "That."}]}, TOO_MANY + "its prompt is empty"),
        ({"train": [{"prompt": 3, "completion": "That."}]}, TOO_MANY + "its prompt must be text or a list"),
        ({"train": [{"prompt": ["What?"], "completion": "That."}]}, TOO_MANY + "its prompt must be text or a list"),
        ({"train": [["What?", "That."]]}, TOO_MANY + "is list, not an object"),
        ({"train": [{"messages": []}]}, TOO_MANY + "'messages' must contain a prompt"),
        ({"train": [messages(PAIRS[0])["messages"][:1]]}, TOO_MANY + "is list"),
        ({"train": [{"messages": messages(PAIRS[0])["messages"][:1]}]}, TOO_MANY + "'messages' must contain a prompt"),
        (
            {"train": [{"messages": messages(PAIRS[0])["messages"][::-1]}]},
            TOO_MANY + "'messages' must contain a prompt",
        ),
        (
            {"train": b'{"prompt": "a\\ud800", "completion": "b"}\n'},
            TOO_MANY + "contains a character that is not valid",
        ),
        (
            {"heldout": PAIRS[7:]},
            r"heldout\.jsonl: 1 held-out prompts are also in train; the first is 'What is 7 \+ 7\?'",
        ),
        ({"heldout": PAIRS[7:8], "drop_overlap": True}, "every held-out prompt is also in train"),
        ({"heldout_path": None}, "data.heldout_path: set it to the file with the held-out rows"),
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_data_as_it_was(
    bad: dict[str, Any], message: str, make: Make, made: Made
) -> None:
    make()
    before = made()
    with pytest.raises(TpawError, match=message):
        make(**bad)
    assert made() == before


def test_few_unusable_rows_are_counted_and_reported_and_many_stop(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*PAIRS[:8], {"prompt": "no target"}, {"prompt": "none here", "completion": ""}]
    assert make(rows, max_skipped=0.2) == {"train": 8, "heldout": 2}
    assert "train.jsonl: 2 of 10 rows cannot be used; the first reasons: row 9: has no 'completion'" in caplog.text
    with pytest.raises(TpawError, match=r"2 of 10 rows cannot be used.* raise data\.max_skipped \(now 0\.19\)"):
        make(rows, max_skipped=0.19)


def test_repeated_rows_are_left_out_and_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make([*PAIRS[:8], *PAIRS[:3]]) == {"train": 8, "heldout": 2}
    assert "3 of 11 rows repeat an earlier row" in caplog.text


def test_held_out_rows_that_are_in_train_can_be_left_out(
    make: Make, caplog: pytest.LogCaptureFixture, workspace: Workspace
) -> None:
    assert make(heldout=PAIRS[6:], drop_overlap=True) == {"train": 8, "heldout": 2}
    assert [row.completion for row in read_rows(workspace.heldout_rows)] == ["16", "18"]
    assert "2 of 4 held-out rows left out" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist; make it with `tpaw data`"), ("", "contains no rows"), ("{", "line 1 is not JSON")],
)
def test_rows_that_were_never_made_are_asked_for(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(TpawError, match=rf"train\.jsonl: {message}"):
        list(read_rows(tmp_path / "train.jsonl"))
