from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support.reference import pair_logp
from tpaw_core.data.tokens import Pair
from tpaw_core.engine import scoring


@pytest.fixture
def pairs(encoded: list[Any]) -> list[Pair]:
    """Rows of many lengths, one of them with a response of one token."""
    short = encoded[0].prompt_ids[:5], encoded[0].chosen_ids[:1]
    return [short, *((e.prompt_ids, e.chosen_ids) for e in encoded[:8])]


def test_scores_equal_a_plain_loop_over_tokens(model: Any, tokenizer: Any, pairs: list[Pair]) -> None:
    expected = [pair_logp(model, pair) for pair in pairs]
    assert scoring.score(model, pairs, pad_id=tokenizer.pad_token_id) == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.parametrize("batch_tokens", [1, 200, 450, 100_000])
def test_neither_batching_nor_padding_nor_order_changes_a_score(
    model: Any, tokenizer: Any, pairs: list[Pair], batch_tokens: int
) -> None:
    alone = [scoring.score(model, [pair], pad_id=tokenizer.pad_token_id)[0] for pair in pairs]
    order = random.Random(batch_tokens).sample(range(len(pairs)), len(pairs))
    found = scoring.score(model, [pairs[i] for i in order], pad_id=tokenizer.eos_token_id, batch_tokens=batch_tokens)
    assert found == pytest.approx([alone[i] for i in order], abs=1e-4, rel=0)


def test_where_the_prompt_ends_decides_what_is_scored(model: Any, tokenizer: Any, pairs: list[Pair]) -> None:
    prompt, response = pairs[1]
    whole, first, rest = scoring.score(
        model,
        [(prompt, response), (prompt, response[:3]), ([*prompt, *response[:3]], response[3:])],
        pad_id=tokenizer.pad_token_id,
    )
    assert whole == pytest.approx(first + rest, abs=1e-4)
    assert whole < first < 0


def test_a_response_that_holds_the_pad_token_is_scored_in_full(model: Any, tokenizer: Any, pairs: list[Pair]) -> None:
    prompt, response = pairs[1][0], [*pairs[1][1], tokenizer.pad_token_id]
    found = scoring.score(model, [(prompt, response), pairs[3]], pad_id=tokenizer.pad_token_id)
    assert found[0] == pytest.approx(pair_logp(model, (prompt, response)), abs=1e-4)


def test_bfloat16_scores_are_close_and_come_back_in_the_order_given(
    model: Any, tokenizer: Any, pairs: list[Pair]
) -> None:
    exact = scoring.score(model, pairs, pad_id=tokenizer.pad_token_id)
    rounded = scoring.score(model, pairs, pad_id=tokenizer.pad_token_id, bf16=True)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
