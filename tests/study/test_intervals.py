from __future__ import annotations

import math

import pytest
from scipy import stats

from tpaw_core.study import intervals

OURS = {1: 0.91, 2: 0.87, 3: 0.93, 4: 0.90, 5: 0.88}
THEIRS = {1: 0.89, 2: 0.88, 3: 0.90, 4: 0.86, 5: 0.85}


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653: half of the width is 4.302653 / sqrt(3)."""
    found = intervals.mean([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert found.n == 3


def test_a_mean_is_scipys_one_sample_interval() -> None:
    expected = stats.ttest_1samp([*OURS.values()], 0).confidence_interval(0.95)
    found = intervals.mean([*OURS.values()])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_a_difference_is_scipys_paired_interval() -> None:
    expected = stats.ttest_rel([*OURS.values()], [*THEIRS.values()]).confidence_interval(0.95)
    found = intervals.difference(OURS, dict(reversed(THEIRS.items())))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.above == (stats.ttest_rel([*OURS.values()], [*THEIRS.values()]).pvalue < 0.05)


def test_a_difference_takes_the_seeds_that_both_have() -> None:
    found = intervals.difference(OURS, {1: 0.89, 2: 0.88, 9: 0.1})
    assert found.n == 2
    assert found.mean == pytest.approx((0.02 - 0.01) / 2)


def test_one_value_has_no_interval() -> None:
    found = intervals.mean([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.above
    assert not found.below


@pytest.mark.parametrize("make", [lambda: intervals.mean([]), lambda: intervals.difference({1: 0.5}, {2: 0.5})])
def test_nothing_has_no_mean(make: object) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        make()  # type: ignore[operator]
