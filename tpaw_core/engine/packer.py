"""Whether a model can share a prompt among its responses: asked of its config, then of a probe."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpaw_core.engine import attention, packing
from tpaw_core.engine.logps import response_logps
from tpaw_core.engine.packing import Pack, PromptGroup
from tpaw_core.engine.precision import multiplies_bfloat16
from tpaw_core.errors import Diverged

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)
Packer = Callable[[Sequence[PromptGroup]], Pack]


@contextmanager
def packer(model: PreTrainedModel, groups: Iterable[PromptGroup], pad_id: int) -> Iterator[Packer]:
    """How ``model`` takes such groups: with the prompt shared where its attention can do that, otherwise as plain rows.

    While this holds, calling ``model`` with a pack gives log-probabilities, whatever is wrapped around it.
    Raises Diverged for a model whose log-probabilities are not numbers.
    """
    with _calls_give_logps(model), _way(model, groups, pad_id) as pack:
        yield pack


@contextmanager
def _calls_give_logps(model: PreTrainedModel) -> Iterator[None]:
    """Layers that are divided among processes are gathered only on the way through the whole model."""
    model.forward = partial(response_logps, model)
    try:
        yield
    finally:
        del model.forward


@contextmanager
def _way(model: PreTrainedModel, groups: Iterable[PromptGroup], pad_id: int) -> Iterator[Packer]:
    longest = max((len(p) + max(map(len, responses), default=0) for p, responses in groups), default=0)
    expected, by_logits = _plain_logps(model, pad_id)
    if (reason := attention.reason_not_packable(model, longest)) is None:
        ways = attention.packed_attentions(model)
        name = next((way for way in ways if _agrees(model, way, expected, by_logits)), "")
        reason = None if name else "its attention does not allow it"
    if reason is not None:
        _model_logps(model, pad_id)  # a pass that failed half-way left divided weights gathered; this one is whole
        logger.info("%s: prompts are not shared among responses, as %s", type(model).__name__, reason)
        yield lambda groups: packing.pad(groups, pad_id)._replace(by_logits=by_logits)
        return
    with attention.packed(model, name):
        yield lambda groups: packing.pack(groups)._replace(by_logits=by_logits)


PROBE: list[PromptGroup] = [([1, 2, 3], [[4, 5, 6], [7, 8]]), ([9, 3], [[2, 5, 4, 8]])]


@torch.no_grad()
def _plain_logps(model: PreTrainedModel, pad_id: int) -> tuple[Tensor, bool]:
    """PROBE's log-probabilities by the plain forward pass, and whether only the model's own logits give them."""
    expected = _model_logps(model, pad_id)
    with evaluating(model):
        if not expected.isfinite().all():
            raise Diverged(
                f"{type(model).__name__}: its log-probabilities in {str(model.dtype).removeprefix('torch.')} are not "
                "numbers; set model.dtype=float32, or get another copy of its weights"
            )
        try:
            reason = _unknown_cap(model)
            if reason is None and not _near(model, model(packing.pad(PROBE, pad_id).to(model.device)), expected):
                reason = "its hidden states and output projection do not give its logits"
        except Exception as error:  # whatever a model lacks here, its own forward pass has it
            reason = _first_line(error)
    if reason is not None:
        logger.info("%s: computing full logits, which takes more memory, because %s", type(model).__name__, reason)
    return expected, reason is not None


@torch.no_grad()
def _model_logps(model: PreTrainedModel, pad_id: int) -> Tensor:
    with evaluating(model):
        found: Tensor = model(packing.pad(PROBE, pad_id).to(model.device)._replace(by_logits=True))
    return found


def _unknown_cap(model: PreTrainedModel) -> str | None:
    """A cap on logits is invisible in logits as small as a probe's; this one's name says what it caps."""
    known = {"attn_logit_softcapping", "final_logit_softcapping"}
    config = model.config.get_text_config()
    caps = (name for name, value in vars(config).items() if re.search("soft_?cap", name) and value)
    return next((f"its config has {name}" for name in caps if name not in known), None)


@torch.no_grad()
def _agrees(model: PreTrainedModel, name: str, expected: Tensor, by_logits: bool) -> bool:
    """Whether PROBE gets the same log-probabilities with this attention."""
    try:
        with evaluating(model), attention.packed(model, name):
            found = model(packing.pack(PROBE).to(model.device)._replace(by_logits=by_logits))
    except Exception as error:  # a model that ignores the layout, a kernel that cannot be made
        logger.info("%s: %s is not used (%s)", type(model).__name__, name, _first_line(error))
        return False
    return _near(model, found, expected)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _near(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    near = 5e-2 if multiplies_bfloat16(model) else 1e-4
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
