"""Scores: log pi(response | prompt) of a frozen model, summed over the response's tokens, in nats.

Needs torch and a model; must not know teams, stages or services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tpaw_core import attention, packing
from tpaw_core.errors import TpawError
from tpaw_core.logps import response_logps
from tpaw_core.packing import Ids, Pack, Tree
from tpaw_core.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[Ids, Ids]  # prompt ids, response ids
Packer = Callable[[Sequence[Tree]], Pack]
T = TypeVar("T")


@contextmanager
def packer(model: PreTrainedModel, trees: Iterable[Tree], pad_id: int) -> Iterator[Packer]:
    """How ``model`` takes such trees: with the prompt shared where its attention can, as plain rows elsewhere.

    Raises TpawError where log-probabilities made from its hidden states are not those of its logits.
    """
    longest = max((len(p) + max(map(len, responses), default=0) for p, responses in trees), default=0)
    expected = _checked(model, pad_id)
    if (reason := attention.why_not_packed(model, longest)) is None:
        name = next((way for way in attention.ways(model) if _agrees(model, way, expected)), "")
        reason = None if name else "its attention does not allow it"
    if reason is not None:
        print(f"{type(model).__name__}: prompts are not shared among responses, as {reason}", flush=True)
        yield lambda trees: packing.pad(trees, pad_id)
        return
    with attention.packed(model, name):
        yield packing.pack


PROBE: list[Tree] = [([1, 2, 3], [[4, 5, 6], [7, 8]]), ([9, 3], [[2, 5, 4, 8]])]


@torch.no_grad()
def _checked(model: PreTrainedModel, pad_id: int) -> Tensor:
    """The log-probabilities of PROBE by the plain forward, after a check that hidden states give the same."""
    plain = packing.pad(PROBE, pad_id).to(model.device)
    with _evaluating(model):
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
        with _evaluating(model), attention.packed(model, name):
            found = response_logps(model, packing.pack(PROBE).to(model.device))
    except RuntimeError as error:  # torch.compile's errors, where a kernel cannot be made
        print(f"{type(model).__name__}: {name} is not used ({str(error).splitlines()[0]})", flush=True)
        return False
    return _near(model, found, expected)


def _near(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    near = 1e-3 if model.dtype == torch.float32 else 5e-2
    return torch.allclose(found, expected, rtol=near, atol=near)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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

    def tree(indices: list[int]) -> Tree:
        return pairs[indices[0]][0], [pairs[i][1] for i in indices]

    with packer(model, map(tree, found), pad_id) as pack:
        parts = by_tokens(found, tree, batch_tokens)
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


def by_tokens(items: Iterable[T], tree: Callable[[T], Tree], most: int) -> list[list[T]]:
    """Items in the order given, in parts of at most ``most`` tokens; one that is longer is a part by itself."""
    parts: list[list[T]] = []
    room = 0
    for item in items:
        size = packing.tokens(tree(item))
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(item)
        room -= size
    return parts
