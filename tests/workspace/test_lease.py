"""Who has a lease, with real processes: one at a time; a dead or silent one gives it back, a living one keeps it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import Timeout

from tpaw_core.workspace import lease

SECONDS = 1.0
HOLD = """
import sys, time
from pathlib import Path
from tpaw_core.workspace import lease

with lease.of(Path("cell.lease"), float(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.readline()
"""
Process = subprocess.Popen[str]


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Process]:
    """A process that has the lease, until it reads a line."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(SECONDS)]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def take(tmp_path: Path) -> Callable[[], bool]:
    """Tries to get the lease; keeps it where that succeeds."""
    own = lease.of(tmp_path / "cell.lease", SECONDS)

    def take() -> bool:
        try:
            own.acquire(blocking=False)
            return True
        except Timeout:
            return False

    return take


def elsewhere(path: Path) -> None:
    """As if the holder ran on another machine: nobody here can say whether it lives."""
    text = path.read_text()
    assert "host=" in text
    path.write_text(text.replace("host=", "host=other-"))


def test_two_never_have_it(other: Process, take: Callable[[], bool], tmp_path: Path) -> None:
    assert not take()
    own = lease.of(tmp_path / "cell.lease", SECONDS)
    assert lease.name(own.owner).startswith(f"process {other.pid} on ")
    other.communicate("\n", timeout=10)
    assert own.owner is None
    assert take()


def test_a_dead_process_of_this_machine_gives_it_back_at_once(other: Process, take: Callable[[], bool]) -> None:
    assert not take()
    other.kill()
    other.wait()
    assert take()


def test_a_dead_process_of_another_machine_gives_it_back_when_it_was_silent_for_long_enough(
    other: Process, take: Callable[[], bool], tmp_path: Path
) -> None:
    other.kill()
    other.wait()
    elsewhere(tmp_path / "cell.lease")
    started = time.monotonic()
    while not take():
        time.sleep(0.05)
    assert SECONDS <= time.monotonic() - started < 2 * SECONDS


def test_a_living_process_of_another_machine_is_not_robbed(
    other: Process, take: Callable[[], bool], tmp_path: Path
) -> None:
    elsewhere(tmp_path / "cell.lease")
    started = time.monotonic()
    while time.monotonic() - started < 2 * SECONDS:
        assert not take()
        time.sleep(0.05)


def test_a_process_that_was_taken_for_dead_ends_itself(other: Process, take: Callable[[], bool]) -> None:
    """A machine that slept: two must not go on writing the same files."""
    other.send_signal(signal.SIGSTOP)
    while not take():
        time.sleep(0.05)
    other.send_signal(signal.SIGCONT)
    assert other.wait(timeout=10) == -signal.SIGKILL
    _, said = other.communicate()
    assert "cell.lease: was taken by another process" in said
    assert "run the same command again" in said


def test_what_else_a_dead_process_had_is_freed_and_nothing_of_others(other: Process, tmp_path: Path) -> None:
    """Silence has to be waited for once only."""
    dead = lease.of(tmp_path / "cell.lease", SECONDS).owner
    assert dead is not None
    with lease.of(tmp_path / "made" / "mine.lease") as mine:
        (tmp_path / "made" / "its.lease").write_text((tmp_path / "cell.lease").read_text())
        lease.free(tmp_path / "made", dead)
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine.lease"]
        assert mine.is_locked
