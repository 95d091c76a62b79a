"""sft: checkpoint 0, the model that self-play starts from."""

from __future__ import annotations

import shutil
from typing import Any

from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.artifacts.checkpoint import Base
from tpaw_core.artifacts.encoded import read_encoded, read_encoding
from tpaw_core.artifacts.training_log import write_log
from tpaw_core.config.params import Optimisation
from tpaw_core.stages import members, storage
from tpaw_core.stages.context import Context
from tpaw_core.workspace import files


def sft(context: Context) -> None:
    """Checkpoint 0: the base model fine-tuned on the training rows, or the recipe's ready model as it is.

    With lora, an adapter on that model; of a model from scratch, the whole, which becomes the adapters' base.

    Reads: encoded/. Writes: checkpoints/0, training/0.jsonl. Refuses: a model that cannot be loaded.
    """
    from tpaw_core.engine import precision, suitability
    from tpaw_core.engine.training import loop

    workspace, params, registry = context.workspace, context.params, context.registry
    with workspace.exclusive("sft"):
        encoded, encoding = read_encoded(workspace, "train"), read_encoding(workspace)
        model, tokenizer, base = _base(context)
        suitability.require(model, tokenizer, max_length=params.model.max_length, pad_id=encoding.pad_id)
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
        made_from = {workspace.name(path): files.sha256(path) for path in context.rows}
        state = workspace.training_state / f"0-{files.digest([deciding, rows])[:16]}"
        if base is not None:
            made_from |= {base.source: base.digest, **members.start(context).read()}
            state = workspace.training_state / f"0-{files.digest([deciding, rows, made_from])[:16]}"
        elif (name := params.model.model_name_or_path) is not None:
            made_from[name] = checkpoint.identity(model, context.source(name))
        log: list[dict[str, float]] = []
        if params.sft.enabled:
            with context.recorded(0) as on_log:
                log = loop.sft(
                    model,
                    list(zip(encoded.prompts, encoded.chosen, strict=True)),
                    settings,
                    pad_id=encoding.pad_id,
                    seed=params.seed,
                    state=state,
                    on_log=on_log,
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
            tokenizer,
            origin,
            dtype=storage.dtype(context, 0, model),
            stop_ids=encoding.ending.stop_ids,
        )
        if registry:
            registry.register(0)
        shutil.rmtree(state, ignore_errors=True)


def _base(context: Context) -> tuple[Any, Any, Base | None]:
    """The model before fine-tuning, loaded or new, the tokenizer that encoded the rows, and the base of an adapter."""
    from tpaw_core.engine import scratch

    own, params = context.params.model, context.params
    tokenizer = checkpoint.load_tokenizer(context.workspace.tokenizer)
    if own.model_name_or_path is None:
        assert own.scratch is not None
        return scratch.model(own.scratch, tokenizer, max_length=own.max_length, seed=params.seed), tokenizer, None
    start = members.start(context)
    if params.lora is not None:
        model = members.load_base(start.source, start.revision)
        if start.adapter is None:
            adapters.attach(model, params.lora, params.seed)
        else:
            adapters.read(model, start.adapter)
        return model, tokenizer, start.base()
    dtype = "float32" if params.sft.enabled else own.dtype
    return checkpoint.load_model(start.source, dtype=dtype, revision=own.revision), tokenizer, None
