from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.rows import encode_rows, eos_ending
from tests.support.templates import THINKING, row
from tests.support.templates import make as make_tokenizer
from tpaw_core.config.params import Evaluation, Generation
from tpaw_core.data import encoding, turns
from tpaw_core.data.rows import Row
from tpaw_core.engine.generation import in_process, way
from tpaw_core.errors import TpawError
from tpaw_core.evaluation import harness
from tpaw_core.evaluation.answers import OWN, Heldout


def settings(**changes: Any) -> Evaluation:
    return Evaluation(**{"max_new_tokens": 8, "batch_size": 3, "answer_pattern": r"#### (\d+)", **changes})


@pytest.fixture
def asked(make_model: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[list[int]]]:
    """A model, and the prompts' ids, without pads, that it was really asked to answer."""
    model, seen = make_model(0), []
    forward = model.forward

    def listen(input_ids: Any, attention_mask: Any, **options: Any) -> Any:
        if not seen or input_ids.shape[1] > 1:  # the first step of a batch: later ones are one token each
            seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(way, "find", lambda *_: way.FAST)  # it asks questions of its own
    monkeypatch.setattr(model, "forward", listen)
    return model, seen


def run(model: Any, tokenizer: Any, rows: list[Row], max_length: int = 128, **changes: Any) -> harness.Results:
    own = settings(**changes)
    given = {task: rows for task in own.tasks if task in OWN}
    return evaluate(model, tokenizer, given, own, max_length)


def evaluate(
    model: Any, tokenizer: Any, given: dict[str, list[Row]], own: Evaluation, max_length: int = 128
) -> harness.Results:
    held = {task: Heldout(rows, encode_rows(rows, tokenizer, max_length=max_length)) for task, rows in given.items()}
    ending, pad = eos_ending(tokenizer), tokenizer.pad_token_id
    return harness.evaluate(
        model, tokenizer, held, own, ending=ending, pad_id=pad, max_length=max_length, seed=1, template_options={}
    )


@pytest.fixture
def answered(model: Any, tokenizer: Any, rows: list[Row]) -> list[Row]:
    """Five held-out rows; by their pattern the model answers rows 1 and 3 as their targets do."""
    prompts = encode_rows(rows[:5], tokenizer).prompts
    greedy = Generation(temperature=0, max_new_tokens=8)
    ending, pad = eos_ending(tokenizer), tokenizer.pad_token_id
    found = in_process.generate(model, prompts, greedy, max_length=128, ending=ending, pad_id=pad, seed=1)
    texts = [tokenizer.decode(response.ids, skip_special_tokens=True) for response in found]
    return [
        Row(row.prompt_id, row.prompt, text if number in (1, 3) else f"not{text}")
        for number, (row, text) in enumerate(zip(rows, texts, strict=False))
    ]


WHOLE = r"(?s)^(.+)$"


def test_the_primary_figure_is_the_share_of_right_answers_with_its_standard_error(
    model: Any, tokenizer: Any, answered: list[Row]
) -> None:
    found = run(model, tokenizer, answered, answer_pattern=WHOLE)
    assert found.primary.model_dump() == {
        "benchmark": "heldout",
        "metric": "exact_match",
        "value": pytest.approx(2 / 5),
        # The mean's: the sample variance of 1, 1, 0, 0, 0 is 0.3, over five rows.
        "stderr": pytest.approx(math.sqrt(0.3 / 5)),
        "n": 5,
    }
    assert [sample.correct for sample in found.samples] == [0, 1, 0, 1, 0]
    assert [sample.target for sample in found.samples] == [row.completion for row in answered]
    assert found.samples[1].completion == answered[1].completion
    assert found.samples[0].prompt == answered[0].prompt[0]["content"]
    assert found.benchmarks["heldout"]["n"] == 5


def test_answers_are_the_ones_of_transformers_own_greedy_generation(
    model: Any, tokenizer: Any, rows: list[Row]
) -> None:
    found = run(model, tokenizer, rows[:5])
    for prompt, sample in zip(encode_rows(rows[:5], tokenizer).prompts, found.samples, strict=True):
        ids = torch.tensor([list(prompt)])
        answer = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
        assert sample.completion == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def test_validation_rows_are_a_benchmark_of_their_own(model: Any, tokenizer: Any, answered: list[Row]) -> None:
    own = settings(answer_pattern=WHOLE, tasks=["heldout", "validation"])
    given = {"heldout": answered, "validation": answered[1:2]}
    found = evaluate(model, tokenizer, given, own)
    assert (found.primary.value, found.primary.n) == (2 / 5, 5)
    assert found.benchmarks["validation"]["n"] == 1
    assert found.benchmarks["validation"]["exact_match,answer"] == 1
    assert len(found.samples) == 5


def test_limit_is_the_number_of_rows_that_are_asked(model: Any, tokenizer: Any, answered: list[Row]) -> None:
    found = run(model, tokenizer, answered, answer_pattern=WHOLE, limit=2)
    assert (found.primary.n, found.primary.value) == (2, 0.5)


@pytest.mark.parametrize("kind", ["plain", "chatml", "bos", "bos in template"])
def test_the_model_is_asked_the_ids_it_was_trained_on(
    kind: str, asked: tuple[Any, list[list[int]]], variant: Callable[[str], Any], rows: list[Row]
) -> None:
    (model, seen), tokenizer = asked, variant(kind)
    run(model, tokenizer, rows[:4])
    encoded = encode_rows(rows[:4], tokenizer)
    assert sorted(seen) == sorted(map(list, encoded.prompts))


def test_a_prompt_that_leaves_little_room_for_the_answer_is_asked_whole(
    asked: tuple[Any, list[list[int]]], tokenizer: Any, rows: list[Row], encoded: list[Any]
) -> None:
    """Generation shortens the answer then; evaluation must not shorten the question instead."""
    model, seen = asked
    prompts = [e.prompt_ids for e in encoded[:4]]
    run(model, tokenizer, rows[:4], max_length=max(map(len, prompts)) + 2)
    assert sorted(seen) == sorted(prompts)


@pytest.mark.slow  # it reads the harness's list of tasks
def test_an_unknown_task_is_refused(model: Any, tokenizer: Any, rows: list[Row]) -> None:
    with pytest.raises(TpawError, match=r"evaluation\.tasks: lm-evaluation-harness has no task named 'gsm9k'"):
        run(model, tokenizer, rows[:2], tasks=["gsm9k"], primary="gsm9k")


@pytest.mark.parametrize("metric", ["bits_per_byte", "accuracy_of_mine"])
def test_an_unknown_metric_is_refused(metric: str, model: Any, tokenizer: Any, rows: list[Row]) -> None:
    with pytest.raises(TpawError, match=rf"evaluation\.metric.*{metric}"):
        run(model, tokenizer, rows[:2], metric=metric)


def test_a_target_in_which_the_pattern_finds_no_answer_is_refused_by_its_row(
    asked: tuple[Any, list[list[int]]], tokenizer: Any, rows: list[Row]
) -> None:
    bad = [*rows[:2], Row("x", rows[2].prompt, "no mark")]
    model, seen = asked
    with pytest.raises(TpawError, match=r"heldout\.jsonl: row 3: evaluation\.answer_pattern '#### .*' finds no answer"):
        run(model, tokenizer, bad)
    assert seen == []


@pytest.mark.parametrize("pattern", [r"^(.+)$", r"^(\d+)", r"(?s)^(.+)"])
def test_what_the_template_writes_before_an_answer_is_no_part_of_it(pattern: str) -> None:
    """A model that has learnt its targets by heart is right, whatever the pattern is tied to."""
    tokenizer, rows = make_tokenizer(THINKING), [row("6"), row("8", {"role": "user", "content": "And 4 carts?"})]
    ending = encoding.find_ending(tokenizer, rows, {}, [])
    encoded = encoding.encode(rows, tokenizer, ending, max_length=128, max_skipped=0.0, name="rows", options={})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for prompt, target in zip(encoded.prompts, encoded.chosen, strict=True):
            ids, labels = [*prompt, *target], [*[-100] * len(prompt), *target]
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    own, pad = settings(answer_pattern=pattern, max_new_tokens=40), tokenizer.pad_token_id
    held = {"heldout": Heldout(rows, encoded)}
    found = harness.evaluate(
        model.eval(), tokenizer, held, own, ending=ending, pad_id=pad, max_length=128, seed=1, template_options={}
    )
    assert [sample.completion for sample in found.samples] == ["6", "8"]
    assert found.primary.value == 1


def test_the_harness_s_own_tasks_are_prompted_as_training_does(model: Any) -> None:
    own, chat = make_tokenizer(THINKING), [{"role": "user", "content": "3 carts?"}]
    for options in ({}, {"enable_thinking": False}):
        ending = encoding.find_ending(own, [row("6")], options, [])
        found = harness.other_model(model, own, settings(), 128, ending, options)
        assert found.apply_chat_template(chat) == turns.render(own, chat, options, add_generation_prompt=True)
        assert found.think_end_token == (ending.opening or None)
