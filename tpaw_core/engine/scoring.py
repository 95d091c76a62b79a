"""Scores: log pi(response | prompt) of a frozen model, summed over the response's tokens, in nats.

Needs torch and a model; must not know teams, stages or services.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from tpaw_core.data.tokens import Pair
from tpaw_core.engine.logps import response_logps
from tpaw_core.engine.packer import packer
from tpaw_core.engine.packing import PromptGroup, split_by_tokens
from tpaw_core.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


T = TypeVar("T")


@torch.inference_mode()
def batches(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, batch_tokens: int = 16384, bf16: bool = False
) -> Iterator[tuple[list[int], list[float]]]:
    """Positions in ``pairs`` and log pi of their responses, a batch at a time and each position once.

    ``bf16`` computes as training with bf16 does.
    """
    members: dict[bytes, list[int]] = {}
    for index, (prompt, _) in enumerate(pairs):
        members.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(index)
    cost = {ids: len(pairs[own[0]][0]) + sum(len(pairs[i][1]) for i in own) for ids, own in members.items()}
    found = [members[ids] for ids in sorted(cost, key=cost.__getitem__)]

    def tree(indices: list[int]) -> PromptGroup:
        return pairs[indices[0]][0], [pairs[i][1] for i in indices]

    with packer(model, map(tree, found), pad_id) as pack:
        parts = split_by_tokens(found, tree, batch_tokens)
        for part in progress(parts, "scoring", size=lambda part: sum(map(len, part))):
            inputs = pack(list(map(tree, part))).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                values = response_logps(model, inputs).tolist()
            yield [i for indices in part for i in indices], values


def score(model: PreTrainedModel, pairs: Sequence[Pair], **options: Any) -> list[float]:
    """log pi of each pair's response, in the order given; options are those of `batches`."""
    scores = [0.0] * len(pairs)
    for positions, values in batches(model, pairs, **options):
        for position, value in zip(positions, values, strict=True):
            scores[position] = value
    return scores
