"""Log messages as plain lines: printed by a command, or written to a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_package = logging.getLogger(__package__)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr if record.name.endswith(".progress") else sys.stdout, flush=True)


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
