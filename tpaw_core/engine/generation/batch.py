"""Batch: prompts of different lengths as one tensor, padded on the left so that every row's next token comes last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpaw_core.data.tokens import Ids


def pad_left(prompts: Sequence[Ids], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, L]."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
