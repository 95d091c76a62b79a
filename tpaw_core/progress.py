"""Progress of long work: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10


class Progress:
    """Counts done units of ``total``; says so on stderr."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self._bar = tqdm(total=total, desc=what) if sys.stderr.isatty() else None
        self._start = self._said = time.monotonic()

    def advance(self, units: int = 1) -> None:
        self.done += units
        if self._bar is not None:
            self._bar.update(units)
        elif (now := time.monotonic()) - self._said >= SECONDS_BETWEEN_LINES or self.done >= self.total:
            self._said = now
            left = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            share = 100 * self.done // max(self.total, 1)
            print(f"{self.what}: {self.done}/{self.total} ({share}%), {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def progress(items: Sequence[Item], what: str, size: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
    """Iterate and report; ``size`` gives the units an item counts for."""
    report = Progress(sum(map(size, items)), what)
    for item in items:
        yield item
        report.advance(size(item))
    report.close()
