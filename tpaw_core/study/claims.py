"""The paper's claims C1-C6 put to the results of a study: what holds, what does not, what is inconclusive.

A statement holds where the whole 95% interval over seeds is on its side of zero, does not hold where the whole interval
is on the other side, and is inconclusive otherwise. A claim of several statements holds where all hold, and does not
hold where one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from tpaw_core.study import intervals
from tpaw_core.study.intervals import Interval
from tpaw_core.study.results import by_seed

if TYPE_CHECKING:
    import pandas as pd


Sides = tuple[dict[int, float], dict[int, float]]  # by seed


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "inconclusive"


class Statement(NamedTuple):
    """Something that should be above zero."""

    text: str
    interval: Interval
    scale: float = 100.0  # accuracies are shown in points

    @property
    def verdict(self) -> Verdict:
        if self.interval.above:
            return Verdict.HOLDS
        return Verdict.FAILS if self.interval.below else Verdict.OPEN


class Claim(NamedTuple):
    name: str
    text: str
    statements: list[Statement]
    missing: list[str]  # methods that the study lacks

    @property
    def verdict(self) -> Verdict:
        verdicts = {statement.verdict for statement in self.statements}
        if Verdict.FAILS in verdicts:
            return Verdict.FAILS
        return Verdict.HOLDS if verdicts == {Verdict.HOLDS} and not self.missing else Verdict.OPEN


PARTS = {
    "tpaw-no-target-weights": "target weighting",
    "tpaw-no-player-weights": "player weighting",
    "tpaw-team-1": "the team",
}


def judge(grid: pd.DataFrame) -> list[Claim]:
    """The claims from a study's grid, each method at its chosen rate."""
    grid = grid[grid["chosen"]]
    last = int(grid["iteration"].max())

    def at(method: str, iteration: int = last, column: str = "accuracy") -> dict[int, float]:
        return by_seed(grid, method, iteration, column)

    def claim(name: str, text: str, needed: Sequence[str], made: dict[str, Sides]) -> Claim:
        known = set(grid["method"])
        statements = [
            Statement(what, intervals.difference(ours, theirs))
            for what, (ours, theirs) in made.items()
            if ours.keys() & theirs.keys()
        ]
        return Claim(name, text, statements, [method for method in needed if method not in known])

    def minus(ours: str, theirs: str) -> dict[str, Sides]:
        return {f"{ours} - {theirs}, iteration {last}": (at(ours), at(theirs))}

    def gain(method: str, first: int) -> dict[str, Sides]:
        return {f"{method}: iteration {last} - {first}": (at(method), at(method, first))}

    early = min(2, max(last - 1, 0))
    decline = {f"spin: iteration {early} - {last}": (at("spin", early), at("spin"))}
    rewards = []
    for method, sign in (("tpaw-no-target-weights", -1), ("tpaw", 1)):
        if values := list(at(method, column="target_reward").values()):
            text = f"{'-' if sign < 0 else ''}target reward of {method}, end of iteration {last}"
            rewards.append(Statement(text, intervals.mean([sign * value for value in values]), 1.0))
    parts: dict[str, Sides] = {f"tpaw - {method} ({part})": (at("tpaw"), at(method)) for method, part in PARTS.items()}
    for method in list(PARTS)[:2]:
        parts[f"{method} - tpaw-team-1 (the team matters more)"] = at(method), at("tpaw-team-1")
    return [
        claim(
            "C1", "TPAW ends above SPIN, and both above SFT", ["tpaw", "spin"],
            minus("tpaw", "spin") | gain("tpaw", 0) | gain("spin", 0),
        ),
        claim(
            "C2", "SPIN plateaus or declines after the first iterations; TPAW does not", ["tpaw", "spin"],
            decline | gain("tpaw", early),
        ),
        Claim(
            "C3", "Without target weighting the target reward stays negative; with it, it ends positive", rewards,
            [name for name in ("tpaw", "tpaw-no-target-weights") if name not in set(grid["method"])],
        ),
        claim("C4", "Each part, when removed, lowers the result; the team most", ["tpaw", *PARTS], parts),
        claim("C5", "More epochs of SFT on the same rows do not reach it", ["tpaw", "sft"], minus("tpaw", "sft")),
        claim(
            "C6", "A team of three beats one player and larger teams", ["tpaw", "tpaw-team-1", "tpaw-team-4"],
            minus("tpaw", "tpaw-team-1") | minus("tpaw", "tpaw-team-4"),
        ),
    ]  # fmt: skip
