"""Storage: the numbers that a checkpoint is stored in, what they take on disk, and what of its training they keep."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.method import early_warnings
from tpaw_core.stages.context import Context

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def dtype(context: Context, iteration: int, model: PreTrainedModel) -> str:
    """A name in torch: what model.dtype says. auto: as a ready model came, and float32 for what is trained."""
    params = context.params
    if adapters.active(model) is not None:
        return "float32"
    if iteration == 0 and not params.sft.enabled and params.model.dtype == "auto":
        return str(model.dtype).removeprefix("torch.")
    return params.checkpoint_dtype


def report_size(context: Context, model: PreTrainedModel) -> None:
    """Say, before a run, what its checkpoints will take."""
    first, each = sizes(context, model)
    lora, iterations = context.params.lora, len(context.params.iterations)
    logger.info(
        "a checkpoint of %s parameters in %s takes %s on disk; this run's %d take %s",
        f"{adapters.parameters(model, lora) if lora else model.num_parameters():,}",
        "float32" if lora else context.params.checkpoint_dtype,
        readable(each),
        iterations + 1,
        readable(first + iterations * each),
    )


def sizes(context: Context, model: PreTrainedModel, adapter: Path | None = None) -> tuple[int, int]:
    """Bytes of weights on disk: of checkpoint 0, and of each later one. ``adapter``: what a run starts from."""
    from tpaw_core.engine import precision

    params = context.params
    first = precision.checkpoint_bytes(model.num_parameters(), dtype(context, 0, model))
    if params.lora is None:
        return first, precision.checkpoint_bytes(model.num_parameters(), params.checkpoint_dtype)
    own = precision.checkpoint_bytes(adapters.parameters(model, params.lora, adapter), "float32")
    return first if params.model.model_name_or_path is None else own, own


def report_kept(
    context: Context, iteration: int, model: PreTrainedModel, parent: str | Path | None, revision: str | None = None
) -> None:
    """Say, before ``model`` is stored, which share of its update it keeps; warn where that is too little.

    ``parent``: what it was trained from, None where from nothing.
    """
    import torch

    from tpaw_core.engine import precision

    name, before = dtype(context, iteration, model), None
    if adapters.active(model) is not None:  # it is trained in what it is stored in
        name, rounds = "float32", False
    else:
        rounds = any(parameter.dtype != getattr(torch, name) for parameter in model.parameters())
    if rounds and parent is not None:  # mapped from disk, beside a model that may fill the accelerator
        before = checkpoint.load_model(parent, revision=revision, device="cpu")
    kept = precision.update_kept(model, before, name) if rounds else 1.0
    logger.info("checkpoint %d is stored in %s and keeps %.4f of its update", iteration, name, kept)
    if context.registry:
        run = context.registry.runs.iteration_run(iteration)
        context.registry.runs.log_metrics(run, [(0, {"checkpoint/update_kept": kept})])
    context.warn(early_warnings.of_storage(kept, name), iteration)


def readable(size: float) -> str:
    """A number of bytes with its unit."""
    unit, name = next((found for found in ((1e9, "GB"), (1e6, "MB")) if size >= found[0]), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
