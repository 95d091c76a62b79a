"""sft: checkpoint 0, the model that self-play starts from."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.checkpoint import Base
from tpaw_core.artifacts.encoded import read_encoded, read_encoding
from tpaw_core.artifacts.training_log import write_log
from tpaw_core.config.optimisation import Optimisation
from tpaw_core.data.tokens import Pairs
from tpaw_core.launch.source import FromScratch, Source
from tpaw_core.stages import members, storage
from tpaw_core.stages.context import Context
from tpaw_core.workspace import files


def sft(context: Context) -> None:
    """Checkpoint 0: the base model fine-tuned on the training rows, or the recipe's ready model as it is.

    With lora, an adapter on that model; of a model from scratch, the whole, which becomes the adapters' base.

    Reads: encoded/. Writes: checkpoints/0, training/0.jsonl. Refuses: a model that cannot be loaded.
    """
    from tpaw_core.engine import precision
    from tpaw_core.launch import training

    workspace, params, registry = context.workspace, context.params, context.registry
    with workspace.exclusive("sft"):
        encoded, encoding = read_encoded(workspace, "train"), read_encoding(workspace)
        source, base = _source(context)
        model: Any = source.empty()
        settings: Optimisation = params.sft
        if base is not None:
            settings = precision.on_a_base(settings)
        elif params.sft.enabled:
            settings = precision.settled(settings, "sft")
        storage.report_size(context, model)
        deciding = {
            "seed": params.seed,
            "model": params.model.model_dump(mode="json", exclude={"base"}),
            "sft": settings.model_dump(mode="json"),
        }
        if params.lora is not None:
            deciding["lora"] = params.lora.model_dump(mode="json")
        rows = context.encoded_digest
        made_from = context.sums(context.rows)
        state = workspace.training_state / f"0-{files.digest([deciding, rows])[:16]}"
        if base is not None:
            made_from |= {base.source: base.digest, **members.start(context).read(workspace)}
            state = workspace.training_state / f"0-{files.digest([deciding, rows, made_from])[:16]}"
        elif (name := params.model.model_name_or_path) is not None:
            made_from[name] = checkpoint.identity(workspace, model, context.source(name))
        log: list[dict[str, float]] = []
        if not params.sft.enabled:
            model = source.load()
            _require(model, workspace.tokenizer, params.model.max_length, encoding.pad_id)
        else:
            with context.recorded(0) as on_log:
                model, log = training.train(
                    params.machine,
                    workspace.state,
                    source,
                    partial(_learn, workspace.tokenizer.absolute(), params.model.max_length),
                    settings,
                    on_log,
                    rows=Pairs(encoded.prompts, encoded.chosen),
                    pad_id=encoding.pad_id,
                    seed=params.seed,
                    state=state.absolute(),
                    row_ids=encoded.row_ids,
                )
            name = params.model.model_name_or_path
            storage.report_kept(context, 0, model, context.source(name) if name else None, params.model.revision)
            if registry:
                registry.runs.log_dataset(
                    registry.runs.iteration_run(0), workspace.train_rows, len(encoded.row_ids), "training"
                )
        write_log(workspace, 0, log)
        origin = checkpoint.Origin(made_from=made_from, params=deciding, base=base)
        checkpoint.write(
            workspace,
            0,
            model,
            checkpoint.load_tokenizer(workspace.tokenizer),
            origin,
            dtype=storage.dtype(context, 0, model),
            stop_ids=encoding.ending.stop_ids,
        )
        if registry:
            registry.register(0)
        shutil.rmtree(state, ignore_errors=True)


def _learn(tokenizer: Path, max_length: int, model: Any, *, pad_id: int, **options: Any) -> list[dict[str, float]]:
    """Fine-tune a model that can be used, on whichever process has it."""
    from tpaw_core.engine.training import loop

    _require(model, tokenizer, max_length, pad_id)
    return loop.sft(model, pad_id=pad_id, **options)


def _require(model: Any, tokenizer: Path, max_length: int, pad_id: int) -> None:
    from tpaw_core.engine import suitability

    suitability.require(model, checkpoint.load_tokenizer(tokenizer), max_length=max_length, pad_id=pad_id)


def _source(context: Context) -> tuple[Source, Base | None]:
    """The model before fine-tuning, and the base of an adapter."""
    own, params = context.params.model, context.params
    if own.model_name_or_path is None:
        assert own.scratch is not None
        tokenizer = context.workspace.tokenizer.absolute()
        return Source(scratch=FromScratch(own.scratch, tokenizer, own.max_length, params.seed)), None
    start = members.start(context)
    place = str(Path(start.source).absolute()) if Path(start.source).exists() else start.source
    if params.lora is None:
        return Source(place, start.revision, "float32" if params.sft.enabled else own.dtype), None
    new, adapter = (params.lora, params.seed), start.adapter
    found = Source(place, start.revision, "bfloat16", is_base=True, adapter=adapter, new=None if adapter else new)
    return found, start.base(context.workspace)
