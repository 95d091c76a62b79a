"""Does a service answer?"""

from __future__ import annotations

import http.client
import json
import urllib.request
from datetime import datetime

from tpaw_core.processes.daemon import Daemon

POOL = "tpaw"


def answers(name: str, daemon: Daemon) -> bool:
    url = daemon.url
    if name == "prefect":
        return ask(f"{url}/api/health") is not None
    if name == "mlflow":
        return ask(f"{url}/health") is not None
    return _worker_reports(url.removesuffix(f"/work-pools/work-pool/{POOL}"), daemon)


def _worker_reports(prefect_url: str, daemon: Daemon) -> bool:
    """Whether the server has heard from this worker; it may remember an earlier one of the same name."""
    answer = ask(f"{prefect_url}/api/work_pools/{POOL}/workers/filter", b"{}")
    for worker in json.loads(answer or "[]"):
        seen = worker["last_heartbeat_time"]
        if worker["name"] == POOL and worker["status"] == "ONLINE" and seen is not None:
            return datetime.fromisoformat(seen).timestamp() > daemon.create_time
    return False


def ask(url: str, body: bytes | None = None) -> str | None:
    """A server's answer; None where it gives none, or refuses."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            text: str = response.read().decode()
            return text
    except (OSError, ValueError, http.client.HTTPException):
        return None
