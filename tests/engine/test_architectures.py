"""Scoring, greedy answers, SFT's first loss and self-play's first step of every family, by the family's own forward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Generation, Objective
from tpaw_core.data.endings import Ending
from tpaw_core.engine import scoring, suitability
from tpaw_core.engine.generation import in_process
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group

WORDS, LENGTH, STEPS = 48, 40, 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
OPT = {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": LENGTH, "word_embed_proj_dim": 32}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"sliding_window": 5}
GEMMA = {"query_pre_attn_scalar": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama, tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "llama, yarn": (
        "llama",
        SIZES | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "qwen2, sliding": ("qwen2", SIZES | SLIDING | {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen2_moe": ("qwen2_moe", SIZES | SHARED),
    "qwen3": ("qwen3", SIZES),
    "qwen3_moe": ("qwen3_moe", SIZES | EXPERTS | {"decoder_sparse_step": 1}),
    "qwen3_next": ("qwen3_next", SIZES | SHARED | DELTA),
    "qwen3_5": ("qwen3_5_text", SIZES | DELTA),
    "mistral": ("mistral", SIZES | SLIDING),
    "mixtral": ("mixtral", SIZES | {"num_local_experts": 4}),
    "gemma": ("gemma", SIZES),
    "gemma2": ("gemma2", SIZES | GEMMA | SLIDING),
    "gemma3": ("gemma3_text", SIZES | GEMMA | SLIDING),
    "gemma3, wide": ("gemma3_text", SIZES | GEMMA | {"sliding_window": 64}),
    "gemma4": (
        "gemma4_text",
        SIZES | SLIDING | {"vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8},
    ),
    "phi": ("phi", SIZES | {"num_key_value_heads": 4}),
    "phi3": ("phi3", SIZES | {"sliding_window": None, "original_max_position_embeddings": LENGTH}),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": LENGTH}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "gpt_neox": ("gpt_neox", SIZES),
    "opt": ("opt", OPT),
    "opt, projected": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("bloom", BLOOM),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH}),
    "falcon": ("falcon", FALCON),
    "falcon, alibi": ("falcon", FALCON | {"alibi": True}),
    "xglm": (
        "xglm",
        {"d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": LENGTH},
    ),
    "biogpt": ("biogpt", SIZES),
    "starcoder2": ("starcoder2", SIZES | {"sliding_window": None}),
    "stablelm": ("stablelm", SIZES),
    "olmo2": ("olmo2", SIZES),
    "olmo3": ("olmo3", SIZES | SLIDING),
    "cohere": ("cohere", SIZES | {"logit_scale": 0.25}),
    "granite": ("granite", SIZES | {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "hyperclovax": ("hyperclovax", SIZES | {"logits_scaling": 4.0}),  # multiplies where Granite divides
    "nanochat": ("nanochat", SIZES | {"num_key_value_heads": 4, "final_logit_softcapping": 2.0}),
    "smollm3": ("smollm3", SIZES),
    "gpt_oss": ("gpt_oss", SIZES | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", SIZES | LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", SIZES | LATENT | {"q_lora_rank": 16, "first_k_dense_replace": 1}),
    "glm4": ("glm4", SIZES),
    "exaone4": ("exaone4", SIZES | SLIDING),
    "nemotron": ("nemotron", SIZES),
    "llama4": ("llama4_text", SIZES | {"num_local_experts": 2, "attention_chunk_size": 5, "intermediate_size_mlp": 40}),
    "minimax": ("minimax", SIZES | {"num_local_experts": 2}),
    "mamba": ("mamba", MAMBA),
    "mamba2": (
        "mamba2",
        MAMBA | {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
    ),
    "falcon_h1": ("falcon_h1", SIZES | SSM | {"mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.5}),
    "bamba": ("bamba", SIZES | SSM | {"attn_layer_indices": [1]}),
    "jamba": (
        "jamba",
        SIZES
        | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        SIZES
        | SSM
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16}
        | {"layer_types": ["mamba", "attention"]},
    ),
    "lfm2": ("lfm2", SIZES | {"full_attn_idxs": [1], "block_ff_dim": 40, "conv_L_cache": 3}),
    "recurrent_gemma": (
        "recurrent_gemma",
        SIZES | {"lru_width": 32, "attention_window_size": 5, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 7, "context_length": LENGTH}),
}

PROMPTS = [[3 + (7 * n + k) % 40 for k in range(1 + 5 * n % 9)] for n in range(5)]
TARGETS = [[5 + (11 * n + 3 * k) % 40 for k in range(1 + 3 * n % 7)] for n in range(5)]
PAIRS = [*zip(PROMPTS, TARGETS, strict=True), *zip(PROMPTS, [*TARGETS[1:], TARGETS[0]], strict=True)]


def make(kind: str, changes: dict[str, Any], *, dropout: bool = False) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, vocab_size=WORDS, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)
    for name in [name for name in vars(config) if not dropout and re.search("dropout|pdrop", name)]:
        setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"word{n}": n for n in range(3, WORDS)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def plain_score(model: Any, prompt: list[int], response: list[int]) -> float:
    values = logits(model, [*prompt, *response]).log_softmax(-1)
    return sum(values[len(prompt) + place - 1, token].item() for place, token in enumerate(response))


def plain_answer(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(STEPS):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def until(answer: list[int], stops: tuple[int, ...]) -> list[int]:
    return answer[: next((place + 1 for place, token in enumerate(answer) if token in stops), STEPS)]


def settings(**changes: Any) -> Optimisation:
    sizes = {"train_batch_size": len(PAIRS), "logging_steps": 1, "save_steps": 100, "num_train_epochs": 1}
    return Optimisation.model_validate({"learning_rate": 1e-4, "bf16": False, **sizes, **changes})


def play(model: Any, state: Path, **changes: Any) -> dict[str, float]:
    """The log of self-play's first step, against the model itself."""
    scores = scoring.score(model, PAIRS, pad_id=0)
    groups = [
        Group(prompt, chosen, [PAIRS[len(PROMPTS) + row][1]], [scores[row]], [[scores[len(PROMPTS) + row]]], [[1.0]])
        for row, (prompt, chosen) in enumerate(PAIRS[: len(PROMPTS)])
    ]
    return loop.self_play(
        model, groups, Objective(), settings(**changes), pad_id=0, seed=1, state=state, on_log=lambda *_: None
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gets_the_numbers_of_its_own_forward_pass(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = make(*FAMILIES[family])
    assert list(suitability.reasons(model, tokenizer, max_length=LENGTH, pad_id=0)) == []

    expected = [plain_score(model, *pair) for pair in PAIRS]
    assert scoring.score(model, PAIRS, pad_id=0) == pytest.approx(expected, rel=1e-5, abs=1e-4)

    free = [plain_answer(model, prompt) for prompt in PROMPTS]
    stops = (2, free[0][3], free[1][1], free[4][5])  # so that rows leave at different steps
    answers = in_process.generate(
        model,
        PROMPTS,
        Generation(temperature=0.0, max_new_tokens=STEPS, batch_size=4),
        max_length=LENGTH,
        ending=Ending(2, stops),
        pad_id=0,
        seed=1,
    )
    assert [list(answer.ids) for answer in answers] == [until(answer, stops) for answer in free]

    able = model.supports_gradient_checkpointing
    step = play(model, tmp_path / "play", activation_checkpointing=able)
    assert step["rewards/chosen"] == 0
    assert step["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert step["grad_norm"] > 0

    model = make(*FAMILIES[family])
    log = loop.sft(
        model, PAIRS, settings(activation_checkpointing=able), pad_id=0, seed=1, state=tmp_path, on_log=lambda *_: None
    )
    tokens = sum(len(response) for _, response in PAIRS)
    assert log[0]["loss"] == pytest.approx(-sum(expected) / tokens, abs=1e-4)
