"""Ends this process when the one that started it exits, so that a killed flow leaves no second writer."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

from tpaw_core.errors import TpawError


def exit_with_parent(stage: int | None = None) -> None:
    """Watch the parent, the process ``stage``, and the flow that TPAW_OWNER names; exit as soon as one of them is gone.

    Raises TpawError where the stage or the flow is gone already.
    """
    watched = [psutil.Process(os.getppid())] if os.getppid() > 1 else []
    if stage is not None:
        if not psutil.pid_exists(stage):
            raise TpawError(f"the stage (process {stage}) that started this one has ended")
        watched.append(psutil.Process(stage))
    if flow := os.environ.get("TPAW_OWNER"):
        if not psutil.pid_exists(int(flow)):
            raise TpawError(f"the flow (process {flow}) that started this stage has ended")
        watched.append(psutil.Process(int(flow)))

    def watch() -> None:
        while True:
            time.sleep(0.5)
            for process in watched:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
