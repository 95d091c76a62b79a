"""What `tpaw up`, `down` and `status` say where nothing can be started; end_to_end/test_flows starts and stops them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from tpaw_core.errors import TpawError
from tpaw_core.processes import services
from tpaw_core.workspace.paths import Workspace


@pytest.fixture
def project(workspace: Workspace, root: Path) -> Workspace:
    shutil.copy(root / "prefect.yaml", workspace.root)
    return workspace


def records(workspace: Workspace) -> Path:
    return workspace.state / "services.json"


def test_a_taken_port_is_named_with_the_variable_that_moves_it(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("TPAW_MLFLOW_PORT", str(port))
        monkeypatch.setenv("TPAW_PREFECT_PORT", "1")
        with pytest.raises(TpawError, match=rf"port {port}: taken by another program.*TPAW_MLFLOW_PORT"):
            services.up(project)
    assert not records(project).exists()


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_out_of_range_is_refused(project: Workspace, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("TPAW_PREFECT_PORT", port)
    with pytest.raises(TpawError, match="TPAW_PREFECT_PORT: must be a port number"):
        services.up(project)


def test_one_port_for_both_servers_is_refused(project: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPAW_PREFECT_PORT", "4999")
    monkeypatch.setenv("TPAW_MLFLOW_PORT", "4999")
    with pytest.raises(TpawError, match="port 4999: assigned to both Prefect and MLflow"):
        services.up(project)


def test_up_outside_the_project_says_where_to_go(workspace: Workspace) -> None:
    with pytest.raises(TpawError, match=r"prefect\.yaml: does not exist; run `tpaw up` from the project's folder"):
        services.up(workspace)


def test_down_and_status_where_nothing_runs(project: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    services.down(project)
    assert capsys.readouterr().out == "nothing is running\n"
    assert {status.state for status in services.status(project)} == {"stopped"}


def test_a_damaged_record_is_named(project: Workspace) -> None:
    project.state.mkdir()
    records(project).write_text("{")
    with pytest.raises(
        TpawError, match=r"services\.json: is damaged; stop the services manually, then delete this file"
    ):
        services.status(project)


def test_a_service_that_runs_keeps_its_port_and_is_asked_there(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process stands for Prefect's server: alive, and silent at a port where nobody listens."""
    monkeypatch.setenv("TPAW_PREFECT_PORT", "1")
    here = {"pid": os.getpid(), "create_time": psutil.Process().create_time(), "port": 2, "url": "http://127.0.0.1:2"}
    project.state.mkdir()
    records(project).write_text(json.dumps({"prefect": here}))
    found = {status.name: status for status in services.status(project)}
    assert found["prefect"] == services.Status("prefect", "not answering", "http://127.0.0.1:2", os.getpid())
    assert {found[name].state for name in ("mlflow", "worker")} == {"stopped"}


def test_a_worker_that_outlived_its_server_keeps_the_servers_port(
    project: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPAW_PREFECT_PORT", "4999")
    worker = {"pid": os.getpid(), "create_time": psutil.Process().create_time(), "port": None, "url": "http://x"}
    server = {"pid": os.getpid(), "create_time": 0.0, "port": 4998, "url": "http://127.0.0.1:4998"}
    project.state.mkdir()
    records(project).write_text(json.dumps({"prefect": server, "worker": worker}))
    with pytest.raises(TpawError, match="prefect: the running worker expects it on port 4998"):
        services.up(project)
