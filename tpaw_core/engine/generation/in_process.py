"""Generation by transformers, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpaw_core.data.endings import Ending, Response, limits
from tpaw_core.data.tokens import Ids
from tpaw_core.engine import ranks
from tpaw_core.engine.generation import way
from tpaw_core.engine.generation.choice import chooser
from tpaw_core.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config.params import Generation


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    settings: Generation,
    *,
    max_length: int,
    ending: Ending,
    pad_id: int,
    seed: int,
) -> list[Response]:
    """One response per prompt, in their order, on every rank; the same bytes for the same seed on a CPU.

    A row's random draws depend only on the seed and its index, never on batching, and batches not on ranks.
    Raises TpawError for a model whose cache cannot be trusted.
    """
    room = limits(prompts, max_new_tokens=settings.max_new_tokens, max_length=max_length)
    chosen = way.find(model, pad_id)
    responses: dict[int, Response] = {}
    own_batches = chosen.batches(prompts, settings.batch_size)[ranks.rank() :: ranks.world()]
    for batch in progress(own_batches, "generating", size=len):
        own = [room[i] for i in batch]
        choose = chooser(settings, seed=seed, indices=batch, steps=max(own), device=model.device)
        answers = chosen.decode(
            model, [prompts[i] for i in batch], own, choose, stop_ids=ending.stop_ids, pad_id=pad_id
        )
        for index, answer in zip(batch, answers, strict=True):
            responses[index] = ending.cut(answer, room[index])
    for others in ranks.gather(responses):
        responses |= others
    return [responses[i] for i in range(len(prompts))]
