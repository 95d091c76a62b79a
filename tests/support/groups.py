"""Groups of prompts with their responses, and how two ways to their log-probabilities are compared."""

from __future__ import annotations

from typing import Any

import torch

from tpaw_core.engine.packing import PromptGroup

# Prompts and responses of many lengths: a response of one token, the same response twice, a prompt of one token.
SMALL: list[PromptGroup] = [
    ([5, 6, 7], [[8, 9], [10], [8, 9]]),
    ([11], [[12, 13, 14, 15, 16]]),
    ([17, 18], [[19], [20, 21]]),
]


def gradients(model: Any, values: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum in which every response has another weight and sign."""
    weights = torch.linspace(-1, 2, len(values))
    return list(
        torch.autograd.grad((values * weights).sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
    )


def assert_same(model: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, found), gradients(model, expected)
    largest = max(g.abs().max().item() for g in theirs if g is not None)
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)
