"""The kinds of faults: what is done to a running command, or to a file at rest.

A fault at rest damages one file; the next command must notice and report it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from chaos import processes
from tests.support.workspace import Project

STARTING = 6  # seconds that ranks take to start, and about as long as they work
Strike = Callable[[Project], bool]  # whether there was something to strike
Hold = Callable[[Path], AbstractContextManager[None]]  # the workspace's folder, or one inside it
Damage = Callable[[Path, random.Random], None]


class Kind(NamedTuple):
    """A kind of fault: the command that runs, and one thing that is done to it or to a file that it reads."""

    command: Literal["repro", "flow"]
    strike: Strike | None = None
    hold: Hold | None = None
    damage: Damage | None = None
    pattern: str = ""  # which files may be damaged

    @property
    def services(self) -> bool:
        """Whether Prefect, MLflow and the worker take part."""
        return self.command == "flow" or self.strike is lost_connection


# To a running command -------------------------------------------------------------------------------------------------


def stage(number: int) -> Strike:
    """A signal to the process that runs the stage."""
    return lambda made: _send(number, processes.jobs(made.server)[1:])


def parent(number: int) -> Strike:
    """A signal to the dvc process that started the stage."""
    return lambda made: _send(number, processes.jobs(made.server)[:1])


def of_a_machine(module: str) -> Strike:
    """`kill -9` of a process that a stage on several has started, at some time of its life."""

    def strike(made: Project) -> bool:
        for _ in range(STARTING * 10):
            found = sorted((p for p in processes.of(made.folder) if module in processes.words(p)), key=lambda p: p.pid)
            if found:
                time.sleep(random.Random(found[0].pid).uniform(0, STARTING))
                return _send(signal.SIGKILL, found[-1:])
            if not processes.jobs(made.server):
                break
            time.sleep(0.1)
        return False

    return strike


def server(made: Project) -> bool:
    """`kill -9` of the preloaded process itself."""
    return _send(signal.SIGKILL, [made.server])


def flow(number: int) -> Strike:
    """A signal to the flow run's process, which the worker started."""

    def strike(made: Project) -> bool:
        worker = made.service("worker")
        return _send(number, worker.children() if worker else [])

    return strike


def service(name: str) -> Strike:
    """`kill -9` of one of the services."""
    return lambda made: _send(signal.SIGKILL, [p] if (p := made.service(name)) else [])


def lost_connection(made: Project) -> bool:
    """The next connection to MLflow is cut, and for one second no other is accepted."""
    assert made.proxy
    return made.proxy.drop()


def second(command: str) -> Strike:
    """The same command a second time, alongside the running one."""

    def strike(made: Project) -> bool:
        made.again(command)
        return True

    return strike


def _send(number: int, targets: list[psutil.Process]) -> bool:
    sent = False
    for process in targets:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            sent = True
    return sent


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """The workspace's own file system has no free byte."""
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
    """A folder is read-only: it is mounted over itself, because permissions do not stop root."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# To a file at rest ----------------------------------------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit, in place."""
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


KILL, TERM = signal.SIGKILL, signal.SIGTERM
CHECKPOINTS, DATA_SETS, SCORES = "checkpoints/*/model.safetensors", "synthetic/*.parquet", ".tpaw/scores/*/*/*/*.npy"
ENCODED, SUMS = "encoded/train.parquet", ".tpaw/sums.json"
# Where stages run on several processes.
OF_RANKS = {
    "kill -9, a rank": Kind("repro", of_a_machine("tpaw_core.launch.worker")),
    "kill -9, the agent of the ranks": Kind("repro", of_a_machine("tpaw_core.launch.agent")),
}
KINDS = {
    "kill -9, the stage": Kind("repro", stage(KILL)),
    "SIGTERM, the stage": Kind("repro", stage(TERM)),
    "kill -9, dvc": Kind("repro", parent(KILL)),
    "SIGTERM, dvc": Kind("repro", parent(TERM)),
    "kill -9, the preloaded process": Kind("repro", server),
    "full disk": Kind("repro", hold=full_disk),
    "folder that cannot be written": Kind("repro", hold=read_only),
    "lost connection to MLflow": Kind("repro", lost_connection),
    "a second dvc repro": Kind("repro", second("repro")),
    "a second flow": Kind("flow", second("flow")),
    "kill -9, the flow": Kind("flow", flow(KILL)),
    "SIGTERM, the flow": Kind("flow", flow(TERM)),
    "kill -9, the worker": Kind("flow", service("worker")),
    "kill -9, Prefect's server": Kind("flow", service("prefect")),
    "kill -9, MLflow's server": Kind("flow", service("mlflow")),
    "flipped bit, checkpoint": Kind("repro", damage=flip, pattern=CHECKPOINTS),
    "truncated, checkpoint": Kind("repro", damage=truncate, pattern=CHECKPOINTS),
    "removed, a checkpoint's file": Kind("repro", damage=remove, pattern="checkpoints/*/*.json"),
    "flipped bit, encoded rows": Kind("repro", damage=flip, pattern=ENCODED),
    "truncated, encoded rows": Kind("repro", damage=truncate, pattern=ENCODED),
    "flipped bit, synthetic data": Kind("repro", damage=flip, pattern=DATA_SETS),
    "truncated, synthetic data": Kind("repro", damage=truncate, pattern=DATA_SETS),
    "flipped bit, team": Kind("repro", damage=flip, pattern="teams/*.json"),
    "flipped bit, scores": Kind("repro", damage=flip, pattern=SCORES),
    "truncated, scores": Kind("repro", damage=truncate, pattern=SCORES),
    "flipped bit, remembered sums": Kind("repro", damage=flip, pattern=SUMS),
    "truncated, remembered sums": Kind("repro", damage=truncate, pattern=SUMS),
    "flipped bit, rows": Kind("flow", damage=flip, pattern="data/*.jsonl"),
    "truncated, dvc.lock": Kind("flow", damage=truncate, pattern="dvc.lock"),
    "flipped bit, dvc.lock": Kind("flow", damage=flip, pattern="dvc.lock"),
    **OF_RANKS,
}
