from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpaw_core.method.player_weights import player_weights

LOGPS = st.floats(-500, 0)


def beta(log_ratios: list[float], gamma: float = 0.5, scale: float = 0.1) -> np.ndarray:
    """The weights of one triplet whose players have the given log pi_j(y|x) - log pi_j(g|x)."""
    return player_weights(np.array([log_ratios]), np.zeros((1, len(log_ratios))), gamma=gamma, scale=scale)[0]


@pytest.mark.parametrize(
    ("log_ratios", "expected"),
    [
        ([-7.0], [1.0]),
        # logits 0.5 * 0.1 * d = 0.1, -0.2; beta_0 = 1 / (1 + e^-0.3) = 1 / 1.740818
        ([2.0, -4.0], [0.574443, 0.425557]),
        # logits 0, 1, -1: e^l = 1, 2.718282, 0.367879, their sum 4.086161
        ([0.0, 20.0, -20.0], [0.244728, 0.665241, 0.090031]),
    ],
)
def test_weights_of_one_two_and_three_players_are_those_worked_by_hand(
    log_ratios: list[float], expected: list[float]
) -> None:
    assert beta(log_ratios) == pytest.approx(expected, abs=1e-6)


@given(
    players=st.lists(st.tuples(LOGPS, LOGPS), min_size=1, max_size=5),
    policy=st.tuples(LOGPS, LOGPS),
    gamma=st.floats(0, 3),
    scale=st.floats(0.01, 5),
)
def test_weights_are_the_papers_for_any_policy(
    players: list[tuple[float, float]], policy: tuple[float, float], gamma: float, scale: float
) -> None:
    """beta_j = exp(-gamma m_j) / sum, with m_j = P_j(x, y) - P_j(x, g), whatever theta is."""
    chosen, rejected = np.array(players).T
    margins = scale * (policy[0] - chosen) - scale * (policy[1] - rejected)
    logits = -gamma * (margins - margins.min())
    expected = np.exp(logits) / np.exp(logits).sum()
    found = player_weights(chosen[None], rejected[None], gamma=gamma, scale=scale)[0]
    assert found == pytest.approx(expected, abs=1e-9)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_the_player_that_prefers_the_target_most_weighs_most() -> None:
    assert np.argmax(beta([1.0, 5.0, -3.0])) == 1


def test_gamma_zero_weighs_all_players_alike() -> None:
    assert beta([3.0, -900.0, 41.0], gamma=0.0).tolist() == [1 / 3] * 3


def test_each_triplet_has_its_own_weights() -> None:
    chosen = np.array([[0.0, 0.0], [-40.0, 0.0]])
    found = player_weights(chosen, np.zeros((2, 2)), gamma=0.5, scale=0.1)
    assert found[0] == pytest.approx([0.5, 0.5])
    assert found[1] == pytest.approx([1 / (1 + np.e**2), 1 / (1 + np.e**-2)])


@pytest.mark.parametrize("log_ratios", [[1e6, -1e6], [-1e6, -1e6], [1e300, 0.0]])
def test_extreme_log_probabilities_give_finite_weights(log_ratios: list[float]) -> None:
    found = beta(log_ratios, gamma=3.0, scale=5.0)
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_log_probability_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    chosen = np.zeros((3, 2))
    chosen[2, 1] = bad
    with pytest.raises(ValueError, match=r"not finite in rows \[2\]"):
        player_weights(chosen, np.zeros((3, 2)), gamma=0.5, scale=0.1)
