from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tpaw_core.engine import suitability
from tpaw_core.errors import TpawError

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
OPT = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPT |= {"word_embed_proj_dim": 16, "max_position_embeddings": 64}


def model(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"llama": LLAMA, "phi3": LLAMA, "opt": OPT}.get(kind, GPT2)
    config = AutoConfig.for_model(kind, **{**sizes, "pad_token_id": 0, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer(words: int = 32, template: Any = PLAIN) -> Any:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"word{n}": n for n in range(2, words)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=template,
    )


def reasons(own: Any, words: Any = None, max_length: int = 64) -> list[str]:
    return list(suitability.reasons(own, words or tokenizer(), max_length=max_length, pad_id=0))


def test_a_model_that_fits_has_no_reason_against_it() -> None:
    suitability.require(model(), tokenizer(), max_length=64, pad_id=0)
    assert reasons(model(), max_length=6400) == []  # rotary positions have no last one


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt2", {}, r"it has 64 positions \(transformer\.wpe\.weight\)"),
        ("opt", {}, r"it has 64 positions \(model\.decoder\.embed_positions\.weight\)"),
        ("ctrl", {"dff": 16}, r"it has 64 positions \(transformer\.pos_encoding\)"),
        ("gptj", {"rotary_dim": 4}, r"it has 64 positions \(transformer\.h\.0\.attn\.embed_positions\)"),
        ("mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64}, r"it has 64 positions \(max_seq_len"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"it scales RoPE \(dynamic\): one text",
        ),
        (
            "phi3",
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4},
            },
            r"it scales RoPE \(longrope\): one text",
        ),
    ],
)
def test_positions_that_do_not_reach_max_length(kind: str, changes: dict[str, Any], reason: str) -> None:
    own = model(kind, **changes)
    assert reasons(own, max_length=64) == []
    with pytest.raises(TpawError, match=rf"model\.max_length is 65, but {reason}.*; set .*=64 or lower"):
        suitability.require(own, tokenizer(), max_length=65, pad_id=0)


def test_tokens_without_an_embedding_are_counted_and_named() -> None:
    (reason,) = reasons(model(), tokenizer(34))
    assert reason.startswith(
        "2 tokens of its tokenizer have no embedding (the embedding has 32 rows; 'word32' is 32, 'word33' is 33); "
        "add rows with resize_token_embeddings(34)"
    )


def test_a_model_without_weights_to_train() -> None:
    (reason,) = reasons(model().requires_grad_(False))
    assert reason.startswith("it has no weights that can be trained")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "its tokenizer has no chat template; set one in model.chat_template"),
        ({"rag": PLAIN, "tool_use": PLAIN}, r"several chat templates (rag, tool_use) and none is named default"),
        ("{% for m in messages %}\n{{ m['content' }}", "is not valid Jinja (line 2:"),
        ("{{ messages | shout }}", "is not valid Jinja (line 1: No filter named 'shout'"),
    ],
)
def test_chat_templates_that_cannot_be_used(template: Any, reason: str) -> None:
    (found,) = reasons(model(), tokenizer(template=template))
    assert reason in found
    assert "model.chat_template" in found


def test_a_template_that_refuses_a_conversation_is_left_to_the_rows() -> None:
    assert reasons(model(), tokenizer(template="{{ raise_exception('a system turn must come first') }}")) == []


def test_every_reason_is_listed_at_once() -> None:
    found = reasons(model("gpt2"), tokenizer(40, template=None), max_length=100)
    assert [reason.split()[:3] for reason in found] == [
        ["its", "tokenizer", "has"],
        ["8", "tokens", "of"],
        ["model.max_length", "is", "100,"],
    ]


def test_structure_is_read_without_weights() -> None:
    with torch.device("meta"):
        own = model("gpt2")
    assert len(list(suitability.of_structure(own, tokenizer(40), 100))) == 2


def _nan(own: Any) -> None:
    own.lm_head.weight.data.fill_(float("nan"))


def _broken(own: Any) -> None:
    own.model.layers[0].mlp.forward = lambda states: states[..., :3]


def _reversed(own: Any) -> None:
    """Looks at later tokens."""
    forward = own.model.layers[0].mlp.forward
    own.model.layers[0].mlp.forward = lambda states: forward(states) + states.mean(1, keepdim=True)


def test_a_config_that_contradicts_itself_is_a_sentence() -> None:
    """Zamba2's hybrid layers come from another key than layer_types, which then names a layer that is not made."""
    layers = {"num_hidden_layers": 2, "layer_types": ["mamba", "hybrid"], "head_dim": 16}
    own = model("zamba2", **{**LLAMA, **layers, "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_d_state": 8})
    (reason,) = reasons(own)
    assert reason.startswith("Zamba2ForCausalLM fails on a short test input (KeyError: 1); correct its config.json, or")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_nan, "its log-probabilities in float32 are not numbers"),
        (_broken, "LlamaForCausalLM fails on a short test input (RuntimeError:"),
        (_reversed, "decoding token by token differs from its plain forward pass"),
    ],
)
def test_behaviour_that_cannot_be_used(damage: Callable[[Any], None], reason: str) -> None:
    own = model()
    damage(own)
    (found,) = reasons(own)
    assert reason in found
