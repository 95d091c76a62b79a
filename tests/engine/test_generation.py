from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from tests.support.rows import eos_ending
from tpaw_core.config.params import Generation
from tpaw_core.data.endings import Ending, Response
from tpaw_core.engine.generation import choice, in_process, way
from tpaw_core.errors import TpawError

Generate = Callable[..., list[Response]]


def settings(**changes: Any) -> Generation:
    return Generation(**{"temperature": 0.0, "max_new_tokens": 20, "batch_size": 5, **changes})


@pytest.fixture(scope="session")
def prompts(encoded: list[Any]) -> list[list[int]]:
    """Of many lengths, in no order of length."""
    return [e.prompt_ids[: 3 + 7 * number % 40] for number, e in enumerate(encoded)]


@pytest.fixture(scope="session")
def stopping(make_model: Callable[[int], Any], prompts: list[list[int]], tokenizer: Any) -> Any:
    """A model that ends some answers itself: EOS's row of its output is raised towards the states it passes through."""
    model = make_model(4)
    with torch.inference_mode():
        states = model.model(torch.tensor([prompts[0]])).last_hidden_state[0]
        model.lm_head.weight[tokenizer.eos_token_id] = states.mean(0) * 0.45
    return model


@pytest.fixture
def generate(stopping: Any, prompts: list[list[int]], tokenizer: Any) -> Generate:
    def run(max_length: int = 128, seed: int = 1, **changes: Any) -> list[Response]:
        return in_process.generate(
            stopping,
            prompts,
            settings(**changes),
            max_length=max_length,
            ending=eos_ending(tokenizer),
            pad_id=tokenizer.pad_token_id,
            seed=seed,
        )

    return run


def of_family(model: Any, prompts: list[list[int]], **changes: Any) -> list[Response]:
    own, ending = settings(**changes), Ending(2, (2,))
    return in_process.generate(model, prompts, own, max_length=64, ending=ending, pad_id=0, seed=1)


def alone(model: Any, prompt: list[int], eos_id: int = 2, pad_id: int = 0) -> list[int]:
    """The greedy answer of transformers' own loop to one prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    ends = {"eos_token_id": eos_id, "pad_token_id": pad_id}
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, **ends)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def plain(model: Any, prompt: list[int]) -> list[int]:
    """The greedy answer without a cache: one forward pass over the whole text per token."""
    ids = list(prompt)
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


def use(chosen: way.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way, "find", lambda *_: chosen)


def test_greedy_answers_are_those_of_one_prompt_at_a_time(
    generate: Generate, stopping: Any, prompts: list[list[int]], tokenizer: Any
) -> None:
    for prompt, response in zip(prompts, generate(), strict=True):
        assert list(response.ids) == alone(stopping, prompt, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_eos_is_kept_where_it_was_generated_and_added_nowhere(generate: Generate, tokenizer: Any) -> None:
    responses = generate(temperature=1.0)
    assert {response.finish_reason for response in responses} == {"stop", "length"}, "the model must do both"
    for response in responses:
        if response.finish_reason == "stop":
            assert response.ids.index(tokenizer.eos_token_id) == len(response.ids) - 1
        else:
            assert tokenizer.eos_token_id not in response.ids
            assert len(response.ids) == 20


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(generate: Generate) -> None:
    first = generate(temperature=1.0, seed=7)
    assert generate(temperature=1.0, seed=7) == first
    assert generate(temperature=1.0, seed=8) != first
    assert generate(seed=7) == generate(seed=8), "greedy answers know no seed"


def test_neither_batches_nor_rows_that_left_change_an_answer(
    generate: Generate, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled ones too: what a row draws depends on the seed and its index. Some rows must leave before others end."""
    use(way.FAST, monkeypatch)
    sizes: list[int] = []
    token = choice.token
    monkeypatch.setattr(choice, "token", lambda logits, *given: (sizes.append(len(logits)), token(logits, *given))[1])
    whole = generate(temperature=1.0, batch_size=100)
    assert sizes[0] == len(prompts)
    assert len(set(sizes)) > 2, "rows must leave"
    assert generate(temperature=1.0, batch_size=1) == whole
    assert generate(temperature=1.0, batch_size=7) == whole


@pytest.mark.parametrize("other", [way.PADDED, way.UNPADDED, way.UNCACHED], ids=lambda other: other.name)
@pytest.mark.parametrize(
    "changes",
    [pytest.param({"temperature": 1.0}, marks=pytest.mark.slow), {"temperature": 0.7, "top_p": 0.8}],
    ids=str,
)
def test_every_way_gives_the_same_answers(
    other: way.Way, changes: dict[str, float], generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(**changes)
    use(other, monkeypatch)
    assert generate(**changes, batch_size=100) == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (1.0, 0.05)])
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_give(temperature: float, top_p: float) -> None:
    """Against transformers' own warpers: frequencies of 20,000 draws within five standard errors."""
    logits = torch.tensor([1.0, 3.0, -2.0, 2.5, 2.5, 0.0, -float("inf"), 1.5])
    warpers = [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]
    expected = LogitsProcessorList(warpers)(torch.empty(1, 0), logits[None]).softmax(-1)[0].double()
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = choice.token(logits.expand(len(draws), -1), draws, settings(temperature=temperature, top_p=top_p))
    frequencies = tokens.bincount(minlength=len(logits)) / len(draws)
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / len(draws)).sqrt()).all()
    assert not frequencies[expected == 0].any()


def test_the_ends_of_the_range_of_chances_are_tokens_that_can_be_drawn() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]] * 2)
    chance = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choice.token(logits, chance, settings(temperature=1.0)).tolist() == [1, 2]


MAMBA2 = {"n_groups": 1, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "chunk_size": 16}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
GRIFFIN = {"lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"]}
FAMILIES: list[tuple[str, dict[str, Any], way.Way]] = [
    ("llama", {}, way.FAST),
    ("qwen2", {}, way.FAST),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, way.FAST),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, way.FAST),
    ("mistral", {"sliding_window": 4}, way.FAST),
    ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 4}, way.FAST),
    ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 4}, way.FAST),
    ("phi", {"num_key_value_heads": 4}, way.FAST),
    ("bloom", {"n_layer": 2, "n_head": 4}, way.FAST),
    ("mamba", {"state_size": 4, "intermediate_size": 64}, way.PADDED),
    ("mamba2", MAMBA2, way.PADDED),
    ("jamba", {"num_experts": 2, "num_experts_per_tok": 1, **JAMBA}, way.PADDED),
    ("falcon_h1", {"mamba_n_groups": 1, **FALCON_H1}, way.PADDED),
    ("recurrent_gemma", GRIFFIN, way.UNPADDED),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), FAMILIES, ids=[kind for kind, *_ in FAMILIES])
def test_families_give_the_greedy_answers_of_transformers_own_loop(
    kind: str,
    changes: dict[str, Any],
    expected: way.Way,
    architecture: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = architecture(kind, **changes)
    prompts = [[3 + (7 * n + k) % 60 for k in range(2 + n % 9)] for n in range(12)]
    responses = of_family(model, prompts)
    for prompt, response in zip(prompts, responses, strict=True):
        assert list(response.ids) == alone(model, prompt)
    line = f"{type(model).__name__}: decoded by {expected.name}, because its cache holds recurrent states"
    assert (line in caplog.text) == (expected is not way.FAST)
    assert of_family(model, prompts, temperature=1.0) == of_family(model, prompts, temperature=1.0, batch_size=100)


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("rwkv", {}, "RwkvForCausalLM: decoded by transformers' generate without a cache, because"),
        ("recurrent_gemma", GRIFFIN, "RecurrentGemmaForCausalLM: decoded by transformers' generate in batches of"),
        (
            "mamba",
            {"state_size": 4, "intermediate_size": 64},
            "MambaForCausalLM: decoded by transformers' generate, because",
        ),
    ],
)
def test_caches_that_cannot_be_trusted_are_not_used(
    kind: str,
    changes: dict[str, Any],
    line: str,
    architecture: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RWKV's states are wrong in batches; RecurrentGemma's outlive `generate` and enter a prompt of one token."""
    model = architecture(kind, **changes)
    prompts = [[5, 6, 7], [8], [9, 10, 11], [12]]
    for _ in range(2):
        responses = of_family(model, prompts, batch_size=1)
        assert [list(response.ids) for response in responses] == [plain(model, prompt) for prompt in prompts]
    assert caplog.text.count(line) == 2


def test_a_model_whose_logits_depend_on_what_follows_is_refused(architecture: Callable[..., Any]) -> None:
    """Phi-3 rotates positions in another way where the whole text is longer than its original length, here 4."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4, **factors}
    model = architecture(
        "phi3", max_position_embeddings=64, original_max_position_embeddings=4, rope_parameters=scaling
    )
    with pytest.raises(TpawError, match="Phi3ForCausalLM: this model is not supported: decoding token by token"):
        of_family(model, [[5, 6]])


def test_the_probe_leaves_no_trace(stopping: Any) -> None:
    state, own = torch.get_rng_state(), stopping.generation_config
    stopping.train()
    try:
        assert way.find(stopping, 0) is way.FAST
        assert stopping.training
    finally:
        stopping.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert stopping.generation_config is own
    assert all(parameter.grad is None for parameter in stopping.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_allows_for_the_precision_of_a_model(dtype: torch.dtype, make_model: Callable[[int], Any]) -> None:
    model = make_model(1).to(dtype)
    assert way.find(model, 0) is way.FAST
    with torch.autocast("cpu", torch.bfloat16):
        assert way.find(model, 0) is way.FAST


def test_a_low_temperature_and_a_low_top_p_come_close_to_greedy(generate: Generate) -> None:
    greedy = generate()
    assert generate(temperature=1e-4) == greedy
    assert generate(temperature=1.0, top_p=1e-4) == greedy
    assert generate(temperature=1.0) != greedy


@pytest.mark.parametrize("chosen", [way.FAST, way.PADDED], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"suppress_tokens": [40, 50, 60]},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 20},
    ],
    ids=lambda own: next(iter(own)),
)
def test_generation_settings_that_came_with_a_model_do_not_bend_its_answers(
    own: dict[str, Any], chosen: way.Way, generate: Generate, stopping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pi_{t-1} itself is sampled: a released model's generation_config.json is for chatting with it."""
    expected = generate()
    use(chosen, monkeypatch)
    monkeypatch.setattr(stopping, "generation_config", copy.deepcopy(stopping.generation_config))
    stopping.generation_config.update(**own, do_sample=True, temperature=0.7, top_k=20)
    assert generate() == expected
    assert stopping.generation_config.top_k == 20, "they are still the model's"


@pytest.mark.parametrize("chosen", [way.FAST, way.PADDED], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_no_answer_exceeds_what_its_own_prompt_leaves_of_max_length(
    batch_size: int,
    chosen: way.Way,
    generate: Generate,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlimited = generate(batch_size=1)
    use(chosen, monkeypatch)
    max_length = max(map(len, prompts)) + 2
    responses = generate(max_length=max_length, batch_size=batch_size)
    for prompt, response, whole in zip(prompts, responses, unlimited, strict=True):
        room = min(20, max_length - len(prompt))
        assert response.ids == whole.ids[:room]
        assert response.finish_reason == (whole.finish_reason if len(whole.ids) <= room else "length")
