"""Whether a model can share a prompt among its responses: asked of its config, then of a probe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpaw_core.engine import attention, packing
from tpaw_core.engine.logps import response_logps
from tpaw_core.engine.packing import Pack, PromptGroup
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)
Packer = Callable[[Sequence[PromptGroup]], Pack]


@contextmanager
def packer(model: PreTrainedModel, groups: Iterable[PromptGroup], pad_id: int) -> Iterator[Packer]:
    """How ``model`` takes such groups: with the prompt shared where its attention can do that, otherwise as plain rows.

    Raises TpawError where log-probabilities made from its hidden states are not those of its logits.
    """
    longest = max((len(p) + max(map(len, responses), default=0) for p, responses in groups), default=0)
    expected = _plain_logps(model, pad_id)
    if (reason := attention.reason_not_packable(model, longest)) is None:
        name = next((way for way in attention.packed_attentions(model) if _agrees(model, way, expected)), "")
        reason = None if name else "its attention does not allow it"
    if reason is not None:
        logger.info("%s: prompts are not shared among responses, as %s", type(model).__name__, reason)
        yield lambda groups: packing.pad(groups, pad_id)
        return
    with attention.packed(model, name):
        yield packing.pack


PROBE: list[PromptGroup] = [([1, 2, 3], [[4, 5, 6], [7, 8]]), ([9, 3], [[2, 5, 4, 8]])]


@torch.no_grad()
def _plain_logps(model: PreTrainedModel, pad_id: int) -> Tensor:
    """PROBE's log-probabilities by the plain forward pass. Raises TpawError where its hidden states give others."""
    plain = packing.pad(PROBE, pad_id).to(model.device)
    with evaluating(model):
        logits = model(**plain.inputs, use_cache=False).logits.flatten(0, 1)[plain.source].float()
        by_hidden = response_logps(model, plain)
    tokens = logits.log_softmax(-1).gather(-1, plain.target[:, None]).squeeze(-1)
    expected = tokens.new_zeros(plain.responses).index_add(0, plain.sequence, tokens)
    if not _near(model, by_hidden, expected):
        raise TpawError(
            f"{type(model).__name__}: its log-probabilities cannot be made from its hidden states "
            f"({by_hidden.tolist()} where its logits give {expected.tolist()}); this model is not supported"
        )
    return expected


@torch.no_grad()
def _agrees(model: PreTrainedModel, name: str, expected: Tensor) -> bool:
    """Whether PROBE gets the same log-probabilities with this attention."""
    try:
        with evaluating(model), attention.packed(model, name):
            found = response_logps(model, packing.pack(PROBE).to(model.device))
    except RuntimeError as error:  # torch.compile's errors, where a kernel cannot be made
        logger.info("%s: %s is not used (%s)", type(model).__name__, name, str(error).splitlines()[0])
        return False
    return _near(model, found, expected)


def _near(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    near = 1e-3 if model.dtype == torch.float32 else 5e-2
    return torch.allclose(found, expected, rtol=near, atol=near)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode while this holds."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
