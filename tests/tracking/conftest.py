"""A real MLflow on a local SQLite database; each test has one of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tpaw_core.config.params import Params
from tpaw_core.tracking.client import tracking_uri
from tpaw_core.tracking.registry import Registry
from tpaw_core.tracking.runs import Runs
from tpaw_core.workspace.paths import Workspace


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: its migrations take seconds, so it is made once and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workspace(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose local database is ready."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("TPAW_SESSION", raising=False)
    made = Workspace(tmp_path / "workspace")
    made.mlflow.mkdir(parents=True)
    shutil.copy(database, made.mlflow / "mlflow.db")
    return made


@pytest.fixture
def elsewhere(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Another workspace with the same MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(workspace))
    made = Workspace(tmp_path / "elsewhere")
    made.root.mkdir()
    return made


@pytest.fixture
def registry(workspace: Workspace, params: Params) -> Registry:
    return Registry(workspace, params)


@pytest.fixture
def runs(workspace: Workspace, params: Params) -> Runs:
    return Runs(workspace, params)
