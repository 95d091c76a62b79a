"""One holder at a time among processes on any machines that share a folder.

A lease is a file that its holder touches every few seconds. Another process takes it when the holder is known to be
dead, on the same machine, or was silent for a while by the other's own clock. So clocks need not agree, and the file
system needs no locks. A holder that lives on after that ends itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from filelock import LeaseCompromise, OwnerRecord, SoftFileLease

SECONDS = 120.0  # NFS shows a change after up to 60 s, and a busy process may be silent for some time
BEAT = 5.0


def of(path: Path, seconds: float = SECONDS) -> SoftFileLease:
    """The lease at ``path``; all processes must give it the same ``seconds``.

    `with` waits for it; `acquire(blocking=False)` raises filelock.Timeout where another process has it. Ask the same
    object again later: it remembers since when a holder is silent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beat = min(BEAT, seconds / 3)
    return SoftFileLease(
        path, lease_duration=seconds, heartbeat_interval=beat, poll_interval=0.2, on_compromise=_end_this_process
    )


def name(owner: OwnerRecord | None) -> str:
    """A holder in words."""
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"


def free(folder: Path, dead: OwnerRecord) -> None:
    """Free all leases in a folder that one process has of which you know that it is dead."""
    for path in folder.glob("*.lease"):
        held = of(path)
        if (owner := held.owner) and (owner.pid, owner.hostname, owner.start) == (dead.pid, dead.hostname, dead.start):
            held.force_break()


def _end_this_process(lost: LeaseCompromise) -> None:
    """Another process may write the same files by now."""
    what = "was taken by another process, because this one had been paused or cut off, or was deleted"
    print(f"error: {lost.lock_file}: {what}; run the same command again", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
