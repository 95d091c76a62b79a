from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import psutil
import pytest
from torch.distributed.checkpoint import CheckpointException

from tests.support import ranks
from tests.support.ranks import TWO
from tpaw_core.config.machine import Machine
from tpaw_core.errors import TpawError, Unavailable
from tpaw_core.launch import launcher
from tpaw_core.launch.journal import Journal


def refuse(folder: Path) -> None:
    raise TpawError("the row is wrong")


def fail(folder: Path) -> None:
    raise KeyError("an error in the code")


def fill(folder: Path) -> None:
    """As torch.distributed.checkpoint says it."""
    raise CheckpointException("write", {0: (OSError(errno.ENOSPC, "No space left on device"), StackSummary())})


def waiting(home: Path, then: Callable[[list[int], psutil.Process], None]) -> list[int]:
    """Two ranks that wait, and what happens to them; their process ids."""
    pids: list[int] = []
    with launcher.folder(home) as folder:
        for _ in launcher.run(TWO, folder, ranks.wait):
            files = [folder / f"pid-{rank}" for rank in range(2)]
            if not pids and all(path.exists() and path.read_text() for path in files):
                pids += [int(path.read_text()) for path in files]
                then(pids, psutil.Process(pids[0]).parent() or psutil.Process(pids[0]))
    return pids


def assert_all_gone(pids: list[int]) -> None:
    end = time.monotonic() + 5
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank 0", "rank 1", "the agent"])
def test_a_lost_process_ends_all_with_a_status_that_is_retried(who: str, tmp_path: Path) -> None:
    seen: list[int] = []

    def kill(pids: list[int], agent: psutil.Process) -> None:
        seen.extend([*pids, agent.pid])
        os.kill({"rank 0": pids[0], "rank 1": pids[1], "the agent": agent.pid}[who], signal.SIGKILL)

    with pytest.raises(Unavailable, match="a process of 2 was lost") as error:
        waiting(tmp_path, kill)
    assert error.value.exit_status == 75
    assert_all_gone(seen)


@pytest.mark.slow
def test_what_ends_the_stage_ends_the_ranks(tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupt(pids: list[int], agent: psutil.Process) -> None:
        seen.extend([*pids, agent.pid])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting(tmp_path, interrupt)
    assert_all_gone(seen)
    assert not list((tmp_path / "launch").iterdir())


@pytest.mark.slow
def test_a_refusal_on_a_rank_is_the_stages_and_an_error_of_the_code_is_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NO_PYTHON", "1")  # as in a job of another torchrun
    with launcher.folder(tmp_path) as folder, pytest.raises(TpawError, match="the row is wrong"):
        list(launcher.run(TWO, folder, refuse))
    with launcher.folder(tmp_path) as folder, pytest.raises(RuntimeError, match="an error in the code"):
        list(launcher.run(TWO, folder, fail))
    with launcher.folder(tmp_path) as folder, pytest.raises(TpawError, match="the disk is full") as error:
        list(launcher.run(TWO, folder, fill))
    assert error.value.exit_status == 1


def test_a_rank_that_has_no_room_to_say_that_the_disk_is_full(small_disk: Path) -> None:
    place = small_disk / "launch" / "place"
    place.mkdir(parents=True)
    (small_disk / "rest").write_bytes(bytes(3 << 19))
    (place / launcher.FAILED.format(rank=0)).touch()
    with pytest.raises(TpawError, match="the disk is full"):
        raise launcher._failure(TWO, place, 1)


def test_the_words_that_start_a_job_come_before_the_workers() -> None:
    own = Machine(
        processes=8, nodes=2, launch="srun -N {nodes} bash -c 'torchrun --nproc-per-node={processes} \"$@\"' --"
    )
    assert launcher.command(own) == [
        *("srun", "-N", "2", "bash", "-c", 'torchrun --nproc-per-node=8 "$@"', "--"),
        *("-m", "tpaw_core.launch.worker"),
    ]


def test_a_journal_gives_each_complete_entry_once(tmp_path: Path) -> None:
    writer, reader = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    assert reader.new() == []
    writer.extend([[1, 0.1], [2, float("inf")]])
    with writer.path.open("a") as file:
        file.write("[3, ")
    assert reader.new() == [[1, 0.1], [2, float("inf")]]
    with writer.path.open("a") as file:
        file.write("4]\n")
    assert reader.new() == [[3, 4]]
    assert reader.new() == []


def test_what_a_killed_stage_left_elsewhere_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "BEAT", 0.05)
    monkeypatch.setattr(launcher, "GONE", 0.5)
    left = tmp_path / "launch" / "left"
    left.mkdir(parents=True)
    (left / launcher.ALIVE).touch()
    start = time.monotonic()
    with launcher.folder(tmp_path) as folder:
        assert [path.name for path in (tmp_path / "launch").iterdir()] == [folder.name]
    assert time.monotonic() - start >= 0.4
    with launcher.folder(tmp_path):
        assert time.monotonic() - start < 5


@pytest.mark.slow
def test_ranks_of_a_launcher_of_ones_own_end_when_nobody_asks_for_them(tmp_path: Path) -> None:
    """The words may start processes that do not end with the stage's, as on a cluster."""
    words = f"setsid --wait {sys.executable} -m tpaw_core.launch.agent --nproc-per-node={{processes}}"
    seen: list[int] = []
    with launcher.folder(tmp_path) as folder:
        for _ in launcher.run(Machine(processes=2, launch=words), folder, ranks.wait):
            files = [folder / f"pid-{rank}" for rank in range(2)]
            if all(path.exists() and path.read_text() for path in files):
                seen = [int(path.read_text()) for path in files]
                assert (folder / launcher.ALIVE).exists()
                break
    assert len(seen) == 2
    assert_all_gone(seen)


def test_a_launcher_that_does_not_wait_for_its_processes_is_refused(tmp_path: Path) -> None:
    own = Machine(processes=2, launch="true")
    with launcher.folder(tmp_path) as folder, pytest.raises(TpawError, match="it must wait for them"):
        list(launcher.run(own, folder, ranks.wait))
