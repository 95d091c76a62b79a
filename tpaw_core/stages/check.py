"""check: everything that would stop a run, found before it starts and listed at once. Trains nothing."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts import adapters, checkpoint, pretrained
from tpaw_core.data.rows import Row, read_rows
from tpaw_core.errors import TpawError
from tpaw_core.stages import data, encode, members, storage
from tpaw_core.stages.context import Context
from tpaw_core.stages.storage import readable

if TYPE_CHECKING:
    from tpaw_core.config.optimisation import Optimisation

PROBED = 2e9  # bytes of weights; a larger model is probed when `sft` has loaded it, and a line says so
COPIES = 2  # of a checkpoint on disk: in the workspace and in DVC's cache
logger = logging.getLogger(__name__)


class Problems(list[str]):
    """The refusals so far."""

    @contextmanager
    def found(self) -> Iterator[None]:
        """What the block raises is one more."""
        try:
            yield
        except TpawError as error:
            self += str(error).splitlines()


def check(context: Context) -> None:
    """Rows, tokenizer, template, model, benchmarks, memory and disk.

    Reads: the recipe's rows and the base model. Writes: data/, as `tpaw data` does. Raises TpawError with all
    refusals.
    """
    problems, params = Problems(), context.params
    with problems.found():
        data.data(context)
    known = not problems  # else data/ may hold the rows of another recipe
    heldout = list(read_rows(context.workspace.heldout_rows)) if known else []
    tokenizer = None
    if known or params.model.model_name_or_path is not None:
        with problems.found():
            tokenizer, shipped = encode.base_tokenizer(context)
            problems += encode.reasons(tokenizer)
    if known and tokenizer is not None and not encode.reasons(tokenizer):
        _rows_as_ids(context, tokenizer, shipped, problems)
        heldout = []  # their targets are looked at as token ids
    _benchmarks(context, heldout, problems)
    _settings(context, problems)
    if tokenizer is not None:
        _model(context, tokenizer, problems)
    if problems:
        found = list(dict.fromkeys(problems))
        counted = f"{len(found)} {'problem' if len(found) == 1 else 'problems'}"
        raise TpawError("\n".join([f"{counted} to fix before a run:", *(f"- {problem}" for problem in found)]))
    logger.info("no problems found in recipe %s", params.recipe)


def _rows_as_ids(context: Context, tokenizer: Any, shipped: list[int], problems: Problems) -> None:
    """Rows that cannot be encoded, and targets in which a response with the same ids would have no answer."""
    from tpaw_core.evaluation import answers

    settings = context.params.evaluation
    with problems.found():
        ending = encode.ending(context, tokenizer, shipped)
        for name in encode.names(context):
            with problems.found():
                rows = encode.rows(context, tokenizer, ending, name)
                longest = max(len(p) + len(c) for p, c in zip(rows.prompts, rows.chosen, strict=True))
                logger.info("%s: %d rows, the longest has %d tokens", name, len(rows.row_ids), longest)
                if name in settings.tasks:
                    held = answers.Heldout(list(read_rows(context.workspace.data / f"{name}.jsonl")), rows)
                    answers.targets(name, answers.target_texts(held, tokenizer, ending), rows.places, settings)


def _benchmarks(context: Context, heldout: list[Row], problems: Problems) -> None:
    from tpaw_core.evaluation import answers, harness

    settings = context.params.evaluation
    problems += harness.reasons(settings)
    if any(task in answers.OWN for task in settings.tasks):
        with problems.found():
            texts = [row.completion for row in heldout]
            answers.targets(answers.HELDOUT, texts, range(len(heldout)), settings)


def _settings(context: Context, problems: Problems) -> None:
    """Optimisers and schedules that torch and transformers know, and the interpreter that has vllm."""
    from tpaw_core.engine.generation import vllm_client
    from tpaw_core.engine.training import loop

    for name, settings in _trained(context).items():
        with problems.found():
            loop.probe(name, settings)
    if context.params.generation.backend == "vllm":
        with problems.found():
            vllm_client.interpreter(context.workspace, context.params.generation)


def _trained(context: Context) -> dict[str, Optimisation]:
    """The sections of params.yaml by which this run trains."""
    params = context.params
    return {**({"sft": params.sft} if params.sft.enabled else {}), "training": params.training}


def _model(context: Context, tokenizer: Any, problems: Problems) -> None:
    """Its structure without weights; its behaviour where it is small enough to load in seconds."""
    from tpaw_core.engine import precision, scratch, suitability
    from tpaw_core.engine.training import loop

    params, own, pad_id, adapter = context.params, context.params.model, tokenizer.pad_token_id, None
    with problems.found():
        if own.model_name_or_path is None:
            assert own.scratch is not None
            model = scratch.model(own.scratch, tokenizer, max_length=own.max_length, seed=params.seed)
            problems += suitability.reasons(model, tokenizer, max_length=own.max_length, pad_id=pad_id)
        else:
            source, revision, _, adapter = members.start(context)
            config, _ = checkpoint.load_settings(source, revision)
            if params.lora is not None and params.generation.backend == "vllm":
                with problems.found():
                    members.need_servable(source, config, precision.of_generation(params.generation.dtype))
            model = pretrained.load_empty(source, revision)
            known = list(suitability.of_structure(model, tokenizer, own.max_length))
            problems += [f"model {own.model_name_or_path!r}: {reason}" for reason in known]
            if not known and 4 * model.num_parameters() <= PROBED:
                loaded = checkpoint.load_model(source, dtype="float32", revision=revision)
                of_behaviour = suitability.of_behaviour(loaded, pad_id)
                problems += [f"model {own.model_name_or_path!r}: {reason}" for reason in of_behaviour]
            elif not known:
                logger.info("a model of this size is probed when it is first loaded, at the start of sft")
        for settings in _trained(context).values():
            with problems.found():
                loop.need_checkpointing(model, settings)
                if settings.sharded:
                    pretrained.need_divisible(model, params.machine.world_size, frozen=params.lora is not None)
                if settings.cpu_offload and params.machine.launch is None:
                    pretrained.need_accelerator()
        _resources(context, model, adapter, problems)


def _resources(context: Context, model: Any, adapter: Path | None, problems: Problems) -> None:
    """What a run needs, and what the machine has."""
    _memory(context, model, adapter, problems)
    _disk(context, model, adapter, problems)


def _memory(context: Context, model: Any, adapter: Path | None, problems: Problems) -> None:
    """What each process holds while it trains."""
    import psutil
    import torch

    from tpaw_core.engine import memory

    params, machine = context.params, context.params.machine
    logger.info("%s parameters", f"{model.num_parameters():,}")
    cuda = torch.cuda.is_available()
    has = torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total // machine.processes
    where = "its accelerator" if cuda else "it"
    of_adapter = None if params.lora is None else adapters.parameters(model, params.lora, adapter)
    for section, settings in _trained(context).items():
        own = of_adapter if section == "training" or params.model.model_name_or_path is not None else None
        plan = memory.plan(model, own, settings, ranks=machine.world_size, bf16=bool(settings.bf16))
        parts = ", ".join(f"{name} {readable(size)}" for name, size in plan._asdict().items() if size)
        logger.info("memory of each process in %s: about %s (%s); %s has %s", section, readable(plan.total), parts,
                    where, readable(has))  # fmt: skip
        if plan.certain > has:
            problems.append(
                f"memory: {section} needs {readable(plan.certain)} plus activations in each process, but {where} has "
                f"only {readable(has)}; set lora.r=16, or {section}.optim=rmsprop, or divide the model with "
                f"{section}.sharded=true and more machine.processes"
            )
        elif plan.total > has:
            logger.warning(
                "memory: %s may not fit; set %s.activation_checkpointing=true, or lower %s.max_tokens (%d)",
                section, section, section, settings.max_tokens,
            )  # fmt: skip


def _disk(context: Context, model: Any, adapter: Path | None, problems: Problems) -> None:
    """What all checkpoints take."""
    params = context.params
    first, each = storage.sizes(context, model, adapter)
    disk = COPIES * (first + len(params.iterations) * each)
    root = context.workspace.root
    places = [path for path in (root / "checkpoints", root) if path.exists()]
    disks = {path.stat().st_dev: path.resolve() for path in places}  # of the copies, DVC's is on the root's
    for folder in disks.values():
        share, free = disk // len(disks), shutil.disk_usage(folder).free
        logger.info("disk: %s for all iterations; %s is free in %s", readable(share), readable(free), folder)
        if share > free:
            problems.append(
                f"disk: the checkpoints of all iterations need {readable(share)}, but only {readable(free)} is free in "
                f"{folder}; free up space, or start the flow with prune_after=true"
            )
