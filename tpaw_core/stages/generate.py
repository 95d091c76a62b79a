"""generate: the current model answers the training prompts."""

from __future__ import annotations

import logging
from typing import Any

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import read_encoding
from tpaw_core.artifacts.synthetic import write_synthetic
from tpaw_core.method import early_warnings
from tpaw_core.stages.context import Context
from tpaw_core.stages.members import Members

logger = logging.getLogger(__name__)


def generate(context: Context, iteration: int) -> None:
    """One answer of checkpoint t-1 to every training prompt: the synthetic data of iteration t.

    Reads: checkpoints/<t-1>, encoded/, data/train.jsonl. Writes: synthetic/<t>.parquet. Refuses: a missing or damaged
    parent.
    """
    from tpaw_core.engine import precision
    from tpaw_core.engine.generation import vllm_client
    from tpaw_core.launch import generation

    workspace, params, registry = context.workspace, context.params, context.registry
    with workspace.exclusive(f"generate@{iteration}"):
        folder = context.parent(iteration)
        manifest = checkpoint.verify(workspace, iteration - 1)
        tokenizer = checkpoint.load_tokenizer(folder)
        encoded, encoding = context.encoded(), read_encoding(workspace)
        settings, prompts = params.generation, encoded.prompts
        dtype = precision.of_generation(settings.dtype)
        options: Any = {
            "max_length": params.model.max_length,
            "ending": encoding.ending,
            "seed": params.seed + iteration,
        }
        where = params.machine, workspace.state
        if settings.backend == "vllm":
            python = vllm_client.interpreter(workspace, settings)
            source, adapter = Members(context, dtype).served(iteration - 1)
            options |= {"dtype": dtype, "python": python, "adapter": adapter}
            responses = generation.generate_by_vllm(*where, source, prompts, settings, **options)
        else:
            policy = Members(context, dtype).source(iteration - 1)
            responses = generation.generate(*where, policy, prompts, settings, **options, pad_id=encoding.pad_id)
        with workspace.publish(workspace.synthetic(iteration)) as aside:
            rows, digest = context.playing(), context.encoded_digest
            write_synthetic(aside, iteration, manifest.digest, rows, encoded, responses, tokenizer, digest)
        total, chosen = len(responses), encoded.chosen
        equal = sum(response.ids == target for response, target in zip(responses, chosen, strict=True))
        cut = sum(response.finish_reason == "length" for response in responses)
        logger.info("%d responses: %d equal their target, %d reached the length limit", total, equal, cut)
        if registry:
            run = registry.runs.iteration_run(iteration)
            registry.runs.log_dataset(run, workspace.synthetic(iteration), total, "synthetic")
            shares = {"generation/equal_to_target": equal / total, "generation/cut": cut / total}
            registry.runs.log_metrics(run, [(0, shares)])
        context.warn(early_warnings.of_answers(equal / total), iteration)
