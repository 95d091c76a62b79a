from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tpaw_core.errors import TpawError
from tpaw_core.processes import parent

WATCHING = "from tpaw_core.processes import parent; import time; parent.exit_with_parent(); print(1, flush=True); " + (
    "time.sleep(100)"
)
STARTING = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WATCHING!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


def gone(pid: int) -> bool:
    """Within ten seconds."""
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_it_ends_when_its_parent_has_ended() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, check=True)
    assert gone(int(done.stdout))


def test_it_ends_when_the_flow_that_started_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as flow:
        monkeypatch.setenv("TPAW_OWNER", str(flow.pid))
        watching = subprocess.Popen([sys.executable, "-c", WATCHING], stdout=subprocess.PIPE)
        assert watching.stdout is not None
        watching.stdout.readline()
        assert watching.poll() is None
    assert watching.wait(10) == -9
    watching.stdout.close()


def test_where_the_flow_is_gone_already_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setenv("TPAW_OWNER", str(ended.pid))
    with pytest.raises(TpawError, match=rf"the flow \(process {ended.pid}\) that started this stage has ended"):
        parent.exit_with_parent()
