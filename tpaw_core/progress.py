"""Progress of long work: a bar with the time left on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10
logger = logging.getLogger(__name__)


class Progress:
    """Counts finished units of ``total`` and reports them."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        bar = sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ
        self._bar = tqdm(total=total, desc=what) if bar else None
        self._start = self._reported = time.monotonic()

    def advance(self, units: int = 1) -> None:
        self.done += units
        if self._bar is not None:
            self._bar.update(units)
        elif (now := time.monotonic()) - self._reported >= SECONDS_BETWEEN_LINES or self.done >= self.total:
            self._reported = now
            left = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            share = 100 * self.done // max(self.total, 1)
            logger.info("%s: %d/%d (%d%%), %.0f s left", self.what, self.done, self.total, share, left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def progress(items: Sequence[Item], what: str, size: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
    """Iterate and report; ``size`` gives the units that an item counts for."""
    report = Progress(sum(map(size, items)), what)
    for item in items:
        yield item
        report.advance(size(item))
    report.close()
