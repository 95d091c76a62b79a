"""lm-evaluation-harness on one checkpoint, with this project's own tasks beside the harness's."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.artifacts.metrics import Primary, Sample
from tpaw_core.errors import TpawError
from tpaw_core.evaluation.answers import HELDOUT, METRIC, OWN, engine, sample_of, write_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tpaw_core.config.params import Evaluation
    from tpaw_core.data.endings import Ending
    from tpaw_core.evaluation.answers import Heldout


class Results(NamedTuple):
    primary: Primary
    benchmarks: dict[str, dict[str, int | float]]
    samples: list[Sample]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held: Mapping[str, Heldout],
    settings: Evaluation,
    *,
    ending: Ending,
    pad_id: int,
    max_length: int,
    seed: int,
    template_options: Mapping[str, Any],
) -> Results:
    """Run ``settings.tasks``; greedy decoding on the ``held`` rows, each other task as the harness has it.

    ``template_options``: model.chat_template_kwargs, for the prompts that the harness renders itself.
    Raises TpawError for a task the harness does not know, or a primary metric that the results do not hold.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is not a name
    if (reason := next(reasons(settings), None)) is not None:
        raise TpawError(reason)
    found: dict[str, Any] = {}
    sampled: list[Any] = []
    if own := [task for task in settings.tasks if task in OWN]:
        with tempfile.TemporaryDirectory(prefix="tpaw-evaluation-") as folder:
            for task in own:
                write_task(Path(folder), task, held[task], tokenizer, settings, ending)
            tasks = TaskManager(include_path=folder, include_defaults=False).load(own)
            own_model = engine(model, tokenizer, held, settings, max_length=max_length, ending=ending, pad_id=pad_id)
            results = evaluator.evaluate(own_model, tasks, limit=settings.limit)
        found.update(_plain(results))
        sampled = results["samples"].get(HELDOUT, [])
    if others := [task for task in settings.tasks if task not in OWN]:
        results = simple_evaluate(
            other_model(model, tokenizer, settings, max_length, ending, template_options),
            tasks=others,
            task_manager=_known_tasks(),
            limit=settings.limit,
            apply_chat_template=tokenizer.chat_template is not None,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        found.update(_plain(results))
    return Results(_primary(found, settings), found, [sample_of(s) for s in sampled])


def other_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Evaluation,
    max_length: int,
    ending: Ending,
    template_options: Mapping[str, Any],
) -> Any:
    """The harness's own model, which prompts as training does and leaves reasoning out of answers, as our tasks do."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        max_length=max_length,
        think_end_token=ending.opening or None,
        chat_template_args=dict(template_options),
    )


def reasons(settings: Evaluation) -> Iterator[str]:
    """Why these settings cannot be evaluated."""
    if settings.primary in OWN and settings.metric != METRIC:
        yield f"evaluation.metric: {settings.primary} is scored by {METRIC}, not by {settings.metric!r}"
    if others := [task for task in settings.tasks if task not in OWN]:
        known = _known_tasks().all_tasks
        for task in others:
            if task not in known:
                yield f"evaluation.tasks: lm-evaluation-harness has no task named {task!r}"


@cache
def _known_tasks() -> Any:
    """The harness's own tasks: it takes seconds to look through their files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _plain(results: Any) -> dict[str, dict[str, int | float]]:
    """Per task, its numbers and n; the harness's "metric,filter" keys are kept."""
    plain = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        n = results.get("n-samples", {}).get(task, {}).get("effective")
        plain[task] = {**numbers, **({"n": n} if n is not None else {})}
    return plain


def _primary(benchmarks: dict[str, dict[str, int | float]], settings: Evaluation) -> Primary:
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
