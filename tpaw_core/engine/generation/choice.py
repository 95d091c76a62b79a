"""Choice: the next token, from the logits and one uniform draw per row and step.

A row's draws depend only on the seed and the row's index among all prompts, never on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tpaw_core.config.params import Generation

# Tokens [B] for logits [B, V], the rows [B] of the batch that they belong to, and the step.
Choose = Callable[[Tensor, Tensor, int], Tensor]


def chooser(settings: Generation, *, seed: int, indices: Sequence[int], steps: int, device: torch.device) -> Choose:
    """For a batch of the prompts at ``indices``, each with at most ``steps`` new tokens."""
    draws = np.zeros((len(indices), steps))
    if settings.temperature > 0:
        for row, index in enumerate(indices):
            draws[row] = np.random.Generator(np.random.Philox(key=[seed, index])).random(steps)
    chances = torch.from_numpy(draws).to(device)
    return lambda logits, rows, step: token(logits, chances[rows, step], settings)


def token(logits: Tensor, chance: Tensor, settings: Generation) -> Tensor:
    """Tokens [B] for logits [B, V]: the likeliest, or where ``chance`` [B] in [0, 1) falls among the cumulated
    probabilities of those that temperature and top_p leave."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= settings.top_p] = 0
    cumulated = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulated, chance[:, None] * cumulated[:, -1:], right=True)
    place = place.clamp(max=logits.shape[-1] - 1)
    return (tokens.gather(-1, place) if settings.top_p < 1 else place)[:, 0]
