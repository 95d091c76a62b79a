"""The fast loop: one batch, token by token, where finished rows leave the batch. For attention caches only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpaw_core.data.tokens import Ids
from tpaw_core.engine.generation.batch import pad_left
from tpaw_core.engine.generation.choice import Choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """Whether a layer's cache holds more than keys and values, from which rows could not leave."""
    from transformers import DynamicCache

    return any(hasattr(layer, "update_recurrent_state") for layer in DynamicCache(config=model.config).layers)


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    room: Sequence[int],
    choose: Choose,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Answers as generated, with padding after their ends."""
    from transformers import DynamicCache

    device, rows = model.device, len(prompts)
    ids, mask = (x.to(device) for x in pad_left(prompts, pad_id))
    left, stops = torch.tensor(room, device=device), torch.tensor(stop_ids, dtype=torch.long, device=device)
    answers = torch.full((rows, max(room)), pad_id, device=device)
    here = torch.arange(rows, device=device)  # the rows that are still computed
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    going = torch.ones(rows, dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for step in range(max(room)):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
            logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            token = choose(logits, here, step)
            answers[here, step] = token
            going &= ~torch.isin(token, stops) & (left[here] > step + 1)
            count = int(going.sum())
            if count == 0:
                break
            if count <= 7 * len(here) // 8:  # copying the cache pays off when an eighth of the rows has finished
                stay = going.nonzero()[:, 0]
                cache.batch_select_indices(stay)
                here, mask, position, token, going = (x[stay] for x in (here, mask, position, token, going))
            ids, position = token[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return answers.tolist()
