"""Starting the ranks of a machine on one piece of work, watching them, and leaving none behind."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tpaw_core import errors
from tpaw_core.config.machine import Machine
from tpaw_core.errors import TpawError, Unavailable
from tpaw_core.workspace import files

logger = logging.getLogger(__name__)
REQUEST, DONE, FAILED = "request.pickle", "done-{rank}", "failed-{rank}.json"
POLL = 0.2  # seconds
PATIENCE = 3  # seconds that processes have to end by themselves
# Accelerate's settings would divide the model a second time; with another torchrun's, ours would wait for its hosts.
FOREIGN = ("ACCELERATE_", "PET_", "TORCHELASTIC_")
Work = Callable[[Path], None]  # what a rank does; it gets the folder in which the stage looks for results


ALIVE = "alive"  # touched by a stage whose ranks may be on other hosts
BEAT, GONE = 5, 150  # seconds between touches; seconds without one, longer than NFS keeps a file's times


class Request(NamedTuple):
    """What the ranks get; written by the stage that starts them, for this user alone."""

    work: Work
    timeout: int  # seconds that one rank waits for another
    host: str
    stage: int  # the process on that host without which ranks end


@contextmanager
def folder(home: Path) -> Iterator[Path]:
    """A folder that all ranks see, until the block ends. Waits for ranks elsewhere that a killed stage has left."""
    for left in (home / "launch").glob("*"):
        while (left / ALIVE).exists() and time.time() - (left / ALIVE).stat().st_mtime < GONE:
            logger.info("waiting until the processes of a stage that was killed have ended")
            time.sleep(BEAT)
        shutil.rmtree(left, ignore_errors=True)
    made = (home / "launch" / uuid.uuid4().hex).absolute()
    made.mkdir(parents=True, mode=0o700)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def run(machine: Machine, place: Path, work: Work) -> Iterator[None]:
    """Let every rank do ``work`` and yield now and then, so that the caller can take in what there is of it.

    Raises what a rank raised; Unavailable where a rank was lost, as the same command may succeed later.
    """
    request = Request(work, machine.timeout, socket.gethostname(), os.getpid())
    (place / REQUEST).write_bytes(pickle.dumps(request))
    ended = threading.Event()
    if machine.launch is not None:
        threading.Thread(target=_beat, args=(place / ALIVE, ended), daemon=True).start()
    foreign = FOREIGN if machine.launch is None else FOREIGN[:1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // machine.processes)))
    process = subprocess.Popen(
        [*command(machine), str(place)],
        env=environment,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        while True:
            try:
                code = process.wait(POLL)
                break
            except subprocess.TimeoutExpired:
                yield
    finally:
        ended.set()
        _end(process)
    if code != 0:
        raise _failure(machine, place, code)
    if len(list(place.glob(DONE.format(rank="*")))) < machine.world_size:
        raise TpawError("machine.launch: its command ended before the processes that it starts; it must wait for them")
    yield


def command(machine: Machine) -> list[str]:
    """The words that start the ranks; the last one, their folder, is missing."""
    worker = ["-m", "tpaw_core.launch.worker"]
    if machine.launch is None:
        agent = [sys.executable, "-m", "tpaw_core.launch.agent"]
        return [*agent, "--nproc-per-node", str(machine.processes), *worker]
    words = machine.launch.replace("{processes}", str(machine.processes)).replace("{nodes}", str(machine.nodes))
    return [*shlex.split(words), *worker]


def _beat(alive: Path, ended: threading.Event) -> None:
    while not ended.is_set():
        alive.touch()
        ended.wait(BEAT)


def _end_with_parent() -> None:
    """On Linux a killed stage ends a launcher that is not ours; the agent and ranks on this host see it themselves."""
    if sys.platform == "linux":
        set_signal_of_parents_death = 1
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """First the launcher, which ends its ranks; then whoever is left in its group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue


def _failure(machine: Machine, place: Path, code: int) -> Exception:
    """What the ranks say, those first that name something to fix."""
    found = []
    for path in sorted(place.glob(FAILED.format(rank="*"))):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:  # cut short
            continue
    for told in found:
        kind = getattr(errors, told["kind"], None)
        if isinstance(kind, type) and issubclass(kind, TpawError):
            return kind(told["message"])
    for told in found:
        if told["kind"] != "lost":
            return RuntimeError(f"rank {told['rank']}: {told['message']}")
    lost = (
        f"a process of {machine.world_size} was lost (the launcher ended with status {code}); run the same command "
        "again: it resumes from the last saved state. If it happens again, look for what ended it, such as memory"
    )
    return files.disk_full(RuntimeError(lost), place.parent) or Unavailable(lost)  # a rank may not have had room to say
