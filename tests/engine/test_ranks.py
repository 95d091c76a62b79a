from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpaw_core.engine import ranks
from tpaw_core.engine.packing import split

SIZES = st.lists(st.integers(1, 50), max_size=40)


@given(SIZES, st.integers(1, 80), st.integers(2, 9))
def test_every_place_is_in_one_part_and_all_ranks_have_equally_many(sizes: list[int], most: int, world: int) -> None:
    shares = ranks.spread(sizes, most, world)
    assert len(shares) == world
    assert len({len(share) for share in shares}) == 1
    assert sorted(place for share in shares for part in share for place in part) == list(range(len(sizes)))
    for share in shares:
        for part in share:
            assert len(part) <= 1 or sum(sizes[place] for place in part) <= most


@given(SIZES, st.integers(1, 80))
def test_one_process_keeps_the_order(sizes: list[int], most: int) -> None:
    assert ranks.spread(sizes, most, 1) == [split(sizes, most)]


@given(SIZES, st.integers(2, 9))
def test_no_rank_has_more_than_a_fair_share_and_one_place(sizes: list[int], world: int) -> None:
    loads = [sum(sizes[place] for part in share for place in part) for share in ranks.spread(sizes, 10**6, world)]
    assert max(loads) <= sum(sizes) / world + max(sizes, default=0)


def test_one_process_is_the_whole_world() -> None:
    assert (ranks.world(), ranks.rank(), ranks.gather("own")) == (1, 0, ["own"])
