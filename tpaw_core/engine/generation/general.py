"""The general way: one batch by transformers' own `generate`, which knows every model's cache.

Slower than the fast loop, because finished rows are computed until the last one has finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tpaw_core.data.tokens import Ids
from tpaw_core.engine.generation.batch import pad_left
from tpaw_core.engine.generation.choice import Choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    room: Sequence[int],
    choose: Choose,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    use_cache: bool = True,
) -> list[list[int]]:
    """Answers as generated; what follows their ends has no meaning. Without a cache every step is a plain forward."""
    ids, mask = (x.to(model.device) for x in pad_left(prompts, pad_id))
    # RecurrentGemma mistakes a prompt of one token for a next step and continues from the previous batch's states.
    use_cache = use_cache and ids.shape[1] > 1
    settings = GenerationConfig(do_sample=False, max_new_tokens=max(room), pad_token_id=pad_id, use_cache=use_cache)
    with _bare(model):
        found = model.generate(  # type: ignore[operator]  # of the mixin that models with a head have
            ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Chosen(choose, ids.shape[1])]),
            stopping_criteria=StoppingCriteriaList([_Ended(room, stop_ids, ids)]),
        )
    return found[:, ids.shape[1] :].tolist()


class _Chosen(LogitsProcessor):
    """Leaves `generate` only the token that ``choose`` has chosen."""

    def __init__(self, choose: Choose, start: int) -> None:
        self.choose, self.start = choose, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        token = self.choose(scores, rows, input_ids.shape[1] - self.start)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, room: Sequence[int], stop_ids: Sequence[int], ids: Tensor) -> None:
        self.ends = torch.tensor(room, device=ids.device) + ids.shape[1]
        self.stops = torch.tensor(stop_ids, dtype=torch.long, device=ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.isin(input_ids[:, -1], self.stops) | (self.ends <= input_ids.shape[1])


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """`generate` would fill in what is not set from the settings that came with the model, such as a penalty."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
