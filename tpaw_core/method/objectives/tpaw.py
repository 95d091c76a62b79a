"""TPAW (Li et al., ACL 2026, arXiv 2605.09922)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tpaw_core.method.lengths import by_length
from tpaw_core.method.objectives.base import LogProbs, Losses, Settings, implicit_reward, with_rewards


def target_weight(reward_chosen: Tensor, eta: float) -> Tensor:
    """TRW: alpha_j = eta where P_j(x, y) <= 0, else 1. A weight, so no gradient flows through it."""
    return torch.where(reward_chosen.detach() <= 0, eta, 1.0)


def tpaw_loss(logps: LogProbs, settings: Settings) -> Losses:
    """sum_j beta_j * l(alpha_j * P_j(x, y) - P_j(x, g)) with l(u) = log(1 + exp(-u)), for each triplet.

    One player with eta = 1 gives SPIN's loss (arXiv 2401.01335), which is DPO's with reference pi_{t-1}.

    Raises:
        ValueError: the shapes do not agree.
    """
    chosen, rejected, beta = logps.policy_chosen, logps.policy_rejected, logps.beta
    players_chosen, players_rejected = logps.players_chosen, logps.players_rejected
    agree = players_chosen.shape == players_rejected.shape == beta.shape == (*chosen.shape, beta.shape[-1])
    if not (agree and chosen.shape == rejected.shape):
        raise ValueError(
            f"shapes disagree: policy {tuple(chosen.shape)} and {tuple(rejected.shape)}, "
            f"players {tuple(players_chosen.shape)} and {tuple(players_rejected.shape)}, beta {tuple(beta.shape)}"
        )
    if settings.mean_tokens is not None:
        y, g, mean = logps.chosen_tokens, logps.rejected_tokens, settings.mean_tokens
        chosen, players_chosen = by_length(chosen, y, mean), by_length(players_chosen, y[:, None], mean)
        rejected, players_rejected = by_length(rejected, g, mean), by_length(players_rejected, g[:, None], mean)
    reward_chosen = implicit_reward(chosen, players_chosen, settings.scale)
    reward_rejected = implicit_reward(rejected, players_rejected, settings.scale)
    alpha = target_weight(reward_chosen, settings.eta)
    loss = (beta * softplus(reward_rejected - alpha * reward_chosen)).sum(-1)
    return with_rewards(loss, reward_chosen, reward_rejected)
