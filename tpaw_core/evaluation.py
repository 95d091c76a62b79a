"""Evaluation: lm-evaluation-harness on one checkpoint, with this project's own tasks beside the harness's.

Knows a model, a tokenizer and task names; must not know iterations or stages.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import TypedDict

from tpaw_core import records
from tpaw_core.errors import TpawError
from tpaw_core.template import render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tpaw_core.config import Evaluation
    from tpaw_core.data import Row

HELDOUT, METRIC = "heldout", "exact_match"
OWN = (HELDOUT, "validation")  # each on the rows of data/<name>.jsonl


@records.shape
class Primary(TypedDict):
    """The headline figure: opens metrics/<t>.json."""

    benchmark: str
    metric: str
    value: float
    stderr: float
    n: int


@records.shape
class Metrics(TypedDict):
    """What metrics/<t>.json holds."""

    primary: Primary
    benchmarks: dict[str, dict[str, float]]
    training: dict[str, float]  # means over the last quarter of the training log
    checkpoint: str  # its digest
    parent: str | None


class Sample(TypedDict):
    """One held-out row as the checkpoint answered it."""

    prompt: str
    target: str
    completion: str
    correct: float


class Results(NamedTuple):
    primary: Primary
    benchmarks: dict[str, dict[str, float]]
    samples: list[Sample]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    settings: Evaluation,
    *,
    max_length: int,
    seed: int,
) -> Results:
    """Run ``settings.tasks``; greedy decoding on the ``rows`` of our own, each other task as the harness defines it.

    Raises TpawError for a task the harness does not know, or a primary metric that the results do not hold.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is not a name
    if settings.primary in OWN and settings.metric != METRIC:
        raise TpawError(f"evaluation.metric: {settings.primary} is scored by {METRIC}, not by {settings.metric!r}")
    found: dict[str, Any] = {}
    sampled: list[Any] = []
    if own := [task for task in settings.tasks if task in OWN]:
        with tempfile.TemporaryDirectory(prefix="tpaw-evaluation-") as folder:
            for task in own:
                _write_task(Path(folder), task, rows[task], tokenizer, settings)
            tasks = TaskManager(include_path=folder, include_defaults=False).load(own)
            results = evaluator.evaluate(_engine(model, tokenizer, settings, max_length), tasks, limit=settings.limit)
        found.update(_plain(results))
        sampled = results["samples"].get(HELDOUT, [])
    if others := [task for task in settings.tasks if task not in OWN]:
        manager = TaskManager()
        if unknown := [task for task in others if task not in manager.all_tasks]:
            raise TpawError(f"evaluation.tasks: lm-evaluation-harness knows no task {unknown[0]!r}")
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=max_length),
            tasks=others,
            task_manager=manager,
            limit=settings.limit,
            apply_chat_template=tokenizer.chat_template is not None,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        found.update(_plain(results))
    return Results(_primary(found, settings), found, [_sample(s) for s in sampled])


def _engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Evaluation, max_length: int) -> Any:
    """The harness's model for tasks of our own: greedy answers by the generation that training uses."""
    from lm_eval.models.huggingface import HFLM

    from tpaw_core import generation
    from tpaw_core.config import Generation

    greedy = Generation(temperature=0, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)

    class Engine(HFLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            # Prompts come rendered, so no BOS is added; the room for the answer is not cut from the prompt.
            texts = [request.args[0] for request in requests]
            prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
            answers = generation.generate(
                model,
                prompts,
                greedy,
                max_length=max_length + settings.max_new_tokens,
                eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
                seed=0,
            )
            return list(tokenizer.batch_decode([list(a.ids) for a in answers], skip_special_tokens=True))

    return Engine(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=max_length)


def answer(text: str, pattern: str) -> str | None:
    """The answer that ``pattern`` finds in a completion; its first group if it has one."""
    match = re.search(pattern, text)
    return match and (match.group(1) if match.re.groups else match.group()).strip()


def _write_task(
    folder: Path, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: Evaluation
) -> None:
    """A task of our own: prompts rendered here, so the harness tokenises what generation and training tokenise."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):
            target = answer(row.completion, settings.answer_pattern)
            if target is None:
                raise TpawError(
                    f"data/{name}.jsonl: row {number}: evaluation.answer_pattern {settings.answer_pattern!r} "
                    "finds no answer in its target; mend the pattern or the row"
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


def _plain(results: Any) -> dict[str, dict[str, float]]:
    """Per task, its numbers and n; the harness's "metric,filter" keys are kept."""
    plain = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        n = results.get("n-samples", {}).get(task, {}).get("effective")
        plain[task] = {**numbers, **({"n": n} if n is not None else {})}
    return plain


def _primary(benchmarks: dict[str, dict[str, float]], settings: Evaluation) -> Primary:
    values = benchmarks.get(settings.primary, {})
    names = [k for k in values if k.split(",")[0] == settings.metric]
    if not names:
        raise TpawError(
            f"evaluation.metric: {settings.primary} has no metric {settings.metric!r}; it has "
            f"{', '.join(sorted({k.split(',')[0] for k in values})) or 'no results'}"
        )
    metric, _, filter_name = names[0].partition(",")
    return Primary(
        benchmark=settings.primary,
        metric=metric,
        value=values[names[0]],
        stderr=values.get(f"{metric}_stderr,{filter_name}", float("nan")),
        n=int(values.get("n", 0)),
    )


def _sample(sample: Any) -> Sample:
    doc = sample["doc"]
    return Sample(
        prompt=doc["text"].strip(),
        target=doc["target"],
        completion=sample["resps"][0][0],
        correct=float(sample[METRIC]),
    )
