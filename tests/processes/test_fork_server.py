"""A command that is forked from the preloaded process does what it does alone, and never outlives who asked."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tests.support.workspace import Project
from tpaw_core.processes import fork_server

TPAW = [str(Path(sys.executable).parent / "tpaw")]
DVC = [sys.executable, "-m", "tpaw_core.processes.fork_server", "dvc"]


@pytest.fixture
def server(host: Project, monkeypatch: pytest.MonkeyPatch) -> psutil.Popen:
    monkeypatch.setenv(fork_server.ADDRESS, host.environment[fork_server.ADDRESS])
    assert host.server is not None
    return host.server


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _jobs(server: psutil.Popen) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def _run(*command: str, folder: Path, alone: bool = False) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if not (alone and name == fork_server.ADDRESS)}
    environment["PATH"] = f"{Path(TPAW[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", fork_server.MODULES)
def test_what_is_imported_beforehand_exists(name: str) -> None:
    """A wrong name would end the server, and with it the first command."""
    assert importlib.util.find_spec(name) is not None


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["status"], ["no-such-command"], ["train", "-t", "1"], ["--help"]])
def test_output_and_status_are_those_of_the_command_by_itself(
    arguments: list[str], server: psutil.Popen, tmp_path: Path
) -> None:
    expected = _run(*TPAW, *arguments, folder=tmp_path, alone=True)
    assert _run(*TPAW, *arguments, folder=tmp_path) == expected
    assert expected[1] or expected[2]


@pytest.mark.slow
def test_dvc_runs_there_too_and_its_commands_after_it(server: psutil.Popen, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: 'tpaw status > out', outs: [out]}}")
    assert _run(*DVC, "init", "--no-scm", "-q", folder=tmp_path)[0] == 0
    status, said, _ = _run(*DVC, "repro", folder=tmp_path)
    assert status == 0
    assert "Running stage 'a'" in said
    assert "worker: stopped" in (tmp_path / "out").read_text()
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: 'tpaw train -t 1', outs: [out]}}")
    status, said, errors = _run(*DVC, "repro", folder=tmp_path)
    assert status == 255
    assert "error: params.yaml: no such file" in errors
    assert "exited with 1" in errors


@pytest.mark.slow
def test_a_command_ends_with_who_asked_for_it(server: psutil.Popen, tmp_path: Path, root: Path) -> None:
    (tmp_path / ".tpaw").mkdir()
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    with FileLock(tmp_path / ".tpaw" / "lock"):
        for kind in (signal.SIGKILL, signal.SIGTERM):
            asking = subprocess.Popen([*TPAW, "sft"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            assert asking.stdout is not None
            assert asking.stdout.readline() == "sft: waiting for another command in this workspace\n"
            assert len(_jobs(server)) == 2
            asking.send_signal(kind)
            asking.wait()
            _until(lambda: not _jobs(server))


@pytest.mark.slow
def test_a_command_that_is_killed_ends_as_a_shell_says_it(server: psutil.Popen, tmp_path: Path, root: Path) -> None:
    (tmp_path / ".tpaw").mkdir()
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    with FileLock(tmp_path / ".tpaw" / "lock"):
        asking = subprocess.Popen([*TPAW, "sft"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert asking.stdout is not None
        asking.stdout.readline()
        attending, job = sorted(_jobs(server), key=lambda process: process.ppid() != server.pid)
        assert job.ppid() == attending.pid
        job.kill()
        assert asking.wait() == 137


@pytest.mark.slow
def test_where_nobody_listens_a_command_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fork_server.ADDRESS, str(tmp_path / "nobody"))
    assert fork_server.ask("tpaw", ["status"]) is None
    assert "worker: stopped" in _run(*TPAW, "status", folder=tmp_path)[1]
    assert _run(*DVC, "version", folder=tmp_path)[0] == 0


@pytest.mark.slow
def test_it_ends_when_whoever_started_it_is_gone(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.argv[1], 'preload', 'socket'], stdin=subprocess.PIPE); print(p.pid, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, *TPAW], cwd=tmp_path, capture_output=True, text=True)
    started = int(done.stdout)
    _until(lambda: not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE)
