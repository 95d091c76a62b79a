"""The demo's corpus: arithmetic word problems with worked steps, the same bytes for the same seed.

Every problem has two steps on whole numbers; its answer is written out step by step and ends in "#### result".
"""

from __future__ import annotations

import random

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo"]
NAMES += ["Iris", "Jack", "Kira", "Leo", "Mona", "Nils", "Olga", "Paul"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "marbles"]
THINGS += ["pencils", "shells", "stamps", "stones", "tickets", "toys"]
PLACES = ["box", "drawer", "basket", "bag", "jar"]


def problems(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` distinct (problem, worked answer) pairs."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        problem, answer = _problem(generator)
        found.setdefault(problem, answer)
    return list(found.items())


def _problem(generator: random.Random) -> tuple[str, str]:
    name, other = generator.sample(NAMES, 2)
    thing, place = generator.choice(THINGS), generator.choice(PLACES)
    have, more = generator.randint(3, 19), generator.randint(3, 19)
    total = have + more
    less = generator.randint(2, min(total - 1, 19))
    few, each = generator.randint(3, 12), generator.randint(2, 6)
    match generator.randrange(5):
        case 0:
            return (
                f"{name} has {have} {thing}. {name} buys {more} more and then gives {less} to {other}. "
                f"How many {thing} does {name} have now?",
                _steps((have, "+", more), (total, "-", less)),
            )
        case 1:
            return (
                f"A {place} holds {have} {thing}. {name} puts in {more} and {other} puts in {less}. "
                f"How many {thing} are in the {place}?",
                _steps((have, "+", more), (total, "+", less)),
            )
        case 2:
            return (
                f"{name} has {few} {thing} in each of {each} rows and finds {more} more. "
                f"How many {thing} does {name} have?",
                _steps((few, "*", each), (few * each, "+", more)),
            )
        case 3:
            return (
                f"{other} keeps {each} times as many {thing} as {name}, who keeps {few}. "
                f"How many {thing} do they keep together?",
                _steps((few, "*", each), (few * each, "+", few)),
            )
        case _:
            high, low = max(have, more), min(have, more)
            return (
                f"{name} collects {high} {thing} and loses {low} of them. {other} brings {less}. "
                f"How many {thing} are there?",
                _steps((high, "-", low), (high - low, "+", less)),
            )


def _steps(*steps: tuple[int, str, int]) -> str:
    lines = []
    for left, sign, right in steps:
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        lines.append(f"{left}{sign}{right}={result}")
    return "\n".join([*lines, f"#### {result}"])
