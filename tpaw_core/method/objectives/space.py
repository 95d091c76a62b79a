"""SPACE (arXiv 2512.07175): target and answer are each contrasted with noise, by a term of their own."""

from __future__ import annotations

import math

from torch.nn.functional import softplus

from tpaw_core.method.objectives.base import LogProbs, Losses, Settings, implicit_reward, with_rewards


def space_loss(logps: LogProbs, settings: Settings, mu: float = 1.0) -> Losses:
    """-log s_mu(r(y)) - mu log s_1/mu(-r(g)), r = log pi_theta - log pi_{t-1}, s_mu(u) = 1 / (1 + mu e^-u).

    For one player. Lambda scales the reported rewards; the loss has none.
    """
    ratio_chosen = implicit_reward(logps.policy_chosen, logps.players_chosen, 1.0)
    ratio_rejected = implicit_reward(logps.policy_rejected, logps.players_rejected, 1.0)
    shift = math.log(mu)
    loss = softplus(shift - ratio_chosen) + mu * softplus(ratio_rejected - shift)
    return with_rewards(loss.sum(-1), settings.scale * ratio_chosen, settings.scale * ratio_rejected)
