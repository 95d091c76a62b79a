from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpaw_core.config.params import Evaluation
from tpaw_core.data.encoding import render
from tpaw_core.data.rows import Row
from tpaw_core.errors import TpawError
from tpaw_core.evaluation.answers import answer, sample_of, write_task


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
    write_task(tmp_path, "heldout", rows[:3], tokenizer, settings)
    lines = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == [render(row.prompt, tokenizer) for row in rows[:3]]
    assert [line["target"] for line in lines] == [row.completion for row in rows[:3]]
    assert [line["answer"] for line in lines] == [row.completion.rpartition("#### ")[2] for row in rows[:3]]
    task = json.loads((tmp_path / "heldout.yaml").read_text())
    assert task["filter_list"][0]["filter"][0]["regex_pattern"] == r"#### (\d+)"
    assert task["generation_kwargs"]["max_gen_toks"] == 8


def test_a_row_without_an_answer_is_named(rows: list[Row], tokenizer: Any, tmp_path: Path) -> None:
    bad = [*rows[:2], Row("x", rows[2].prompt, "no mark")]
    with pytest.raises(TpawError, match=r"data/validation\.jsonl: row 3: .* finds no answer in its target"):
        write_task(tmp_path, "validation", bad, tokenizer, Evaluation(answer_pattern=r"#### (\d+)"))


def test_a_sample_is_read_from_the_harnesss_record() -> None:
    record = {"doc": {"text": " p ", "target": "t"}, "resps": [["c"]], "exact_match": 1}
    assert sample_of(record).model_dump() == {"prompt": "p", "target": "t", "completion": "c", "correct": 1.0}
