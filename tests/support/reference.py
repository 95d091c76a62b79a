"""Log-probabilities as the definition says: every response by itself, all logits, nothing shared, padded or chunked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpaw_core.data.tokens import Pair
from tpaw_core.engine.packing import PromptGroup


def group_logps(model: Any, groups: Sequence[PromptGroup]) -> Tensor:
    """log pi(response | prompt) of each response, with gradient: one forward pass per response."""
    return torch.stack([_response(model, prompt, ids) for prompt, responses in groups for ids in responses])


def _response(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    logps = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float().log_softmax(-1)
    total: Tensor = sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))
    return total


@torch.inference_mode()
def pair_logp(model: Any, pair: Pair) -> float:
    """log pi(response | prompt) in double precision: one forward pass per token of the response."""
    prompt, response = (list(ids) for ids in pair)
    total = 0.0
    for number, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:number]])).logits[0, -1]
        total += torch.log_softmax(logits.double(), -1)[token].item()
    return total
