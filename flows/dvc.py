"""Running one stage through DVC, as a process group that ends with the flow; its output goes to the flow run's log."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from tpaw_core.processes import fork_server
from tpaw_core.workspace.paths import Workspace

HINTS = ("To track the changes", "To enable auto staging", "Use `dvc push`", "\tgit add", "\tdvc config")
LOCK = Path("dvc.lock")
WORKSPACE = Workspace()  # a flow run starts in its folder
UNREADABLE = re.compile(r"dvc\.lock' (is invalid|validation failed)|unable to read: '[^']*dvc\.lock'")
LINE = 250  # characters of a line in a failure's message
TEMPORARY = {75, 137, 143}  # exit statuses where a retry can help: a service did not answer, or a signal came


class StageFailed(RuntimeError):
    """A stage ended with a message of its own; ``temporary`` where a retry can help."""

    def __init__(self, message: str, *, temporary: bool) -> None:
        super().__init__(message)
        self.temporary = temporary


class LockDamaged(StageFailed):
    """DVC cannot read dvc.lock."""


def can_help(task: Any, run: Any, state: Any) -> bool:
    """Retry if the failure may be temporary, not if the stage rejected its input."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, StageFailed) or error.temporary


RETRY: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [5, 30], "retry_condition_fn": can_help}


def repro(stage: str, iteration: int = 0, *, force: bool = False) -> bool:
    """Bring one stage up to date; True where it had to run, False where there was nothing to do.

    ``force``: run it in any case. A pruned checkpoint is not made again for a stage that has nothing else to do.
    """
    pruned = any(WORKSPACE.pruned(t).exists() for t in (iteration - 1, iteration))
    options = [*(["--allow-missing"] if pruned else []), *(["--force"] if force else [])]
    lines = _dvc("repro", "--single-item", *options, stage)
    return any(line.startswith("Running stage") for line in lines)


def add(path: Path) -> None:
    """Let DVC remember a folder's bytes."""
    _dvc("add", str(path))


def _dvc(*arguments: str) -> list[str]:
    """Run dvc; a dvc.lock that it cannot read is set aside first."""
    try:
        return run("dvc", *arguments)
    except LockDamaged:
        aside = LOCK.rename(f"{LOCK}.damaged")
        get_run_logger().warning("%s: is damaged; moved to %s, and all stages will be rechecked", LOCK, aside)
        return run("dvc", *arguments)


@contextmanager
def preloaded() -> Iterator[None]:
    """While this holds, commands are forked from a process that has done the imports; it ends with this one."""
    with tempfile.TemporaryDirectory(prefix="tpaw-") as folder:
        address = f"{folder}/socket"
        command = [sys.executable, "-m", "tpaw_core", "preload", address]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        while not Path(address).exists() and process.poll() is None:
            time.sleep(0.05)
        os.environ[fork_server.ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[fork_server.ADDRESS]
            process.communicate()


def run(program: str, *arguments: str) -> list[str]:
    """Run dvc or tpaw in its own session, log its lines, and kill the whole group whatever ends the wait.

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
    command = [sys.executable, "-m", "tpaw_core.processes.fork_server", program, *arguments]
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
                logger.log(logging.WARNING if line.startswith("warning: ") else logging.INFO, line)
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise _failure(lines or [" ".join((program, *arguments))], code)
    return lines


def _failure(lines: list[str], code: int) -> StageFailed:
    status = next((int(m.group(1)) for line in reversed(lines) if (m := re.search(r"exited with (-?\d+)", line))), code)
    if any(UNREADABLE.search(line) for line in lines):
        return LockDamaged("\n".join(lines), temporary=False)
    start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    own = [line for line in lines[start:] if not line.startswith("ERROR: ")] if start is not None else lines[-5:]
    # Prefect writes this four times, and the log has it already.
    short = [line if len(line) <= LINE else f"{line[:LINE]} ..." for line in own]
    return StageFailed("\n".join(short), temporary=status < 0 or status in TEMPORARY)
