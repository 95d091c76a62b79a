"""Scores: log pi(response | prompt) of a frozen model, summed over the response's tokens, in nats.

Needs torch and a model; must not know teams, stages or services.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tpaw_core.data.tokens import Pair
from tpaw_core.engine import ranks
from tpaw_core.engine.packer import packer
from tpaw_core.engine.packing import PromptGroup, split
from tpaw_core.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def batches(
    model: PreTrainedModel, pairs: Sequence[Pair], *, pad_id: int, batch_tokens: int = 16384, bf16: bool = False
) -> Iterator[tuple[list[int], list[float]]]:
    """Positions in ``pairs`` and log pi of their responses, a batch at a time and each position on one rank, once.

    ``bf16`` computes as training with bf16 does. What is computed together does not depend on how many ranks there are.
    """
    members: dict[bytes, list[int]] = {}
    lengths = []  # of responses
    for index, (prompt, response) in enumerate(pairs):
        members.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(index)
        lengths.append(len(response))
    cost = {ids: len(ids) // 4 + sum(lengths[i] for i in own) for ids, own in members.items()}
    shortest = sorted(cost, key=cost.__getitem__)
    found = [members[ids] for ids in shortest]

    def tree(indices: list[int]) -> PromptGroup:
        return pairs[indices[0]][0], [pairs[i][1] for i in indices]

    with packer(model, map(tree, found), pad_id) as pack:
        parts = [[found[i] for i in part] for part in split([cost[ids] for ids in shortest], batch_tokens)]
        world, last = ranks.world(), len(parts) - 1
        # Where the last round has fewer parts than ranks, the others repeat one: all compute equally often.
        rounds = range(ranks.rank(), -(-len(parts) // world) * world, world)
        for number in progress(rounds, "scoring", size=lambda number: sum(map(len, parts[min(number, last)]))):
            part = parts[min(number, last)]
            inputs = pack(list(map(tree, part))).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                values = model(inputs).tolist()
            if number <= last:
                yield [i for indices in part for i in indices], values


def score(model: PreTrainedModel, pairs: Sequence[Pair], **options: Any) -> list[float]:
    """log pi of each pair's response, in the order given; options are those of `batches`."""
    scores = [0.0] * len(pairs)
    for positions, values in batches(model, pairs, **options):
        for position, value in zip(positions, values, strict=True):
            scores[position] = value
    return scores
