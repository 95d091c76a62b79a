"""The loss of iterative reasoning preference optimisation (arXiv 2404.19733); here the model's own answer loses."""

from __future__ import annotations

from tpaw_core.method.objectives.base import LogProbs, Losses, Settings
from tpaw_core.method.objectives.spin import spin_loss


def dpo_nll_loss(logps: LogProbs, settings: Settings) -> Losses:
    """l(P(y) - P(g)) - log pi_theta(y|x) / |y|: SPIN's loss, with a term that keeps the target likely.

    Equation 2 with alpha = 1, for one player.
    """
    losses = spin_loss(logps, settings)
    return losses._replace(loss=losses.loss - logps.policy_chosen / logps.chosen_tokens)
