"""The processes that work in a workspace, found by what they are, not by what started them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

import psutil


def of(folder: Path) -> set[psutil.Process]:
    """Every live process whose current folder is the workspace."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder:
                found.add(process)
    return found


def words(process: psutil.Process) -> list[str]:
    """Its command; none where it has just ended."""
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


def jobs(server: psutil.Process) -> list[psutil.Process]:
    """The commands that were forked from the preloaded process, oldest first: dvc, then the stage that it runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = [job for attendant in server.children() for job in attendant.children()]
        return sorted(found, key=psutil.Process.create_time)
    return []


def orphans(folder: Path, known: Collection[psutil.Process], seconds: float = 5.0) -> set[psutil.Process]:
    """The processes left in the workspace besides ``known``, after some time to exit."""
    deadline = time.monotonic() + seconds
    while left := of(folder) - set(known):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left
