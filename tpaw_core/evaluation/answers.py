"""Our own tasks: how one is defined, how an answer is extracted from a text, and how the harness uses our decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts.metrics import Sample
from tpaw_core.data.encoding import render
from tpaw_core.data.endings import Ending
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tpaw_core.config.params import Evaluation
    from tpaw_core.data.rows import Row


HELDOUT, METRIC = "heldout", "exact_match"
OWN = (HELDOUT, "validation")  # each on the rows of data/<name>.jsonl


def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Evaluation, max_length: int) -> Any:
    """The harness's model for tasks of our own: greedy answers by the generation that training uses."""
    from lm_eval.models.huggingface import HFLM

    from tpaw_core.config.params import Generation
    from tpaw_core.engine.generation import in_process

    greedy = Generation(temperature=0, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)

    class Engine(HFLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            # Prompts come rendered, so no BOS is added; the room for the answer is not cut from the prompt.
            texts = [request.args[0] for request in requests]
            prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
            answers = in_process.generate(
                model,
                prompts,
                greedy,
                max_length=max_length + settings.max_new_tokens,
                ending=Ending.of(tokenizer),
                pad_id=tokenizer.pad_token_id,
                seed=0,
            )
            return list(tokenizer.batch_decode([list(a.ids) for a in answers], skip_special_tokens=True))

    return Engine(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=max_length)


def answer(text: str, pattern: str) -> str | None:
    """The answer that ``pattern`` finds in a completion; its first group if it has one."""
    match = re.search(pattern, text)
    return match and (match.group(1) if match.re.groups else match.group()).strip()


def write_task(
    folder: Path, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: Evaluation
) -> None:
    """A task of our own: prompts rendered here, so the harness tokenises what generation and training tokenise."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):
            target = answer(row.completion, settings.answer_pattern)
            if target is None:
                raise TpawError(
                    f"data/{name}.jsonl: row {number}: evaluation.answer_pattern {settings.answer_pattern!r} "
                    "finds no answer in its target; fix the pattern or the row"
                )
            file.write(
                json.dumps({"text": render(row.prompt, tokenizer), "answer": target, "target": row.completion}) + "\n"
            )
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "generation_kwargs": {"until": [], "max_gen_toks": settings.max_new_tokens, "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": settings.answer_pattern},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def sample_of(sample: Any) -> Sample:
    """From the harness's record of one document."""
    doc = sample["doc"]
    return Sample(
        prompt=doc["text"].strip(),
        target=doc["target"],
        completion=sample["resps"][0][0],
        correct=float(sample[METRIC]),
    )
