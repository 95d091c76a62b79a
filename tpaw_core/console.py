"""Log messages as plain lines: printed by a command, or written to a file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Libraries that would otherwise print bars, warnings and addresses among a command's own lines, or report its use.
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_package = logging.getLogger(__package__)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr if record.name.endswith(".progress") else sys.stdout, flush=True)


def quieten_libraries() -> None:
    """For this process and those that it starts; what the user has set stays."""
    for name, value in {**QUIET, **({} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"})}.items():
        os.environ.setdefault(name, value)


def show() -> None:
    """Print messages from now on; progress goes to stderr."""
    _use(_Console())


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append messages to a file while this holds."""
    before, handler = _package.handlers, logging.FileHandler(path)
    _use(handler)
    try:
        yield
    finally:
        handler.close()
        _package.handlers = before


def _use(handler: logging.Handler) -> None:
    handler.setFormatter(_Lines())
    _package.handlers, _package.propagate = [handler], False
    _package.setLevel(logging.INFO)
