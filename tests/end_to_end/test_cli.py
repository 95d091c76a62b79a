"""The command line as users run it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.workspace import Project
from tpaw_core.config import params_file
from tpaw_core.processes import fork_server
from tpaw_core.workspace.paths import Workspace

pytestmark = pytest.mark.slow

Tpaw = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tpaw(workspace: Workspace, root: Path) -> Tpaw:
    """Run the command line in a workspace that holds the demo's parameters and recipes, and nothing else."""
    shutil.copytree(root / "recipes", workspace.recipes)
    shutil.copy(root / "recipes" / "demo.yaml", workspace.params_file)

    def run(*arguments: str, cwd: Path = workspace.root, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tpaw_core", *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(root), **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def test_help_answers_at_once(tpaw: Tpaw) -> None:
    """Measured against an interpreter that only imports typer, which it cannot do without."""
    started = time.monotonic()
    done = tpaw("--help")
    seconds = time.monotonic() - started
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import typer, psutil, filelock"], check=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds < 3 * (time.monotonic() - started) + 0.5


def test_an_error_is_one_message_and_a_traceback_only_where_it_is_asked_for(tpaw: Tpaw, workspace: Workspace) -> None:
    path = workspace.params_file
    path.write_text(path.read_text().replace("eta:", "etaa:"))
    plain, traced = tpaw("data"), tpaw("data", "--traceback")
    message = "params.yaml: unknown key 'objective.etaa' (did you mean 'eta'?); remove it or fix its name"
    assert (plain.returncode, plain.stdout, plain.stderr) == (1, "", f"error: {message}\n")
    assert traced.returncode == 1
    assert "Traceback (most recent call last)" in traced.stderr
    assert message in traced.stderr


def test_a_silent_tracking_server_ends_a_stage_with_the_status_of_a_temporary_failure(
    tpaw: Tpaw, workspace: Workspace
) -> None:
    workspace.checkpoint(0).mkdir(parents=True)
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        done = tpaw("team", "-t", "1", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert done.returncode == 75
    assert len(done.stderr.splitlines()) == 1


def test_a_disk_that_runs_full_in_a_stage_is_one_message_and_costs_nothing_made(
    tpaw: Tpaw, small_disk: Path, workspace: Workspace, host: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fork_server.ADDRESS, host.environment[fork_server.ADDRESS])
    settings = ["data.max_train_rows=16", "data.max_heldout_rows=4", "sft.num_train_epochs=1"]
    (small_disk / "params.yaml").write_text(params_file.resolve(workspace, "demo", settings)[1])
    assert tpaw("data", cwd=small_disk).returncode == 0
    assert tpaw("encode", cwd=small_disk).returncode == 0
    rows = (small_disk / "data" / "train.jsonl").read_bytes()
    done = tpaw("sft", cwd=small_disk)
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith(f"error: {small_disk}")
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert not (small_disk / "checkpoints").exists()
    assert (small_disk / "data" / "train.jsonl").read_bytes() == rows
