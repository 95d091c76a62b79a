"""torchrun on this machine, quietly: ends with the stage that started it, and leaves error messages to the ranks."""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tpaw_core.processes import parent

if __name__ == "__main__":
    parent.exit_with_parent()
    logging.disable()
    try:
        run.main(["--standalone", *sys.argv[1:]])
    except (ChildFailedError, SignalException):
        sys.exit(1)
