"""Running one stage through DVC: as a process group that ends with the flow, its lines in the flow run's log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

HINTS = ("To track the changes", "To enable auto staging", "Use `dvc push`", "\tgit add", "\tdvc config")
TEMPORARY = {75, 137, 143}  # exit statuses where trying again can help: a service did not answer, a signal came


class StageFailed(RuntimeError):
    """A stage ended with a message of its own; ``temporary`` where trying again can help."""

    def __init__(self, message: str, *, temporary: bool) -> None:
        super().__init__(message)
        self.temporary = temporary


def repro(stage: str) -> bool:
    """Bring one stage up to date; True where it had to run, False where there was nothing to do."""
    lines = run([sys.executable, "-m", "dvc", "repro", "--single-item", stage])
    return any(line.startswith("Running stage") for line in lines)


def run(command: list[str]) -> list[str]:
    """Run a command in its own session, log its lines, and kill the whole group whatever ends the wait.

    Raises StageFailed with the command's own error message.
    """
    logger = get_run_logger()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        "TPAW_OWNER": str(os.getpid()),
        "TPAW_SESSION": str(flow_run.id or ""),
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in map(str.rstrip, process.stdout):
            if line and not line.startswith(HINTS):
                lines.append(line)
                logger.info(line)
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise _failure(command, lines, code)
    return lines


def _failure(command: list[str], lines: list[str], code: int) -> StageFailed:
    status = next((int(m.group(1)) for line in reversed(lines) if (m := re.search(r"exited with (-?\d+)", line))), code)
    start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    own = [line for line in lines[start:] if not line.startswith("ERROR: ")] if start is not None else lines[-5:]
    return StageFailed("\n".join(own) or " ".join(command), temporary=status < 0 or status in TEMPORARY)
