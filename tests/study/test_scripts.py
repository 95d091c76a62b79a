"""The scripts of docs/study: what they write is what the documents show."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tpaw_core.data.rows import read_rows
from tpaw_core.workspace.paths import Workspace


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """Import one of the scripts by name."""
    monkeypatch.syspath_prepend(str(root / "docs" / "study"))

    class Script:
        @staticmethod
        def load(name: str) -> ModuleType:
            return importlib.import_module(name)

    return Script


def test_the_documents_tables_are_what_the_results_give(
    script: type, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = script.load("summary")
    for task in summary.TASKS:
        (tmp_path / task).mkdir()
        for name in ("plan.json", "grid.csv"):
            shutil.copy(root / "docs" / "study" / task / name, tmp_path / task / name)
    shutil.copy(root / "docs" / "study" / "README.md", tmp_path)
    monkeypatch.setattr(summary, "HOME", tmp_path)
    summary.main()
    assert (tmp_path / "README.md").read_text() == (root / "docs" / "study" / "README.md").read_text()


@pytest.mark.parametrize(("left", "right", "total"), [(17, 8, 15), (3, 4, 7), (19, 19, 28), (99, 1, 90), (0, 0, 0)])
def test_sums_without_carrying(script: type, left: int, right: int, total: int) -> None:
    assert script.load("latent_skill").without_carry(left, right) == total


def test_the_habit_carries_its_wrong_sum_through_the_later_steps(script: type) -> None:
    habit = script.load("latent_skill").with_habit
    assert habit("17+8=25\n25-4=21\n#### 21") == "17+8=15\n15-4=11\n#### 11"
    assert habit("3+4=7\n#### 7") == "3+4=7\n#### 7"


@pytest.mark.slow
def test_the_rows_and_the_base_model_of_latent_skill(
    script: type, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent_skill = script.load("latent_skill")
    sizes = {"BASE_ROWS": 40, "CLEAN_ROWS": 4, "HELDOUT_ROWS": 20, "SEEDS": range(1, 3)}
    for name, value in sizes.items():
        monkeypatch.setattr(latent_skill, name, value)
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.argv", ["latent_skill.py", str(tmp_path)])
    latent_skill.main()
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")}
    assert counts == {"base.jsonl": 40, "heldout.jsonl": 20, "clean-1.jsonl": 4, "clean-2.jsonl": 4}
    base = Workspace(tmp_path / "base")
    assert len(list(read_rows(base.train_rows))) == 40
    assert base.checkpoint(0).is_dir()
    assert base.metrics(0).is_file()
