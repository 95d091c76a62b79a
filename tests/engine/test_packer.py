from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.groups import SMALL, assert_same
from tests.support.reference import group_logps
from tpaw_core.engine import logps
from tpaw_core.engine.packer import packer
from tpaw_core.errors import TpawError


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
    kind: str, changes: dict[str, Any], architecture: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = architecture(kind, **changes)
    with packer(model, SMALL, 0) as pack:
        assert "layout" in pack(SMALL).inputs
        found = logps.response_logps(model, pack(SMALL))
    assert_same(model, found, group_logps(model, SMALL))
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 4}, "with a window of 4"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "it soft-caps attention logits"),
        ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 4}, "with a window of 4"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "its attention cannot be replaced"),
    ],
)
def test_families_that_cannot_share_say_so_in_a_line_and_get_the_plain_numbers(
    kind: str,
    changes: dict[str, Any],
    reason: str,
    architecture: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = architecture(kind, **changes)
    with packer(model, SMALL, 0) as pack:
        found = logps.response_logps(model, pack(SMALL))
    (said,) = caplog.messages
    assert reason in said
    assert "\n" not in said
    assert_same(model, found, group_logps(model, SMALL))


def tripled(model: Any) -> Any:
    """What no config tells: its logits are three times its output projection's."""
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 3)
    return model


def capped(model: Any) -> Any:
    model.config.output_softcap = 30.0
    return model


@pytest.mark.parametrize("change", [tripled, capped])
def test_a_head_that_is_not_known_is_computed_by_the_model_itself(
    change: Callable[[Any], Any], architecture: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = change(architecture("llama"))
    with packer(model, SMALL, 0) as pack:
        packed = pack(SMALL)
        found = logps.response_logps(model, packed)
    assert "layout" in packed.inputs  # prompts are shared all the same
    assert "computing full logits, which takes more memory" in caplog.text
    assert_same(model, found, group_logps(model, SMALL))


def test_a_known_head_is_not(architecture: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with packer(architecture("llama"), SMALL, 0) as pack:
        assert not pack(SMALL).by_logits
    assert caplog.text == ""


def test_log_probabilities_that_are_not_numbers_are_refused(architecture: Callable[..., Any]) -> None:
    model = architecture("llama")
    model.lm_head.weight.data[7] = float("inf")
    with pytest.raises(TpawError, match="LlamaForCausalLM: its log-probabilities in float32 are not numbers; set"):
        packer(model, SMALL, 0).__enter__()
