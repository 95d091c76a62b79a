"""The kinds of faults: what is done to a command that runs, or to a file at rest.

A fault at rest gives the path that it damaged; whoever runs next must notice it and name it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from chaos import processes
from chaos.workspace import Workspace

Strike = Callable[[Workspace, random.Random], None]
Damage = Callable[[Path, random.Random], None]


# To a command that runs -----------------------------------------------------------------------------------------------


def stage(number: int) -> Strike:
    """A signal to the process that runs the stage."""
    return lambda made, draw: _send(number, processes.jobs(made.server)[-1:])


def parent(number: int) -> Strike:
    """A signal to the dvc that started the stage."""
    return lambda made, draw: _send(number, processes.jobs(made.server)[:1])


def server(made: Workspace, draw: random.Random) -> None:
    """The preloaded process itself."""
    _send(signal.SIGKILL, [made.server])


def flow(number: int) -> Strike:
    """A signal to the flow run's process, which the worker has started."""

    def strike(made: Workspace, draw: random.Random) -> None:
        worker = made.service("worker")
        _send(number, [p for p in worker.children() if "prefect.flow_engine" in " ".join(p.cmdline())] if worker else [])

    return strike


def service(name: str) -> Strike:
    """`kill -9` of one of the services."""
    return lambda made, draw: _send(signal.SIGKILL, [p] if (p := made.service(name)) else [])


def _send(number: int, targets: list[psutil.Process]) -> None:
    for process in targets:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """No byte is free on the workspace's file system, which is its own."""
    filler = folder.parent / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 9)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written in a folder: mounted over itself, as the rights of root are no obstacle."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# To a file at rest ----------------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    """One bit, in place: what is linked to the file changes with it."""
    with _writable(path), path.open("r+b") as file:
        place = draw.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def truncate(path: Path, draw: random.Random) -> None:
    with _writable(path):
        os.truncate(path, draw.randrange(path.stat().st_size))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    try:
        yield
    finally:
        path.chmod(mode)
