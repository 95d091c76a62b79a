"""SPIN (arXiv 2401.01335)."""

from __future__ import annotations

import torch

from tpaw_core.method.objectives.base import LogProbs, Losses, Settings
from tpaw_core.method.objectives.tpaw import tpaw_loss


def spin_loss(logps: LogProbs, settings: Settings) -> Losses:
    """l(P(y) - P(g)), for each triplet and one player: equation 4.7."""
    return tpaw_loss(logps._replace(beta=torch.ones_like(logps.players_chosen)), Settings(settings.scale))
