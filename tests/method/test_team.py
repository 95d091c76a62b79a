from __future__ import annotations

from typing import Any

import pytest

from tpaw_core.method.team import Candidate, assemble

DIGESTS = [f"{number:08x}" + 56 * "ab"[number % 2] for number in range(0xA0, 0xA6)]


def candidates(count: int, vetoed: tuple[int, ...] = ()) -> list[Candidate]:
    """Checkpoints 0 .. count - 1, in no useful order."""
    made = [Candidate(t, version=10 - t, digest=DIGESTS[t], vetoed=t in vetoed) for t in range(count)]
    return made[1::2] + made[::2]


def team(count: int, vetoed: tuple[int, ...] = (), **options: Any) -> list[int]:
    return [c.iteration for c in assemble(candidates(count, vetoed), **{"iteration": count, "size": 3, **options})]


@pytest.mark.parametrize(
    ("iteration", "expected"), [(1, [0]), (2, [1, 0]), (3, [2, 1, 0]), (4, [3, 2, 1]), (5, [4, 3, 2])]
)
def test_the_latest_checkpoints_play_newest_first(iteration: int, expected: list[int]) -> None:
    assert team(iteration) == expected


@pytest.mark.parametrize(("size", "expected"), [(1, [4]), (2, [4, 3]), (5, [4, 3, 2, 1, 0]), (9, [4, 3, 2, 1, 0])])
def test_size_is_the_most_that_play(size: int, expected: list[int]) -> None:
    assert team(5, size=size) == expected


def test_checkpoints_of_later_iterations_do_not_play() -> None:
    assert team(5, iteration=2) == [1, 0]


@pytest.mark.parametrize(
    ("vetoed", "exclude", "expected"),
    [
        ((4,), (), [3, 2, 1]),
        ((3, 4), (), [2, 1, 0]),
        ((), (3,), [4, 2, 1]),
        ((), (DIGESTS[3],), [4, 2, 1]),
        ((), (DIGESTS[3][:8],), [4, 2, 1]),
        ((), (DIGESTS[3][:12], 4), [2, 1, 0]),
        ((2,), (4, 3), [1, 0]),
        ((), ("f" * 64, 17), [4, 3, 2]),
    ],
)
def test_a_vetoed_or_excluded_checkpoint_is_replaced_by_an_older_one(
    vetoed: tuple[int, ...], exclude: tuple[int | str, ...], expected: list[int]
) -> None:
    assert team(5, vetoed, exclude=exclude) == expected


@pytest.mark.parametrize("prefix", ["", "0", DIGESTS[3][:7]])
def test_a_digest_prefix_shorter_than_eight_characters_excludes_nobody(prefix: str) -> None:
    assert team(5, exclude=(prefix,)) == [4, 3, 2]


@pytest.mark.parametrize(
    ("count", "vetoed", "exclude"), [(0, (), ()), (2, (0, 1), ()), (2, (0,), (1,)), (2, (), (0, DIGESTS[1]))]
)
def test_a_team_of_nobody_is_refused(count: int, vetoed: tuple[int, ...], exclude: tuple[int | str, ...]) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint before iteration {count} is eligible"):
        team(count, vetoed, exclude=exclude)


def test_two_candidates_of_one_iteration_are_refused() -> None:
    twice = [Candidate(0, 1, DIGESTS[0]), Candidate(0, 2, DIGESTS[1])]
    with pytest.raises(ValueError, match="two candidates share an iteration"):
        assemble(twice, iteration=1, size=3)


def test_a_vetoed_namesake_does_not_stop_the_one_in_use() -> None:
    twice = [Candidate(0, 1, DIGESTS[0], vetoed=True), Candidate(0, 2, DIGESTS[1])]
    assert [c.version for c in assemble(twice, iteration=1, size=3)] == [2]
