"""One writer at a time in a workspace."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def exclusive(state: Path, who: str, what: str) -> Iterator[None]:
    """Hold a workspace: "lock" while a stage writes, "flow" so that its parameters stay while a flow runs.

    A second writer waits and logs for whom. The lock is freed when its holder dies.
    """
    state.mkdir(parents=True, exist_ok=True)
    holder = state / f"{what}.holder"
    lock = FileLock(state / what)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text() if holder.exists() else "another command"
        logger.info("%s: waiting for %s in this workspace", who, name)
        lock.acquire()
    try:
        holder.write_text(f"{who} (process {os.getpid()})")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
