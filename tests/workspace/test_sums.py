from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tpaw_core.workspace import files, sums
from tpaw_core.workspace.paths import Workspace

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc"
WRONG = "0" * 64


@pytest.fixture(autouse=True)
def _all_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file counts as settled a moment after it was written."""
    monkeypatch.setattr(sums, "SETTLED", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "abc").write_bytes(b"abc")
    return tmp_path / "abc"


@pytest.fixture
def memory(path: Path, tmp_path: Path) -> Path:
    """Knows the file, with a wrong sum: who gets the right one has read the file."""
    memory = tmp_path / "state" / "sums.json"
    assert sums.recall([path], memory) == [ABC]
    plant(memory, WRONG)
    assert sums.recall([path], memory) == [WRONG]
    time.sleep(0.02)  # a tick of the file system's clock
    return memory


def plant(memory: Path, sha256: str) -> None:
    known = json.loads(memory.read_text())["known"]
    known = {name: {**value, "sha256": sha256} for name, value in known.items()}
    memory.write_text(json.dumps({"digest": files.digest(known), "known": known}))


def again_with_old_time(path: Path) -> None:
    """As `touch -r` and `cp -p` do."""
    found = path.stat()
    path.write_bytes(b"abc")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(path: Path) -> None:
    aside = path.with_name("aside")
    shutil.copy2(path, aside)
    aside.replace(path)


@pytest.mark.parametrize(
    "touch",
    [lambda path: path.write_bytes(b"abc"), again_with_old_time, replaced, lambda path: os.utime(path, ns=(0, 0))],
    ids=["written", "written, with its old time", "replaced by a copy", "given another time"],
)
def test_what_was_touched_is_read_again(touch: Callable[[Path], None], path: Path, memory: Path) -> None:
    touch(path)
    assert sums.recall([path], memory) == [ABC]
    assert sums.recall([path], memory) == [ABC]


def test_a_file_changed_moments_ago_is_not_remembered(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within one tick of its file system's clock."""
    monkeypatch.undo()
    assert sums.recall([path], tmp_path / "sums.json") == [ABC]
    assert not (tmp_path / "sums.json").exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-3],
    "a digit of a sum": lambda content: content.replace(b'"sha256": "0', b'"sha256": "1'),
    "another shape": lambda content: json.dumps({"digest": WRONG, "known": [1]}).encode(),
    "no text": lambda content: b"\xff\xfe",
    "brackets": lambda content: b"[" * 5000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_is_ignored_and_made_again(damage: str, path: Path, memory: Path) -> None:
    content = DAMAGES[damage](memory.read_bytes())
    memory.write_bytes(content)
    assert sums.recall([path], memory) == [ABC]
    assert memory.read_bytes() != content
    plant(memory, WRONG)
    assert sums.recall([path], memory) == [WRONG]


def test_a_memory_that_cannot_be_written_costs_time_alone(path: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    assert sums.recall([path], tmp_path / "state" / "sums.json") == [ABC]
    assert (tmp_path / "state").read_text() == "in the way"


def test_files_that_are_gone_are_forgotten(path: Path, memory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"abc")
    path.unlink()
    assert sums.recall([other], memory) == [ABC]
    assert json.loads(memory.read_text())["known"].keys() == {str(other)}


def test_sums_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 10000 * number)
    expected = [files.sha256(path) for path in paths]
    assert sums.read(paths) == sums.recall(paths, tmp_path / "sums.json") == expected
    assert sums.recall(paths[::-1], tmp_path / "sums.json") == expected[::-1]


WRITER = """
import sys
from pathlib import Path
from tpaw_core.workspace import sums
sums.SETTLED = 0
folder, own = Path(sys.argv[1]), sys.argv[2]
for number in range(60):
    path = folder / f"{own}-{number}"
    path.write_bytes(b"abc")
    assert sums.recall([path], folder / "sums.json") == [sys.argv[3]]
"""


def test_writers_at_the_same_time_lose_time_at_most(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), own, ABC]) for own in ("a", "b", "c")]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    memory = json.loads((tmp_path / "sums.json").read_text())
    assert memory["digest"] == files.digest(memory["known"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_workspace_remembers_unless_it_is_told_to_read(path: Path, memory: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.state.mkdir()
    memory.rename(workspace.sums)
    assert workspace.sha256(path) == WRONG
    assert Workspace(tmp_path, remembers=False).sha256(path) == ABC
    assert workspace.sha256(path) == WRONG


def test_a_file_named_from_another_folder_is_known(path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert sums.recall([Path("abc")], memory) == [WRONG]
