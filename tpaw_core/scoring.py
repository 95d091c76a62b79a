"""Sequence log-probabilities: log pi(response | prompt), summed over the response's tokens, in nats.

Needs torch and a model; must not know teams, stages or services.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tpaw_core.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids


class Batch(NamedTuple):
    """Right-padded sequences; all [B, L]."""

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor  # 1 on response tokens

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def pad(pairs: Sequence[Pair], pad_id: int) -> Batch:
    """Prompt and response of each pair, one after the other, padded on the right."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), length), pad_id, dtype=torch.long)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        attention[row, :end] = 1
        mask[row, len(prompt) : end] = 1
    return Batch(ids, attention, mask)


def response_logps(model: torch.nn.Module, batch: Batch) -> Tensor:
    """log pi(response | prompt) [B] in float32, with gradient where the model's parameters have one."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    rows, columns = batch.response_mask[:, 1:].nonzero(as_tuple=True)
    # Only response positions are brought to float32: prompts are often longer than responses.
    picked = logits[rows, columns].float().log_softmax(-1)
    tokens = picked.gather(-1, batch.input_ids[rows, columns + 1, None]).squeeze(-1)
    return torch.zeros(len(logits), device=logits.device).index_add(0, rows, tokens)


@torch.inference_mode()
def score(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, batch_tokens: int = 16384, bf16: bool = False
) -> list[float]:
    """log pi of each pair's response, in the order given; ``bf16`` computes as training with bf16 does."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), i))
    scores = [0.0] * len(pairs)
    batches: list[list[int]] = []
    for index in order:
        length = len(pairs[index][0]) + len(pairs[index][1])
        if not batches or (len(batches[-1]) + 1) * length > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for batch in progress(batches, "scoring", size=len):
            padded = pad([pairs[i] for i in batch], pad_id).to(model.device)
            for index, value in zip(batch, response_logps(model, padded).tolist(), strict=True):
                scores[index] = value
    return scores
