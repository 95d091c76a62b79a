"""What every objective takes and returns.

Symbols, for a batch of T triplets (x, y, g) and K main players:

    log pi_theta(y|x)    policy_chosen     [T]     lambda   scale of the implicit reward
    log pi_theta(g|x)    policy_rejected   [T]     eta      target weight while the target reward is not positive
    log pi_theta(g0|x)   policy_initial    [T]     alpha    target weight (TRW), eta or 1
    log pi_j(y|x)        players_chosen    [T, K]  beta     player weight (MPW), rows sum to 1
    log pi_j(g|x)        players_rejected  [T, K]  g0       checkpoint 0's answer

All log-probabilities are in nats and summed over the tokens of the response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class LogProbs(NamedTuple):
    """A batch of triplets; only what starts with ``policy`` has a gradient."""

    policy_chosen: Tensor  # [T]
    policy_rejected: Tensor  # [T]
    policy_initial: Tensor  # [T] read by T-SPIN alone
    players_chosen: Tensor  # [T, K]
    players_rejected: Tensor  # [T, K]
    beta: Tensor  # [T, K]
    chosen_tokens: Tensor  # [T] |y|
    rejected_tokens: Tensor  # [T] |g|


class Settings(NamedTuple):
    """The numbers of an objective; each reads those that it has."""

    scale: float  # lambda > 0
    eta: float = 1.0  # >= 1; 1 switches target weighting off
    history: float = 0.0  # T-SPIN's weight of its second term
    mean_tokens: float | None = None  # lambda by length: the mean of |y| over all rows


class Losses(NamedTuple):
    """Per-triplet results; everything but ``loss`` is detached from the graph."""

    loss: Tensor  # [T]
    reward_chosen: Tensor  # [T, K]  P_j(x, y)
    reward_rejected: Tensor  # [T, K]  P_j(x, g)
    target_active: Tensor  # [T, K]  True where alpha = eta


Objective = Callable[[LogProbs, Settings], Losses]


def implicit_reward(policy: Tensor, players: Tensor, scale: float) -> Tensor:
    """P_j = lambda * (log pi_theta - log pi_j), for ``policy`` [T] and ``players`` [T, K]; returns [T, K]."""
    return scale * (policy.unsqueeze(-1) - players)


def with_rewards(loss: Tensor, reward_chosen: Tensor, reward_rejected: Tensor) -> Losses:
    reward_chosen = reward_chosen.detach()
    return Losses(loss, reward_chosen, reward_rejected.detach(), reward_chosen <= 0)
