from __future__ import annotations

import re

import pytest

from tpaw_core.data import arithmetic

ROWS = arithmetic.problems(5000, seed=42)


def test_problems_are_distinct() -> None:
    assert len({problem for problem, _ in ROWS}) == 5000


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert arithmetic.problems(200, seed=42) == ROWS[:200]
    others = arithmetic.problems(200, seed=43)
    assert len({problem for problem, _ in others} & {problem for problem, _ in ROWS[:200]}) < 10


def test_every_answer_is_arithmetically_right() -> None:
    for _, answer in ROWS:
        *steps, last = answer.split("\n")
        assert len(steps) == 2
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign] == int(
                result
            )
        assert last == f"#### {result}"
        assert step.startswith(steps[0].split("=")[1]), "the second step goes on from the first"


@pytest.mark.parametrize(
    ("pattern", "solve"),
    [
        (r"has (\d+) \w+\. \w+ buys (\d+) more and then gives (\d+)", lambda a, b, c: a + b - c),
        (r"holds (\d+) \w+\. \w+ puts in (\d+) and \w+ puts in (\d+)", lambda a, b, c: a + b + c),
        (r"has (\d+) \w+ in each of (\d+) rows and finds (\d+) more", lambda a, b, c: a * b + c),
        (r"keeps (\d+) times as many \w+ as \w+, who keeps (\d+)", lambda a, b: a * b + b),
        (r"collects (\d+) \w+ and loses (\d+) of them\. \w+ brings (\d+)", lambda a, b, c: a - b + c),
    ],
)
def test_answers_follow_from_the_words_of_the_problem(pattern: str, solve: object) -> None:
    matches = [(re.search(pattern, problem), answer) for problem, answer in ROWS]
    matches = [(match, answer) for match, answer in matches if match]
    assert len(matches) > 100
    for match, answer in matches:
        result = solve(*map(int, match.groups()))
        assert result >= 0
        assert answer.endswith(f"#### {result}")
