from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from tpaw_core.config.params import Generation
from tpaw_core.data.endings import Response
from tpaw_core.engine.generation import in_process, vllm
from tpaw_core.errors import TpawError

ROOT = Path(__file__).parents[1]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
Generate = Callable[..., list[Response]]


def settings(**changes: Any) -> Generation:
    return Generation(**{"temperature": 0.0, "max_new_tokens": 20, "batch_size": 5, **changes})


@pytest.fixture(scope="session")
def prompts(encoded: list[Any]) -> list[list[int]]:
    """Of many lengths, in no order of length."""
    return [e.prompt_ids[: 3 + 7 * number % 40] for number, e in enumerate(encoded)]


@pytest.fixture(scope="session")
def ending(make_model: Callable[[int], Any], prompts: list[list[int]], tokenizer: Any) -> Any:
    """A model that ends some answers itself: EOS's row of its output is raised towards the states it passes through."""
    model = make_model(4)
    with torch.inference_mode():
        states = model.model(torch.tensor([prompts[0]])).last_hidden_state[0]
        model.lm_head.weight[tokenizer.eos_token_id] = states.mean(0) * 0.45
    return model


@pytest.fixture
def generate(ending: Any, prompts: list[list[int]], tokenizer: Any) -> Generate:
    def run(
        max_length: int = 128, seed: int = 1, only: list[list[int]] | None = None, **changes: Any
    ) -> list[Response]:
        return in_process.generate(
            ending,
            prompts if only is None else only,
            settings(**changes),
            max_length=max_length,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
        )

    return run


def alone(model: Any, prompt: list[int], eos_id: int, pad_id: int) -> list[int]:
    """The greedy answer of transformers' own loop to one prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    ends = {"eos_token_id": eos_id, "pad_token_id": pad_id}
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, **ends)
    return out[0, len(prompt) :].tolist()


def test_greedy_answers_are_those_of_one_prompt_at_a_time(
    generate: Generate, ending: Any, prompts: list[list[int]], tokenizer: Any
) -> None:
    found = generate()
    for prompt, response in zip(prompts, found, strict=True):
        assert list(response.ids) == alone(ending, prompt, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_eos_is_kept_where_it_was_generated_and_added_nowhere(generate: Generate, tokenizer: Any) -> None:
    found = generate(temperature=1.0)
    assert {response.finish_reason for response in found} == {"stop", "length"}, "the model must do both"
    for response in found:
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
    """Sampled ones too: what a row draws depends on the seed and its place. Some rows must leave before others end."""
    sizes: list[int] = []
    choose = in_process._choose
    monkeypatch.setattr(
        generation, "_choose", lambda logits, *given: (sizes.append(len(logits)), choose(logits, *given))[1]
    )
    whole = generate(temperature=1.0, batch_size=100)
    assert sizes[0] == len(prompts)
    assert len(set(sizes)) > 2, "rows must leave"
    assert generate(temperature=1.0, batch_size=1) == whole
    assert generate(temperature=1.0, batch_size=7) == whole


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (1.0, 0.05)])
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_give(temperature: float, top_p: float) -> None:
    """Against transformers' own warpers: frequencies of 20,000 draws within five standard errors."""
    logits = torch.tensor([1.0, 3.0, -2.0, 2.5, 2.5, 0.0, -float("inf"), 1.5])
    warpers = [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]
    expected = LogitsProcessorList(warpers)(torch.empty(1, 0), logits[None]).softmax(-1)[0].double()
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = in_process._choose(logits.expand(len(draws), -1), draws, settings(temperature=temperature, top_p=top_p))
    found = tokens.bincount(minlength=len(logits)) / len(draws)
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / len(draws)).sqrt()).all()
    assert not found[expected == 0].any()


def test_the_ends_of_the_range_of_chances_are_tokens_that_can_be_drawn() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]] * 2)
    chance = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert in_process._choose(logits, chance, settings(temperature=1.0)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 4}),
        ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 4}),
        ("phi", {"num_key_value_heads": 4}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_families_give_the_greedy_answers_of_their_own_loop(
    kind: str, changes: dict[str, Any], architecture: Callable[..., Any]
) -> None:
    model = architecture(kind, **changes)
    prompts = [[3 + (7 * n + k) % 60 for k in range(1 + n % 9)] for n in range(12)]
    found = in_process.generate(model, prompts, settings(), max_length=64, eos_id=2, pad_id=0, seed=1)
    for prompt, response in zip(prompts, found, strict=True):
        assert list(response.ids) == alone(model, prompt, eos_id=2, pad_id=0)


def test_a_low_temperature_and_a_low_top_p_come_close_to_greedy(generate: Generate) -> None:
    greedy = generate()
    assert generate(temperature=1e-4) == greedy
    assert generate(temperature=1.0, top_p=1e-4) == greedy
    assert generate(temperature=1.0) != greedy


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
    own: dict[str, Any], generate: Generate, ending: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pi_{t-1} itself is sampled: a released model's generation_config.json is for chatting with it."""
    expected = generate()
    monkeypatch.setattr(ending, "generation_config", copy.deepcopy(ending.generation_config))
    ending.generation_config.update(**own, do_sample=True, temperature=0.7, top_k=20)
    assert generate() == expected


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_no_answer_exceeds_what_its_own_prompt_leaves_of_max_length(
    batch_size: int, generate: Generate, prompts: list[list[int]]
) -> None:
    unlimited = generate(batch_size=1)
    max_length = max(map(len, prompts)) + 2
    found = generate(max_length=max_length, batch_size=batch_size)
    for prompt, response, whole in zip(prompts, found, unlimited, strict=True):
        room = min(20, max_length - len(prompt))
        assert response.ids == whole.ids[:room]
        assert response.finish_reason == (whole.finish_reason if len(whole.ids) <= room else "length")


@pytest.mark.parametrize(
    ("ids", "room", "expected"),
    [
        ([5, 1, 0, 0], 9, ([5, 1], "stop")),
        ([5, 6], 2, ([5, 6], "length")),
        ([5, 6, 1], 2, ([5, 6], "length")),
        ([5, 1], 2, ([5, 1], "stop")),
        ([1], 1, ([1], "stop")),
    ],
)
def test_what_follows_eos_is_padding_and_what_exceeds_the_room_was_never_allowed(
    ids: list[int], room: int, expected: tuple[list[int], str]
) -> None:
    found = in_process._cut(ids, eos_id=1, room=room)
    assert (list(found.ids), found.finish_reason) == expected


def vllm(model: Path, prompts: list[list[int]], eos_id: int, python: str | None) -> list[Response]:
    return vllm.generate_vllm(
        model, prompts, settings(python=python), max_length=128, eos_id=eos_id, seed=1, dtype="float32"
    )


def test_an_interpreter_that_does_not_exist_is_named(workspace_folder: Path) -> None:
    for python, name in ((None, ".venv-vllm/bin/python"), ("/nowhere/python", "/nowhere/python")):
        with pytest.raises(TpawError, match=rf"generation\.python '{name}': no such interpreter; `make vllm`"):
            vllm(workspace_folder, [[1]], 1, python)


@pytest.mark.parametrize("python", ["/bin/false", "/bin/true"])
def test_an_interpreter_that_fails_or_answers_nothing_is_an_error(python: str, tmp_path: Path) -> None:
    with pytest.raises(TpawError, match=rf"vllm \({python}\) ended with status [01]; its own message is above"):
        vllm(tmp_path, [[1]], 1, python)


@pytest.mark.vllm
def test_vllm_generates_what_transformers_generates(
    ending: Any, encoded: list[Any], tokenizer: Any, save_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    assert VLLM_PYTHON.exists(), "`make vllm` makes the interpreter that this test needs"
    save_checkpoint(ending, tmp_path / "0")
    prompts = [e.prompt_ids[: 3 + 7 * number % 40] for number, e in enumerate(encoded * 3)]
    assert len(prompts) >= 64
    expected = in_process.generate(
        ending,
        prompts,
        settings(batch_size=1),
        max_length=128,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=1,
    )
    assert {response.finish_reason for response in expected} == {"stop", "length"}, "the model must do both"
    assert vllm(tmp_path / "0", prompts, tokenizer.eos_token_id, str(VLLM_PYTHON)) == expected
