"""The way a model is decoded: the fastest one whose logits are those of the model's plain forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tpaw_core.data.tokens import Ids
from tpaw_core.engine.generation import fast_loop, general
from tpaw_core.engine.packer import evaluating
from tpaw_core.errors import Diverged, TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


class Way(NamedTuple):
    name: str
    decode: Callable[..., list[list[int]]]  # fast_loop's or general's
    padded: bool  # whether a batch may hold prompts of different lengths

    def batches(self, prompts: Sequence[Ids], size: int) -> list[list[int]]:
        """Positions in ``prompts``, at most ``size`` per batch, by length so that there is little padding."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        groups = [order] if self.padded else [list(same) for _, same in groupby(order, lambda i: len(prompts[i]))]
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


FAST = Way("the fast loop", fast_loop.decode, padded=True)
PADDED = Way("transformers' generate", general.decode, padded=True)
UNPADDED = Way("transformers' generate in batches of equally long prompts", general.decode, padded=False)
UNCACHED = Way("transformers' generate without a cache", partial(general.decode, use_cache=False), padded=False)

# Prompts and the answers that are forced. A row leaves early, two prompts are equally long, and one is shorter than a
# state-space model's convolution.
PROBE: list[tuple[Ids, Ids]] = [([3, 1, 4], [9, 2]), ([2, 7, 8], [8, 1, 2, 4]), ([6], [6, 2, 1])]


def find(model: PreTrainedModel, pad_id: int) -> Way:
    """Raises TpawError for a model that no way decodes as its plain forward pass would."""
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        expected = _plain(model)
        if not all(logits.isfinite().all() for logits in expected):
            raise Diverged(f"{type(model).__name__}: its logits are not finite; use the previous checkpoint")
        if fast_loop.has_recurrent_state(model):
            reason = "its cache holds recurrent states"
        elif (difference := _difference(model, FAST, pad_id, expected)) is None:
            return FAST
        else:
            reason = f"with the fast loop {difference}"
        for way in (PADDED, UNPADDED, UNCACHED):
            if (difference := _difference(model, way, pad_id, expected)) is None:
                logger.info("%s: decoded by %s, because %s", type(model).__name__, way.name, reason)
                return way
            reason = f"{reason}; with {way.name} {difference}"
    raise TpawError(
        f"{type(model).__name__}: this model is not supported: "
        f"decoding token by token differs from its plain forward pass ({reason})"
    )


@torch.no_grad()
def _plain(model: PreTrainedModel) -> list[Tensor]:
    """For each row of PROBE, the logits [steps, V] from which its next tokens would be chosen, without a cache."""
    found = []
    for prompt, answer in PROBE:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        found.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float())
    return found


def _difference(model: PreTrainedModel, way: Way, pad_id: int, expected: list[Tensor]) -> str | None:
    """How the logits by this way differ from those expected; None where they agree."""
    prompts, answers = zip(*PROBE, strict=True)
    near = 1e-3 if model.dtype == torch.float32 else 0.1
    for batch in way.batches(prompts, len(prompts)):
        forced = _Forced([answers[i] for i in batch])
        room = [len(answers[i]) for i in batch]
        try:
            way.decode(model, [prompts[i] for i in batch], room, forced, stop_ids=(), pad_id=pad_id)
        except Exception as error:  # whatever a model raises here, this way is not for it
            return f"it fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        for i, logits in zip(batch, forced.logits, strict=True):
            seen = torch.stack(logits)
            if not _distance(seen, expected[i]) <= near:
                return "it gives other logits than the plain forward pass"
    return None


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a step's logits, relative to their spread; a shift of all logits does not count."""
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


class _Forced:
    """Chooses the answers given, whatever the logits are, and keeps the logits."""

    def __init__(self, answers: Sequence[Ids]) -> None:
        self.answers = answers
        self.logits: list[list[Tensor]] = [[] for _ in answers]

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        tokens = []
        for row, values in zip(rows.tolist(), logits.float(), strict=True):
            answer = self.answers[row]
            if step < len(answer):
                self.logits[row].append(values)
            tokens.append(answer[min(step, len(answer) - 1)])
        return torch.tensor(tokens, device=logits.device)
