"""evaluate: benchmarks of a checkpoint."""

from __future__ import annotations

import logging

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import read_encoded, read_encoding
from tpaw_core.artifacts.metrics import Metrics, write_metrics
from tpaw_core.artifacts.training_log import last_quarter
from tpaw_core.data.rows import read_rows
from tpaw_core.stages.context import Context
from tpaw_core.stages.members import Members

SAMPLES = 20
logger = logging.getLogger(__name__)


def evaluate(context: Context, iteration: int) -> None:
    """Benchmarks of checkpoint t.

    Reads: checkpoints/<t>, training/<t>.jsonl, encoded/, data/heldout.jsonl (and validation.jsonl). Writes:
    metrics/<t>.json, samples/<t>.jsonl. Refuses: an unknown benchmark, a held-out target in which the pattern finds no
    answer.
    """
    from tpaw_core.engine import precision
    from tpaw_core.evaluation import answers, harness
    from tpaw_core.evaluation.answers import Heldout

    workspace, params = context.workspace, context.params
    with workspace.exclusive(f"evaluate {iteration}"):
        folder, encoding = workspace.checkpoint(iteration), read_encoding(workspace)
        manifest = checkpoint.verify(workspace, iteration)
        tasks = [task for task in answers.OWN if task in params.evaluation.tasks]
        held = {
            name: Heldout(list(read_rows(workspace.data / f"{name}.jsonl")), read_encoded(workspace, name))
            for name in tasks
        }
        results = harness.evaluate(
            Members(context, precision.of_generation(params.generation.dtype)).load(iteration, spread=True),
            checkpoint.load_tokenizer(folder),
            held,
            params.evaluation,
            ending=encoding.ending,
            pad_id=encoding.pad_id,
            max_length=params.model.max_length,
            seed=params.seed,
            template_options=params.model.chat_template_kwargs,
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
