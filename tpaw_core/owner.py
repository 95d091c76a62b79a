"""Who started this process: when they are gone, it ends, so that a killed flow leaves no second writer behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

from tpaw_core.errors import TpawError


def die_with_it() -> None:
    """End this process when its parent, or the flow that TPAW_OWNER names, is gone.

    Raises TpawError where the flow is gone already.
    """
    owners = [psutil.Process(os.getppid())] if os.getppid() > 1 else []
    if flow := os.environ.get("TPAW_OWNER"):
        if not psutil.pid_exists(int(flow)):
            raise TpawError(f"the flow (process {flow}) that started this stage is gone")
        owners.append(psutil.Process(int(flow)))

    def watch() -> None:
        while True:
            time.sleep(0.5)
            for owner in owners:
                if not owner.is_running() or owner.status() == psutil.STATUS_ZOMBIE:
                    os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
