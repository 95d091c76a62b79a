from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpaw_core.errors import TpawError
from tpaw_core.workspace import files
from tpaw_core.workspace.lock import exclusive


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=["file", "folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A published file or folder with the content "old"."""
    target = tmp_path / "deep" / "target"
    with files.publish(target) as aside:
        fill(aside, "old", folder=request.param == "folder")
    return target


def fill(aside: Path, text: str, *, folder: bool) -> None:
    if folder:
        aside.mkdir()
        aside = aside / text
    aside.write_text(text)


def test_what_was_published_replaces_what_was_there_and_leaves_nothing_beside_it(target: Path) -> None:
    folder = target.is_dir()
    with files.publish(target) as aside:
        fill(aside, "new", folder=folder)
    assert tree(target.parent) == ({"target/new": "new"} if folder else {"target": "new"})
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_until_all_went_well_the_old_target_is_in_place(target: Path) -> None:
    before = tree(target.parent)
    with files.publish(target) as aside:
        fill(aside, "new", folder=target.is_dir())
        assert {name: text for name, text in tree(target.parent).items() if not name.startswith(".")} == before


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("no"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), TpawError),
        (None, TpawError),
    ],
    ids=["error", "interrupt", "full disk", "nothing was written"],
)
def test_a_failure_leaves_the_old_target_and_nothing_beside_it(
    error: BaseException | None, raised: type[BaseException], target: Path
) -> None:
    before = tree(target.parent)

    def fail() -> None:
        with files.publish(target) as aside:
            if error is not None:
                fill(aside, "half", folder=target.is_dir())
                raise error

    with pytest.raises(raised):
        fail()
    assert tree(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_full_disk_is_named_with_its_target(target: Path) -> None:
    with pytest.raises(TpawError, match=f"{target}: could not be written .No space left"), files.publish(target):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_runs_full_leaves_the_old_target(small_disk: Path) -> None:
    target = small_disk / "target"
    with files.publish(target) as aside:
        aside.write_text("old")
    with (
        pytest.raises(TpawError, match=f"{target}: could not be written .No space left"),
        files.publish(target) as aside,
    ):
        aside.write_bytes(bytes(4 << 20))
    assert tree(small_disk) == {"target": "old"}
    with files.publish(target) as aside:
        aside.write_text("new")
    assert tree(small_disk) == {"target": "new"}


# The lock -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from tpaw_core import workspace
with workspace.exclusive(sys.argv[1]):
    print("holds", flush=True)
    with open("order", "a") as file:
        file.write(sys.argv[1] + " in\\n")
    sys.stdin.readline()
    with open("order", "a") as file:
        file.write(sys.argv[1] + " out\\n")
"""


class Holder:
    """A process that wants the lock, and keeps it until it is told to end."""

    def __init__(self, name: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, name], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate("\n", timeout=60)


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder("train@1", tmp_path)
    assert holder.says() == "holds"
    yield holder
    holder.process.kill()
    holder.process.communicate()


def test_a_second_stage_says_for_whom_it_waits_and_starts_when_the_first_ends(first: Holder, tmp_path: Path) -> None:
    second = Holder("weights@1", tmp_path)
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
    waiting = Holder("weights@1", tmp_path)
    assert waiting.says().startswith("weights@1: waiting for train@1")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert waiting.says() == "holds"
    waiting.end()
    later = Holder("evaluate 1", tmp_path)
    assert later.says() == "holds"
    later.end()


def test_a_stage_that_fails_frees_the_workspace(workspace_folder: Path) -> None:
    with pytest.raises(RuntimeError), exclusive("train@1"):
        raise RuntimeError
    later = Holder("train@1", workspace_folder)
    assert later.says() == "holds"
    later.end()


def test_what_is_needed_and_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert files.need(tmp_path, "make it") == tmp_path
    with pytest.raises(TpawError, match=r"gone: does not exist; make it with `x`"):
        files.need(tmp_path / "gone", "make it with `x`")
