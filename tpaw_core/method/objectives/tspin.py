"""T-SPIN (arXiv 2601.08198)."""

from __future__ import annotations

from torch.nn.functional import softplus

from tpaw_core.method.objectives.base import LogProbs, Losses, Settings, implicit_reward, with_rewards


def tspin_loss(logps: LogProbs, settings: Settings) -> Losses:
    """l(log pi(y) - log pi(g)) + history * l(log pi(g) - log pi(g0)), g0 being checkpoint 0's answer; no reference.

    With a = 1. Players and lambda serve the reported rewards only.
    """
    chosen, rejected, initial = logps.policy_chosen, logps.policy_rejected, logps.policy_initial
    loss = softplus(rejected - chosen) + settings.history * softplus(initial - rejected)
    reward_chosen = implicit_reward(chosen, logps.players_chosen, settings.scale)
    return with_rewards(loss, reward_chosen, implicit_reward(rejected, logps.players_rejected, settings.scale))
