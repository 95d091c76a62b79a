"""A process that outlives the command that started it: started detached, found again, ended with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tpaw_core.workspace.records import Record

SECONDS_TO_STOP = 15


class Daemon(Record):
    """pid and create_time together identify one process for ever."""

    pid: int
    create_time: float
    port: int | None
    url: str


def start(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, port: int | None, url: str
) -> Daemon:
    """Run this interpreter with ``arguments`` in ``folder``, in a session of its own; its output goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Daemon(pid=started.pid, create_time=psutil.Process(started.pid).create_time(), port=port, url=url)


def process(daemon: Daemon) -> psutil.Process | None:
    """The recorded process, None when it has ended or its pid now belongs to another one."""
    try:
        process = psutil.Process(daemon.pid)
        return process if _same(process, daemon) and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _same(process: psutil.Process, daemon: Daemon) -> bool:
    # The system derives creation times from its clock, which may have been set meanwhile: allow two seconds.
    return abs(process.create_time() - daemon.create_time) < 2


def stop(daemon: Daemon) -> bool:
    """End it with everything it started. Returns False when nothing of it was left."""
    family = _family(daemon)
    found = bool(family)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for group in {group for process in family if (group := _group(process)) is not None}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, kind)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while family and time.monotonic() < deadline:
            time.sleep(0.1)
            family = {process for process in family | _family(daemon) if _is_alive(process)}
    return found


def _family(daemon: Daemon) -> set[psutil.Process]:
    """The processes of its session, and their descendants: a flow run has a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if not _same(psutil.Process(daemon.pid), daemon):
            return set()
    family = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == daemon.pid:
                family |= {process, *process.children(recursive=True)}
    return {process for process in family if _is_alive(process)}


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid) if process.is_running() else None
    except (psutil.Error, OSError):
        return None


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is dead, also where no parent collects it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
