from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tpaw_core.processes import daemon
from tpaw_core.processes.daemon import Daemon

# Starts a child in a session of its own and one in its own session, prints their ids, and waits.
FAMILY = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
own, other = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
print(own.pid, other.pid, flush=True)
time.sleep(100)
"""
Start = Callable[[str], Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a program as a daemon; it is stopped after the test."""
    started = []

    def make(code: str) -> Daemon:
        log = tmp_path / "logs" / "it.log"
        made = daemon.start(["-c", code], tmp_path, {**os.environ, "NAME": "value"}, log, 1234, "http://x")
        started.append(made)
        return made

    yield make
    for made in started:
        daemon.stop(made)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_runs_detached_in_its_folder_and_its_output_goes_to_the_log(start: Start, tmp_path: Path) -> None:
    made = start("import os, time; print(os.getcwd(), os.environ['NAME'], flush=True); time.sleep(100)")
    log = tmp_path / "logs" / "it.log"
    until(log.read_text)
    assert log.read_text() == f"{tmp_path} value\n"
    assert os.getsid(made.pid) == made.pid
    process = daemon.process(made)
    assert process is not None
    assert process.pid == made.pid
    assert (made.port, made.url) == (1234, "http://x")


def test_the_log_before_is_kept(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "it.log"
    for text in ("one", "two"):
        start(f"print('{text}')")
        until(lambda: log.exists() and log.read_text())
    assert log.read_text() == "two\n"
    assert log.with_suffix(".previous.log").read_text() == "one\n"


def test_stop_ends_it_with_all_its_children_whatever_their_session(start: Start, tmp_path: Path) -> None:
    made, log = start(FAMILY), tmp_path / "logs" / "it.log"
    until(log.read_text)
    children = [psutil.Process(int(pid)) for pid in log.read_text().split()]
    assert daemon.stop(made)
    assert daemon.process(made) is None
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert not daemon.stop(made), "nothing of it was left"


def test_stop_ends_what_a_killed_one_left_behind(start: Start, tmp_path: Path) -> None:
    made, log = start(FAMILY), tmp_path / "logs" / "it.log"
    until(log.read_text)
    own, other = (psutil.Process(int(pid)) for pid in log.read_text().split())
    psutil.Process(made.pid).kill()
    until(lambda: daemon.process(made) is None)
    assert daemon.stop(made)
    assert psutil.wait_procs([own], timeout=5)[1] == []
    other.kill()  # of another session, and its parent is gone: nobody can tell whose it was


def test_another_process_with_the_same_number_is_not_the_daemon_and_is_left_alone() -> None:
    """Its number may have been given to another process: this one."""
    other = Daemon(pid=os.getpid(), create_time=psutil.Process().create_time() - 60, port=None, url="")
    assert daemon.process(other) is None
    assert not daemon.stop(other)


def test_a_clock_that_was_set_does_not_make_it_another_one() -> None:
    same = Daemon(pid=os.getpid(), create_time=psutil.Process().create_time() - 1, port=None, url="")
    assert daemon.process(same) is not None


def test_a_daemon_that_has_ended_is_none(start: Start) -> None:
    made = start("")
    until(lambda: daemon.process(made) is None)
