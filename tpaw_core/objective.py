"""The training objective: log-probabilities in, losses and rewards out.

Knows the equations of TPAW (Li et al., ACL 2026, arXiv 2605.09922) and nothing of models, files or services.

Symbols, for a batch of T triplets (x, y, g) and K main players:

    log pi_theta(y|x)   policy_chosen      [T]     lambda   scale of the implicit reward
    log pi_theta(g|x)   policy_rejected    [T]     eta      target weight while the target reward is not positive
    log pi_j(y|x)       players_chosen     [T, K]  alpha    target weight (TRW), eta or 1
    log pi_j(g|x)       players_rejected   [T, K]  beta     player weight (MPW), rows sum to 1

All log-probabilities are in nats and summed over the tokens of the response.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Losses(NamedTuple):
    """Per-triplet results; everything but ``loss`` is detached from the graph."""

    loss: Tensor  # [T]
    reward_chosen: Tensor  # [T, K]  P_j(x, y)
    reward_rejected: Tensor  # [T, K]  P_j(x, g)
    target_active: Tensor  # [T, K]  True where alpha = eta


def implicit_reward(policy: Tensor, players: Tensor, scale: float) -> Tensor:
    """P_j = lambda * (log pi_theta - log pi_j), for ``policy`` [T] and ``players`` [T, K]; gives [T, K]."""
    return scale * (policy.unsqueeze(-1) - players)


def target_weight(reward_chosen: Tensor, eta: float) -> Tensor:
    """TRW: alpha_j = eta where P_j(x, y) <= 0, else 1. A weight, so no gradient flows through it."""
    return torch.where(reward_chosen.detach() <= 0, eta, 1.0)


def tpaw_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    players_chosen: Tensor,
    players_rejected: Tensor,
    beta: Tensor,
    *,
    scale: float,
    eta: float,
) -> Losses:
    """sum_j beta_j * l(alpha_j * P_j(x, y) - P_j(x, g)) with l(u) = log(1 + exp(-u)), for each triplet.

    Args:
        policy_chosen, policy_rejected: [T], with gradient.
        players_chosen, players_rejected, beta: [T, K], constants.
        scale: lambda > 0.  eta: >= 1; 1 switches target weighting off.

    One player with eta = 1 gives SPIN's loss (arXiv 2401.01335), which is DPO's with reference pi_{t-1}.

    Raises:
        ValueError: the shapes do not agree.
    """
    triplets = (*policy_chosen.shape, beta.shape[-1])
    agree = players_chosen.shape == players_rejected.shape == beta.shape == triplets
    if not (agree and policy_chosen.shape == policy_rejected.shape):
        raise ValueError(
            f"shapes disagree: policy {tuple(policy_chosen.shape)} and {tuple(policy_rejected.shape)}, "
            f"players {tuple(players_chosen.shape)} and {tuple(players_rejected.shape)}, beta {tuple(beta.shape)}"
        )
    reward_chosen = implicit_reward(policy_chosen, players_chosen, scale)
    reward_rejected = implicit_reward(policy_rejected, players_rejected, scale)
    alpha = target_weight(reward_chosen, eta)
    loss = (beta * softplus(reward_rejected - alpha * reward_chosen)).sum(-1)
    reward_chosen = reward_chosen.detach()
    return Losses(loss, reward_chosen, reward_rejected.detach(), reward_chosen <= 0)
