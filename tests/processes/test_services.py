"""What `tpaw up`, `down` and `status` say where nothing can be started; that they start and stop is in test_loop."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tpaw_core.errors import TpawError
from tpaw_core.processes import services
from tpaw_core.processes.daemon import RECORDS


@pytest.fixture
def folder(workspace_folder: Path, root: Path) -> Path:
    shutil.copy(root / "prefect.yaml", workspace_folder)
    return workspace_folder


def test_a_taken_port_is_named_with_the_variable_that_moves_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("TPAW_MLFLOW_PORT", str(port))
        monkeypatch.setenv("TPAW_PREFECT_PORT", "1")
        with pytest.raises(TpawError, match=rf"port {port}: taken by another program.*TPAW_MLFLOW_PORT"):
            services.up()
    assert not RECORDS.exists()


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_out_of_range_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("TPAW_PREFECT_PORT", port)
    with pytest.raises(TpawError, match="TPAW_PREFECT_PORT: must be a port number"):
        services.up()


def test_one_port_for_both_servers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPAW_PREFECT_PORT", "4999")
    monkeypatch.setenv("TPAW_MLFLOW_PORT", "4999")
    with pytest.raises(TpawError, match="port 4999: wanted by Prefect and MLflow"):
        services.up()


def test_up_outside_the_project_says_where_to_go(workspace_folder: Path) -> None:
    with pytest.raises(TpawError, match=r"prefect\.yaml: does not exist; run `tpaw up` from the project's folder"):
        services.up()


def test_down_and_status_where_nothing_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    services.down()
    assert capsys.readouterr().out == "nothing is running\n"
    assert {status.state for status in services.status()} == {"stopped"}


def test_a_damaged_record_is_named(folder: Path) -> None:
    RECORDS.parent.mkdir()
    RECORDS.write_text("{")
    with pytest.raises(TpawError, match=r"services\.json: unreadable"):
        services.status()
