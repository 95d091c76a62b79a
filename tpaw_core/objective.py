"""The training objectives: log-probabilities in, losses and rewards out.

Knows the equations of TPAW (Li et al., ACL 2026, arXiv 2605.09922) and of the methods it is compared with, and nothing
of models, files or services.

Symbols, for a batch of T triplets (x, y, g) and K main players:

    log pi_theta(y|x)   policy_chosen      [T]     lambda   scale of the implicit reward
    log pi_theta(g|x)   policy_rejected    [T]     eta      target weight while the target reward is not positive
    log pi_j(y|x)       players_chosen     [T, K]  alpha    target weight (TRW), eta or 1
    log pi_j(g|x)       players_rejected   [T, K]  beta     player weight (MPW), rows sum to 1

All log-probabilities are in nats and summed over the tokens of the response.
"""

from __future__ import annotations

import math
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
    return _losses(loss, reward_chosen, reward_rejected)


def spin_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, players_chosen: Tensor, players_rejected: Tensor, *, scale: float
) -> Losses:
    """l(P(y) - P(g)), for each triplet; shapes as in `tpaw_loss` with K = 1. SPIN (arXiv 2401.01335, equation 4.7)."""
    beta = torch.ones_like(players_chosen)
    return tpaw_loss(policy_chosen, policy_rejected, players_chosen, players_rejected, beta, scale=scale, eta=1.0)


def dpo_nll_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    players_chosen: Tensor,
    players_rejected: Tensor,
    tokens: Tensor,
    *,
    scale: float,
) -> Losses:
    """l(P(y) - P(g)) - log pi_theta(y|x) / |y|: SPIN's loss with a term that holds the target up, for each triplet.

    The loss of iterative reasoning preference optimisation (arXiv 2404.19733, equation 2, with alpha = 1); here the
    losing answer is the model's own. Shapes as in `tpaw_loss` with K = 1, and tokens: [T], |y|.
    """
    losses = spin_loss(policy_chosen, policy_rejected, players_chosen, players_rejected, scale=scale)
    return losses._replace(loss=losses.loss - policy_chosen / tokens)


def space_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    players_chosen: Tensor,
    players_rejected: Tensor,
    *,
    scale: float,
    mu: float = 1.0,
) -> Losses:
    """-log s_mu(r(y)) - mu log s_1/mu(-r(g)), r = log pi_theta - log pi_{t-1}, s_mu(u) = 1 / (1 + mu e^-u).

    SPACE (arXiv 2512.07175): target and answer are each told from noise by a term of their own. Shapes as in
    `tpaw_loss` with K = 1; ``scale`` is that of the reported rewards, the loss has none.
    """
    ratio_chosen = implicit_reward(policy_chosen, players_chosen, 1.0)
    ratio_rejected = implicit_reward(policy_rejected, players_rejected, 1.0)
    shift = math.log(mu)
    loss = softplus(shift - ratio_chosen) + mu * softplus(ratio_rejected - shift)
    return _losses(loss.sum(-1), scale * ratio_chosen, scale * ratio_rejected)


def tspin_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    policy_first: Tensor,
    players_chosen: Tensor,
    players_rejected: Tensor,
    *,
    scale: float,
    history: float,
) -> Losses:
    """l(log pi(y) - log pi(g)) + history * l(log pi(g) - log pi(g0)), g0 being checkpoint 0's answer; no reference.

    T-SPIN (arXiv 2601.08198, with a = 1). policy_first: [T], log pi_theta(g0|x); other shapes as in `tpaw_loss`.
    Players and ``scale`` serve the reported rewards only.
    """
    loss = softplus(policy_rejected - policy_chosen) + history * softplus(policy_first - policy_rejected)
    reward_chosen = implicit_reward(policy_chosen, players_chosen, scale)
    return _losses(loss, reward_chosen, implicit_reward(policy_rejected, players_rejected, scale))


def _losses(loss: Tensor, reward_chosen: Tensor, reward_rejected: Tensor) -> Losses:
    reward_chosen = reward_chosen.detach()
    return Losses(loss, reward_chosen, reward_rejected.detach(), reward_chosen <= 0)
