"""Ends this process when the one that started it exits, so that a killed flow leaves no second writer."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

from tpaw_core.errors import TpawError


def exit_with_parent() -> None:
    """Watch the parent, and the flow that TPAW_OWNER names, and exit as soon as one of them is gone.

    Raises TpawError where the flow is gone already.
    """
    watched = [psutil.Process(os.getppid())] if os.getppid() > 1 else []
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
