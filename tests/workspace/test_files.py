from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tpaw_core.errors import TpawError
from tpaw_core.workspace import files


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
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (OSError(errno.ENOSPC, "No space left on device"), TpawError),
        (None, TpawError),
    ],
    ids=["error", "interrupt", "unreadable", "full disk", "nothing was written"],
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


def test_a_full_disk_is_reported_with_the_folder(target: Path) -> None:
    message = rf"{target.parent}: the disk is full \(.*No space left on device\); free up space and run the same"
    with pytest.raises(TpawError, match=message), files.publish(target):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/some/input"), OSError("the reader's own")]
)
def test_an_error_of_the_block_is_raised_unchanged(error: OSError, target: Path) -> None:
    """What the block reads may fail too: it must not be reported as a target that cannot be written."""
    with pytest.raises(OSError) as caught, files.publish(target):  # noqa: PT011
        raise error
    assert caught.value is error


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "target"
    message = rf"{target}: could not be written \(.*\); free up space or fix the permissions"
    with pytest.raises(TpawError, match=message), files.publish(target) as aside:
        aside.write_text("new")


def test_what_a_killed_process_left_beside_the_target_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".target-half").mkdir()
    (tmp_path / ".target-half" / "target").write_text("half")
    with files.publish(tmp_path / "target") as aside:
        aside.write_text("new")
    assert tree(tmp_path) == {"target": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_disk_that_runs_full_leaves_the_old_target(small_disk: Path) -> None:
    target = small_disk / "target"
    with files.publish(target) as aside:
        aside.write_text("old")
    with (
        pytest.raises(TpawError, match=rf"{small_disk}: the disk is full \(.*No space left on device\)"),
        files.publish(target) as aside,
    ):
        aside.write_bytes(bytes(4 << 20))
    assert tree(small_disk) == {"target": "old"}
    with files.publish(target) as aside:
        aside.write_text("new")
    assert tree(small_disk) == {"target": "new"}


def test_what_is_needed_and_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert files.need(tmp_path, "make it") == tmp_path
    with pytest.raises(TpawError, match=r"gone: does not exist; make it with `x`"):
        files.need(tmp_path / "gone", "make it with `x`")


def test_digests_are_those_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.digest({"b": [1, "é"], "a": None}) == files.digest({"a": None, "b": [1, "é"]})
    # sha256 of {"a":1}
    assert files.digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
