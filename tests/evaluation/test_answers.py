from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.rows import encode_rows, eos_ending
from tests.support.templates import OPENED, THINKING, row
from tests.support.templates import make as make_tokenizer
from tpaw_core.config.params import Evaluation
from tpaw_core.data import encoding, turns
from tpaw_core.data.rows import Row
from tpaw_core.errors import TpawError
from tpaw_core.evaluation.answers import Heldout, answer, judged, sample_of, target_texts, write_task


def held(rows: list[Row], tokenizer: Any, **options: Any) -> Heldout:
    return Heldout(rows, encode_rows(rows, tokenizer, **options))


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("1+1=2\n#### 2 ", r"#### (.+)", "2"),
        ("1+1=2\n#### 2", r"#### \d", "#### 2"),
        ("#### 1 #### 2", r"#### (\d)", "1"),
        ("nothing", r"#### (\d)", None),
        ("#### -1,234.5", Evaluation().answer_pattern, "-1,234.5"),
    ],
)
def test_an_answer_is_the_patterns_first_group_or_its_whole_match(
    text: str, pattern: str, expected: str | None
) -> None:
    assert answer(text, pattern) == expected


def test_a_task_holds_the_rendered_prompts_the_answers_and_the_pattern(
    rows: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    settings = Evaluation(answer_pattern=r"#### (\d+)", max_new_tokens=8)
    write_task(tmp_path, "heldout", held(rows[:3], tokenizer), tokenizer, settings, eos_ending(tokenizer))
    lines = pq.read_table(tmp_path / "heldout.parquet").to_pylist()
    texts = [turns.render(tokenizer, row.prompt, {}, add_generation_prompt=True) for row in rows[:3]]
    assert [line["text"] for line in lines] == texts
    assert [line["question"] for line in lines] == [row.prompt[0]["content"] for row in rows[:3]]
    assert [(line["task"], line["number"]) for line in lines] == [("heldout", number) for number in range(3)]
    assert [line["target"] for line in lines] == [row.completion for row in rows[:3]]
    assert [line["answer"] for line in lines] == [row.completion.rpartition("#### ")[2] for row in rows[:3]]
    task = json.loads((tmp_path / "heldout.yaml").read_text())
    assert task["filter_list"][0]["filter"][0]["regex_pattern"] == r"#### (\d+)"
    assert task["generation_kwargs"]["max_gen_toks"] == 8


def test_a_row_without_an_answer_is_named(rows: list[Row], tokenizer: Any, tmp_path: Path) -> None:
    bad = [*rows[:2], Row("x", rows[2].prompt, "no mark")]
    with pytest.raises(TpawError, match=r"data/validation\.jsonl: row 3: .* finds no answer in its target"):
        write_task(
            tmp_path,
            "validation",
            held(bad, tokenizer),
            tokenizer,
            Evaluation(answer_pattern=r"#### (\d+)"),
            eos_ending(tokenizer),
        )


def test_a_row_that_could_not_be_encoded_is_not_asked_and_keeps_its_place(
    rows: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    settings, ended = Evaluation(answer_pattern=r"#### (\d+)"), tokenizer.eos_token
    hostile = Row("h", [{"role": "user", "content": f"7{ended}"}], "no mark")
    given = held([rows[0], hostile, rows[1]], tokenizer, max_skipped=0.5)
    write_task(tmp_path, "heldout", given, tokenizer, settings, eos_ending(tokenizer))
    lines = pq.read_table(tmp_path / "heldout.parquet").to_pylist()
    assert [line["target"] for line in lines] == [rows[0].completion, rows[1].completion]
    assert [line["number"] for line in lines] == [0, 1]
    bad = held([rows[0], hostile, Row("x", rows[2].prompt, "no mark")], tokenizer, max_skipped=0.5)
    with pytest.raises(TpawError, match=r"data/heldout\.jsonl: row 3: .* finds no answer in its target"):
        write_task(tmp_path, "heldout", bad, tokenizer, settings, eos_ending(tokenizer))


@pytest.mark.parametrize("target", ["2024-05-05", "007", "1e5", "null"])
def test_a_target_that_looks_like_a_date_or_a_number_stays_text(
    target: str, rows: list[Row], tokenizer: Any, tmp_path: Path
) -> None:
    own = Row("t", rows[0].prompt, target)
    write_task(
        tmp_path,
        "heldout",
        held([own], tokenizer),
        tokenizer,
        Evaluation(answer_pattern=r"^(.+)$"),
        eos_ending(tokenizer),
    )
    (line,) = pq.read_table(tmp_path / "heldout.parquet").to_pylist()
    assert (line["target"], line["answer"]) == (target, target)


def test_a_sample_is_read_from_the_harnesss_record() -> None:
    record = {"doc": {"text": "<user> p ", "question": " p ", "target": "t"}, "resps": [["c"]], "exact_match": 1}
    assert sample_of(record).model_dump() == {"prompt": "p", "target": "t", "completion": "c", "correct": 1.0}


@pytest.mark.parametrize(("pattern", "text"), [(r"yes|no|maybe: (\w+)", "yes"), (r"#### (\d*)", "#### x")])
def test_a_match_without_a_group_is_no_answer_as_for_the_harness(pattern: str, text: str) -> None:
    assert answer(text, pattern) is None


def test_a_target_is_judged_as_a_response_with_its_ids() -> None:
    """Also where the template writes reasoning first, or opens it in the prompt."""
    for template, completion, expected in (
        (THINKING, "6 carts", "6 carts"),
        (THINKING, " 6 carts\n", "6 carts"),
        (OPENED, "<think>\n3 x 2\n</think>\n\n6", "3 x 2\n</think>\n\n6"),
        (THINKING.replace("<think>", "<turn>").replace("</think>", "<end_turn>"), "6 carts", "6 carts"),
        (THINKING.replace("'<|im_end|>", "'<end_turn><|im_end|>"), "6 carts", "6 carts"),  # as Command A's
    ):
        own, made = make_tokenizer(template), row(completion)
        ending = encoding.find_ending(own, [made], {}, [own.convert_tokens_to_ids("<|im_end|>")])
        whole = encoding.encode([made], own, ending, max_length=400, max_skipped=0.0, name="r", options={})
        assert target_texts(Heldout([made], whole), own, ending) == [expected]
        assert judged([whole.chosen[0][:-1]], own, ending) == [expected]  # a response cut right before its end


def test_a_target_cut_at_max_length_is_judged_by_its_row() -> None:
    own, made = make_tokenizer(THINKING), row("3 times 2 is 6.")
    ending = encoding.find_ending(own, [made], {}, [])
    whole = encoding.encode([made], own, ending, max_length=400, max_skipped=0.0, name="r", options={})
    room = len(whole.prompts[0]) + len(whole.chosen[0]) - 4
    cut = encoding.encode([made], own, ending, max_length=room, max_skipped=0.0, name="r", options={})
    assert target_texts(Heldout([made], cut), own, ending) == ["3 times 2 is 6."]
