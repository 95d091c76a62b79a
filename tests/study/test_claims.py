from __future__ import annotations

import pandas as pd
import pytest

from tpaw_core.study import claims
from tpaw_core.study.claims import Verdict

SEEDS = (1, 2, 3, 4, 5)
NOISE = {1: 0.001, 2: -0.001, 3: 0.0, 4: 0.0015, 5: -0.0015}  # of a seed, shared by all methods


def frame(ends: dict[str, list[float]], rewards: dict[str, float] | None = None, own: float = 0.0) -> pd.DataFrame:
    """Accuracy by iteration of each method; ``own``: noise of a method and seed that others do not share."""
    rows = []
    for number, (method, accuracies) in enumerate(ends.items()):
        for seed in SEEDS:
            for iteration, accuracy in enumerate(accuracies):
                noise = NOISE[seed] + own * ((7 * seed + 3 * number) % 5 - 2)
                reward = (rewards or {}).get(method) if iteration else None
                rows.append(
                    {
                        "method": method,
                        "seed": seed,
                        "iteration": iteration,
                        "accuracy": accuracy + noise,
                        "target_reward": None if reward is None else reward + noise / 10,
                        "chosen": True,
                    }
                )
    return pd.DataFrame(rows)


def verdicts(results: pd.DataFrame) -> dict[str, Verdict]:
    return {claim.name: claim.verdict for claim in claims.judge(results)}


AS_CLAIMED = {
    "tpaw": [0.5, 0.6, 0.65, 0.7],
    "spin": [0.5, 0.58, 0.57, 0.55],
    "sft": [0.5, 0.52, 0.53, 0.53],
    "tpaw-no-target-weights": [0.5, 0.56, 0.6, 0.62],
    "tpaw-no-player-weights": [0.5, 0.59, 0.63, 0.66],
    "tpaw-team-1": [0.5, 0.55, 0.58, 0.6],
    "tpaw-team-4": [0.5, 0.6, 0.64, 0.68],
}


def test_all_claims_hold_where_the_figures_are_the_papers() -> None:
    found = verdicts(frame(AS_CLAIMED, {"tpaw": 0.02, "tpaw-no-target-weights": -0.1}))
    assert set(found.values()) == {Verdict.HOLDS}
    assert list(found) == ["C1", "C2", "C3", "C4", "C5", "C6"]


@pytest.mark.parametrize(
    ("claim", "method", "accuracies"),
    [
        ("C1", "spin", [0.5, 0.58, 0.7, 0.8]),
        ("C1", "tpaw", [0.5, 0.4, 0.4, 0.4]),
        ("C2", "spin", [0.5, 0.52, 0.55, 0.6]),
        ("C2", "tpaw", [0.5, 0.8, 0.75, 0.7]),
        ("C4", "tpaw-no-player-weights", [0.5, 0.6, 0.7, 0.75]),
        ("C4", "tpaw-no-target-weights", [0.5, 0.55, 0.57, 0.58]),  # matters more than the team
        ("C5", "sft", [0.5, 0.6, 0.7, 0.8]),
        ("C6", "tpaw-team-4", [0.5, 0.6, 0.7, 0.75]),
    ],
)
def test_a_claim_does_not_hold_where_a_figure_is_on_the_other_side(
    claim: str, method: str, accuracies: list[float]
) -> None:
    assert verdicts(frame({**AS_CLAIMED, method: accuracies}))[claim] == Verdict.FAILS


@pytest.mark.parametrize(("with_it", "without"), [(-0.02, -0.1), (0.02, 0.1)])
def test_the_claim_on_rewards_reads_their_signs(with_it: float, without: float) -> None:
    rewards = {"tpaw": with_it, "tpaw-no-target-weights": without}
    assert verdicts(frame(AS_CLAIMED, rewards))["C3"] == Verdict.FAILS


def test_a_difference_within_its_interval_cannot_be_told() -> None:
    close = {**AS_CLAIMED, "sft": [0.5, 0.6, 0.65, 0.699]}
    assert verdicts(frame(close, own=0.01))["C5"] == Verdict.OPEN


def test_what_was_not_run_cannot_be_told_and_is_named() -> None:
    found = {
        claim.name: claim for claim in claims.judge(frame({"tpaw": AS_CLAIMED["tpaw"], "spin": AS_CLAIMED["spin"]}))
    }
    assert found["C1"].verdict == Verdict.HOLDS
    assert found["C5"].verdict == Verdict.OPEN
    assert found["C5"].missing == ["sft"]
    assert found["C6"].missing == ["tpaw-team-1", "tpaw-team-4"]


def test_rows_at_other_rates_do_not_count() -> None:
    other = frame({**AS_CLAIMED, "sft": [0.5, 0.9, 0.9, 0.9]})
    other["chosen"] = False
    assert verdicts(pd.concat([frame(AS_CLAIMED), other]))["C5"] == Verdict.HOLDS
