"""Packed, padded and plain: the same numbers and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tpaw_core.engine import attention, logps, packing, scoring
from tpaw_core.engine.packer import packer
from tpaw_core.engine.packing import Tree
from tpaw_core.errors import TpawError

# Prompts and responses of many lengths: a response of one token, the same response twice, a prompt of one token.
SMALL: list[Tree] = [([5, 6, 7], [[8, 9], [10], [8, 9]]), ([11], [[12, 13, 14, 15, 16]]), ([17, 18], [[19], [20, 21]])]


@pytest.fixture
def trees(encoded: list[Any]) -> list[Tree]:
    return [
        (e.prompt_ids, [e.chosen_ids, encoded[n + 1].chosen_ids, encoded[n + 2].chosen_ids[: n + 1]])
        for n, e in enumerate(encoded[:6])
    ]


def plain(model: Any, trees: list[Tree]) -> torch.Tensor:
    """Each response by itself behind its prompt, all logits, nothing shared, padded or chunked."""
    sums = []
    for prompt, responses in trees:
        for response in responses:
            logps = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float().log_softmax(-1)
            sums.append(sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response)))
    return torch.stack(sums)


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


def test_a_pack_has_no_padding_and_positions_go_on_from_the_prompt() -> None:
    pack = packing.pack(SMALL)
    assert pack.inputs["input_ids"].tolist() == [[5, 6, 7, 11, 17, 18, 8, 8, 12, 13, 14, 15, 20]]
    assert pack.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 3, 3, 1, 2, 3, 4, 2]]
    assert pack.target.tolist() == [8, 9, 10, 8, 9, 12, 13, 14, 15, 16, 19, 20, 21]
    assert pack.source.tolist() == [2, 6, 2, 2, 7, 3, 8, 9, 10, 11, 5, 5, 12]
    assert pack.sequence.tolist() == [0, 0, 1, 2, 2, 3, 3, 3, 3, 3, 4, 5, 5]
    assert pack.responses == 6


def test_rows_are_padded_on_the_right() -> None:
    pack = packing.pad([([1, 2], [[3]]), ([4], [[5, 6, 7]])], pad_id=9)
    assert pack.inputs["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 6, 7]]
    assert pack.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert pack.source.tolist() == [1, 4, 5, 6]
    assert pack.target.tolist() == [3, 5, 6, 7]
    assert pack.sequence.tolist() == [0, 1, 1, 1]


def test_responses_of_one_token_each(make_model: Callable[[int], Any]) -> None:
    model = make_model(3)
    trees: list[Tree] = [([5, 6, 7], [[8], [9]]), ([11], [[12]])]
    expected = plain(model, trees)
    with attention.packed(model):
        found = logps.response_logps(model, packing.pack(trees))
        assert_same(model, found, expected)


def test_shared_prompts_give_the_plain_numbers_and_gradients(
    make_model: Callable[[int], Any], trees: list[Tree]
) -> None:
    model = make_model(3)
    expected = plain(model, trees)
    assert_same(model, logps.response_logps(model, packing.pad(trees, 0)), expected)
    with attention.packed(model):
        assert_same(model, logps.response_logps(model, packing.pack(trees)), expected)
    with attention.packed(model, attention.FLEX), torch.no_grad():  # a processor has no backward pass of it
        torch.testing.assert_close(logps.response_logps(model, packing.pack(trees)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain(model, trees), expected)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 64}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("phi", {"num_key_value_heads": 4}),
    ],
)
def test_families_that_share_prompts(
    kind: str, changes: dict[str, Any], architecture: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = architecture(kind, **changes)
    with packer(model, SMALL, 0) as pack:
        assert "layout" in pack(SMALL).inputs
        found = logps.response_logps(model, pack(SMALL))
    assert_same(model, found, plain(model, SMALL))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 4}, "with a window of 4"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "it caps attention's logits"),
        ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 4}, "with a window of 4"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "its attention cannot be replaced"),
    ],
)
def test_families_that_cannot_share_say_so_in_a_line_and_get_the_plain_numbers(
    kind: str,
    changes: dict[str, Any],
    reason: str,
    architecture: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = architecture(kind, **changes)
    with packer(model, SMALL, 0) as pack:
        found = logps.response_logps(model, pack(SMALL))
    said = capsys.readouterr().out
    assert reason in said
    assert said.count("\n") == 1
    assert_same(model, found, plain(model, SMALL))


def test_a_model_whose_logits_are_not_those_of_its_hidden_states_is_refused(make_model: Callable[[int], Any]) -> None:
    model = make_model(0)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 3)
    with pytest.raises(TpawError, match="LlamaForCausalLM: its log-probabilities cannot be made"):
        scoring.score(model, [([1, 2], [3])], pad_id=0)


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


def test_parts_hold_at_most_so_many_tokens_and_keep_the_order() -> None:
    parts = packing.split_by_tokens(SMALL * 2, lambda tree: tree, 14)
    assert [tree for part in parts for tree in part] == SMALL * 2
    assert [sum(map(packing.tokens, part)) for part in parts] == [14, 13, 11]
    assert [len(part) for part in packing.split_by_tokens(SMALL, lambda tree: tree, 1)] == [1, 1, 1]
