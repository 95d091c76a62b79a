"""SHA-256 sums of files, remembered: a file that was not touched since it was read is not read again.

Touched is what has another inode, size, modification time or change time. The change time is the kernel's own: it also
tells of a file that was changed and given its old modification time back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, records
from tpaw_core.workspace.records import Record

SETTLED = 2 * 10**9  # ns: a file touched more recently could be touched again within one tick of its file system


class Known(Record):
    """What an untouched file looks like, and its sum."""

    stamp: list[int]  # inode, size, modification time and change time in ns
    sha256: str


class Memory(Record):
    """.tpaw/sums.json."""

    digest: str  # of ``known``: a flipped bit must not pass for a damaged checkpoint
    known: dict[str, Known]  # by absolute path


def read(paths: Sequence[Path]) -> list[str]:
    """The sum of each file, all bytes read: one thread for each core, as hashing holds no lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(files.sha256, paths))


def recall(paths: Sequence[Path], memory: Path) -> list[str]:
    """The sum of each file, read only where ``memory`` does not know it as it is now; then ``memory`` learns it.

    A memory that is lost, damaged or cannot be written costs time and nothing else.
    """
    known, now = _load(memory), time.time_ns()
    stamps = {os.path.abspath(path): _stamp(path) for path in paths}
    missing = [name for name, stamp in stamps.items() if name not in known or known[name].stamp != stamp]
    found = dict(zip(missing, read([Path(name) for name in missing]), strict=True))
    # The stamps are from before the reading: a file that was written to meanwhile does not match its own.
    new = {n: Known(stamp=stamps[n], sha256=sha) for n, sha in found.items() if stamps[n][-1] < now - SETTLED}
    if new:
        kept = {name: value for name, value in _load(memory).items() if os.path.exists(name)} | new
        plain = {name: value.model_dump() for name, value in kept.items()}
        with suppress(TpawError, OSError), files.publish(memory) as aside:
            aside.write_text(Memory(digest=files.digest(plain), known=kept).text())
    return [found.get(name) or known[name].sha256 for name in map(os.path.abspath, paths)]


def _load(memory: Path) -> dict[str, Known]:
    with suppress(TpawError, OSError):
        found = records.read(memory, Memory)
        if files.digest(found.model_dump()["known"]) == found.digest:
            return found.known
    return {}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
