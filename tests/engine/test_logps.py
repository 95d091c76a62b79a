"""Packed, padded and plain: the same numbers and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.groups import assert_same
from tests.support.reference import group_logps
from tpaw_core.engine import attention, logps, packing
from tpaw_core.engine.packing import PromptGroup


@pytest.fixture
def groups(encoded: list[Any]) -> list[PromptGroup]:
    return [
        (e.prompt_ids, [e.chosen_ids, encoded[n + 1].chosen_ids, encoded[n + 2].chosen_ids[: n + 1]])
        for n, e in enumerate(encoded[:6])
    ]


def test_responses_of_one_token_each(make_model: Callable[[int], Any]) -> None:
    model = make_model(3)
    groups: list[PromptGroup] = [([5, 6, 7], [[8], [9]]), ([11], [[12]])]
    expected = group_logps(model, groups)
    with attention.packed(model):
        found = logps.response_logps(model, packing.pack(groups))
        assert_same(model, found, expected)


def test_shared_prompts_give_the_plain_numbers_and_gradients(
    make_model: Callable[[int], Any], groups: list[PromptGroup]
) -> None:
    model = make_model(3)
    expected = group_logps(model, groups)
    assert_same(model, logps.response_logps(model, packing.pad(groups, 0)), expected)
    with attention.packed(model):
        assert_same(model, logps.response_logps(model, packing.pack(groups)), expected)
    with attention.packed(model, attention.FLEX), torch.no_grad():  # a processor has no backward pass of it
        torch.testing.assert_close(logps.response_logps(model, packing.pack(groups)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group_logps(model, groups), expected)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("scale", "cap", "bias"), [(1.0, None, False), (0.5, None, True), (2.0, 3.0, True)])
def test_chunked_log_probs_equal_plain_ones_and_so_do_their_gradients(
    rows: int, scale: float, cap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight, shift = (
        torch.randn(shape, generator=generator, requires_grad=True) for shape in ((23, 8), (50, 8), (50,))
    )
    target = torch.randint(50, (23,), generator=generator)
    monkeypatch.setattr(logps, "_chunks", lambda n, weight: [slice(start, start + rows) for start in range(0, n, rows)])
    inputs = [hidden, weight, shift][: 3 if bias else 2]
    found = logps.token_logps(hidden, weight, target, bias=shift if bias else None, scale=scale, cap=cap)
    logits = scale * (hidden @ weight.T + (shift if bias else 0))
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-2, 1, 23)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
