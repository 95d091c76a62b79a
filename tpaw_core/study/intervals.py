"""Means over seeds with their 95% intervals, and paired differences; numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """A mean and its two-sided 95% interval by Student's t; low and high are nan where there is one value only."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def above(self) -> bool:
        """The whole interval lies above zero."""
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0


def mean(values: Sequence[float]) -> Interval:
    """The mean of independent values, one a seed. Raises ValueError where there are none."""
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    middle = math.fsum(values) / n
    if n == 1:
        return Interval(middle, math.nan, math.nan, 1)
    spread = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * spread
    return Interval(middle, middle - half, middle + half, n)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Interval:
    """The mean of the differences by seed, over the seeds that both have. Raises ValueError where none is shared."""
    return mean([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
