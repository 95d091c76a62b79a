"""Commands without the wait for imports: a process that has imported what stages need forks one for each command.

A command that finds such a process (TPAW_PRELOAD names its socket) hands over its arguments, environment and open
files, and ends as the forked one ends; where nobody listens it runs by itself. Without an accelerator only: a driver
does not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

ADDRESS = "TPAW_PRELOAD"
PACKAGES = {"dvc": "dvc", "tpaw": "tpaw_core"}  # by the name of the command
MODULES = (
    "dvc.cli.parser", "dvc.dependency", "dvc.fs", "dvc.repo.plots", "dvc.repo.reproduce", "dvc.scm", "networkx",
    "torch", "torch._dynamo", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "lm_eval.evaluator", "lm_eval.models.huggingface", "matplotlib.pyplot", "pyarrow.parquet",
    "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store",
    "tpaw_core.cli", "tpaw_core.engine.training.loop", "tpaw_core.evaluation.harness", "tpaw_core.stages.check",
    "tpaw_core.stages.train", "tpaw_core.tracking.registry",
)  # fmt: skip
STREAMS = (0, 1, 2)


def serve(address: str) -> None:
    """Import, then fork for each request, until the process that started this one closes stdin."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # requests wait here while modules are imported
    for name in MODULES:
        importlib.import_module(name)
    import torch
    from sqlalchemy.orm import configure_mappers

    if torch.accelerator.is_available():  # its driver does not survive a fork
        Path(address).unlink()
        return
    configure_mappers()  # MLflow's tables: else each command does it
    gc.freeze()  # a collection in a command would copy all of this process's memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the system
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection)
            os._exit(0)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Run the requested command in a session of its own; end it when the requester exits."""
    head, streams, _, _ = socket.recv_fds(connection, 8, len(STREAMS))
    if len(head) < 8:
        return
    (size,) = struct.unpack("q", head)
    request = json.loads(connection.recv(size, socket.MSG_WAITALL))
    job = os.fork()
    if job == 0:
        connection.close()
        os.setsid()
        for stream, own in zip(streams, STREAMS, strict=True):
            os.dup2(stream, own)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = request["arguments"]
        os._exit(_run(sys.argv[0]))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(job)
    select.select([connection.fileno(), ended], [], [])
    if not select.select([ended], [], [], 0)[0]:
        os.killpg(job, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    connection.sendall(struct.pack("q", status))


def _run(program: str) -> int:
    """`python -m PACKAGE` in this process, under sys.argv; its exit status."""
    try:
        runpy.run_module(PACKAGES[program], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def ask(program: str, arguments: Sequence[str]) -> int | None:
    """Let the listening process run a program; its exit status as a shell gives it, None where nobody listens."""
    address = os.environ.get(ADDRESS)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address or "")
    except OSError:
        return None
    environment = {name: value for name, value in os.environ.items() if program == "dvc" or name != ADDRESS}
    request = {"arguments": [program, *arguments], "folder": os.getcwd(), "environment": environment}
    body = json.dumps(request).encode()
    with connection:
        socket.send_fds(connection, [struct.pack("q", len(body))], list(STREAMS))
        connection.sendall(body)
        answer = connection.recv(8, socket.MSG_WAITALL)
    status = struct.unpack("q", answer)[0] if len(answer) == 8 else -signal.SIGKILL
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    if (ended := ask(name, words)) is not None:
        sys.exit(ended)
    os.execv(sys.executable, [sys.executable, "-m", PACKAGES[name], *words])
