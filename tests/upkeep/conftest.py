from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.workspace import Project


@pytest.fixture
def longer_project(longer: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A copy of the project with four iterations."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = longer.copy(tmp_path / "project")
    yield made
    made.close()
