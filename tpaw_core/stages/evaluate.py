"""evaluate: benchmarks of a checkpoint."""

from __future__ import annotations

import logging

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.metrics import Metrics, write_metrics
from tpaw_core.artifacts.training_log import last_quarter
from tpaw_core.data import prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.stages.context import Context

SAMPLES = 20
logger = logging.getLogger(__name__)


def evaluate(context: Context, iteration: int) -> None:
    """Benchmarks of checkpoint t.

    Reads: checkpoints/<t>, training/<t>.jsonl, data/heldout.jsonl (and validation.jsonl). Writes: metrics/<t>.json,
    samples/<t>.jsonl. Refuses: an unknown benchmark, a held-out target in which the pattern finds no answer.
    """
    from tpaw_core.evaluation import answers, harness

    workspace, params = context.workspace, context.params
    with workspace.exclusive(f"evaluate {iteration}"):
        folder = workspace.checkpoint(iteration)
        manifest = checkpoint.verify(workspace, iteration)
        prepare.verify(workspace)
        tasks = [task for task in answers.OWN if task in params.evaluation.tasks]
        results = harness.evaluate(
            checkpoint.load_model(folder),
            checkpoint.load_tokenizer(folder),
            {task: list(read_rows(workspace.data / f"{task}.jsonl")) for task in tasks},
            params.evaluation,
            max_length=params.model.max_length,
            seed=params.seed,
        )
        primary, kept = results.primary, results.samples[:SAMPLES]
        metrics = Metrics(
            primary=primary,
            benchmarks=results.benchmarks,
            training=last_quarter(workspace, iteration),
            checkpoint=manifest.digest,
            parent=manifest.parent,
        )
        write_metrics(workspace, iteration, metrics, kept)
        logger.info("%s: %s %.4f +- %.4f", primary.benchmark, primary.metric, primary.value, primary.stderr)
        if context.registry:
            context.registry.register(iteration)
            context.registry.record_evaluation(iteration, metrics, [sample.model_dump() for sample in kept])
