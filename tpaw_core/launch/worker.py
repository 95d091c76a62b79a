"""One rank: torchrun starts `python -m tpaw_core.launch.worker FOLDER`, and the stage's request is in that folder."""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tpaw_core import console
from tpaw_core.engine import ranks
from tpaw_core.errors import TpawError
from tpaw_core.launch.launcher import ALIVE, BEAT, DONE, FAILED, GONE, REQUEST, Request
from tpaw_core.processes import parent
from tpaw_core.workspace import files

PEER = ("gloo", "nccl", "connection", "socket", "timed out")  # words of an error that another rank's end causes


def main(folder: Path) -> None:
    """Do the work. Raises what it raises, once that is written down for the stage."""
    console.quieten_libraries()  # before the request names any
    request: Request = pickle.loads((folder / REQUEST).read_bytes())
    here = request.host == socket.gethostname()
    if not here:
        os.environ.pop("TPAW_OWNER", None)  # a process of the stage's host
    parent.exit_with_parent(request.stage if here else None)
    if (folder / ALIVE).exists():
        threading.Thread(target=_exit_with_stage, args=(folder / ALIVE,), daemon=True).start()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=request.timeout))
    try:
        if ranks.rank() == 0:
            console.show()
        request.work(folder)
        (folder / DONE.format(rank=ranks.rank())).touch()
        ranks.barrier()
    except BaseException as error:  # torch.distributed.checkpoint's is no Exception
        _write(folder, error)
        raise
    dist.destroy_process_group()


def _exit_with_stage(alive: Path) -> None:
    """On any host: end when the stage has not touched its file for too long."""
    seen, since = 0.0, time.monotonic()
    while time.monotonic() - since < GONE:
        time.sleep(BEAT)
        with suppress(OSError):
            if (touched := alive.stat().st_mtime) != seen:
                seen, since = touched, time.monotonic()
    os._exit(1)


def _write(folder: Path, error: BaseException) -> None:
    number = ranks.rank()
    kind, message = type(error).__name__, str(error)
    if not isinstance(error, TpawError) and (told := files.explanation(error, folder.parent)) is not None:
        kind, message = TpawError.__name__, told
    elif not isinstance(error, TpawError):
        lost = isinstance(error, dist.DistError) or any(word in message.lower() for word in PEER)
        kind, message = ("lost" if lost else "other"), traceback.format_exc()
    found = {"rank": number, "kind": kind, "message": message}
    (folder / FAILED.format(rank=number)).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        os._exit(1)  # without the traceback that the stage prints, and without waiting for other ranks
