from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpaw_core.workspace.paths import Workspace

HOLD = """
import sys
from tpaw_core import console
from tpaw_core.workspace.paths import Workspace

console.show()
with Workspace().exclusive(*sys.argv[1:]):
    print("holds", flush=True)
    with open("order", "a") as file:
        file.write(sys.argv[1] + " in\\n")
    sys.stdin.readline()
    with open("order", "a") as file:
        file.write(sys.argv[1] + " out\\n")
"""


class Holder:
    """A process that wants the lock, and keeps it until it is told to end."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", HOLD, *arguments]
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate("\n", timeout=60)


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path, "train@1")
    assert holder.says() == "holds"
    yield holder
    holder.process.kill()
    holder.process.communicate()


def test_a_second_stage_says_for_whom_it_waits_and_starts_when_the_first_ends(first: Holder, tmp_path: Path) -> None:
    second = Holder(tmp_path, "weights@1")
    assert second.says() == f"weights@1: waiting for train@1 (process {first.process.pid}) in this workspace"
    first.end()
    assert second.says() == "holds"
    second.end()
    assert (tmp_path / "order").read_text().splitlines() == [
        "train@1 in",
        "train@1 out",
        "weights@1 in",
        "weights@1 out",
    ]


def test_a_killed_holder_frees_the_workspace(first: Holder, tmp_path: Path) -> None:
    waiting = Holder(tmp_path, "weights@1")
    assert waiting.says().startswith("weights@1: waiting for train@1")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert waiting.says() == "holds"
    waiting.end()
    later = Holder(tmp_path, "evaluate 1")
    assert later.says() == "holds"
    later.end()


def test_a_stage_that_fails_frees_the_workspace(workspace: Workspace) -> None:
    with pytest.raises(RuntimeError), workspace.exclusive("train@1"):
        raise RuntimeError
    later = Holder(workspace.root, "train@1")
    assert later.says() == "holds"
    later.end()


def test_a_flow_does_not_keep_its_own_stages_out(workspace: Workspace) -> None:
    with workspace.exclusive("flow", "flow"):
        stage = Holder(workspace.root, "train@1")
        assert stage.says() == "holds"
        stage.end()
