"""What `tpaw verify` advises can be followed: nothing is deleted that no cache holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dvc.repo import Repo

from tpaw_core.config.params import Data, Params
from tpaw_core.data import prepare
from tpaw_core.stages.context import Context
from tpaw_core.upkeep import verify
from tpaw_core.workspace.paths import Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Rows that DVC remembers, and then others."""
    Repo.init(str(tmp_path), no_scm=True).close()
    workspace = Workspace(tmp_path)
    for number in (1, 2):
        rows = "".join(f'{{"prompt": "{number} {n}", "completion": "x"}}\n' for n in range(3))
        (tmp_path / "rows.jsonl").write_text(rows)
        (tmp_path / "heldout.jsonl").write_text('{"prompt": "held out", "completion": "x"}\n')
        prepare.prepare(workspace, Data(path="rows.jsonl", heldout_path="heldout.jsonl"), 1)
        if number == 1:
            with Repo(str(tmp_path)) as repo:
                repo.add(str(workspace.data))
    return workspace


def test_rows_that_dvc_does_not_hold_are_to_be_added(workspace: Workspace, params: Params) -> None:
    before = workspace.train_rows.read_bytes()
    (said,) = verify.check(Context(workspace, params)).disagreements
    assert re.search(
        r"data: does not match data\.dvc; if its rows are correct, record them with `dvc add .*data`", said
    )
    with Repo(str(workspace.root)) as repo:
        repo.add(str(workspace.data))
    assert verify.check(Context(workspace, params)).disagreements == []
    assert workspace.train_rows.read_bytes() == before


def test_rows_that_were_changed_by_hand_are_to_be_moved_first(workspace: Workspace, params: Params) -> None:
    workspace.train_rows.write_text('{"prompt_id": "1", "prompt": [], "completion": "mine alone"}\n')
    first, _ = verify.check(Context(workspace, params)).disagreements
    assert re.search(
        r"train\.jsonl: has changed since `tpaw data` made it; move data/ away if it contains the only copy", first
    )


def test_no_advice_replaces_by_force() -> None:
    texts = [ROOT / "README.md", *(ROOT / "tpaw_core").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]
    assert [path for path in texts if re.search(r"checkout (-f|--force)|rm -r", path.read_text())] == []
