"""sft: checkpoint 0, the model that self-play starts from."""

from __future__ import annotations

import shutil
from itertools import chain
from typing import Any

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.training_log import write_log
from tpaw_core.data.rows import read_rows
from tpaw_core.stages.context import Context
from tpaw_core.workspace import files


def sft(context: Context) -> None:
    """Checkpoint 0: the base model fine-tuned on data/train.jsonl, or the recipe's ready model as it is.

    Reads: data/train.jsonl. Writes: checkpoints/0, training/0.jsonl. Refuses: a model that cannot be loaded.
    """
    from tpaw_core.engine.training import loop

    workspace, params, registry = context.workspace, context.params, context.registry
    with workspace.exclusive("sft"):
        model, tokenizer = _base(context)
        deciding = {
            "seed": params.seed,
            "model": params.model.model_dump(mode="json"),
            "sft": params.sft.model_dump(mode="json"),
        }
        rows = files.sha256(workspace.train_rows)
        made_from = {workspace.name(workspace.train_rows): rows}
        if (name := params.model.model_name_or_path) is not None:
            made_from[name] = checkpoint.identity(model, _source(context, name))
        state = workspace.training_state / f"0-{files.digest([deciding, rows])[:16]}"
        log: list[dict[str, float]] = []
        if params.sft.enabled:
            encoded = context.encoded(tokenizer, read_rows(workspace.train_rows))
            with context.recorded(0) as on_log:
                log = loop.sft(
                    model,
                    list(zip(encoded.prompts, encoded.chosen, strict=True)),
                    params.sft,
                    pad_id=tokenizer.pad_token_id,
                    seed=params.seed,
                    state=state,
                    on_log=on_log,
                    row_ids=encoded.row_ids,
                )
            if registry:
                registry.runs.log_dataset(
                    registry.runs.iteration_run(0), workspace.train_rows, len(encoded.row_ids), "training"
                )
        write_log(workspace, 0, log)
        origin = checkpoint.Origin(made_from=made_from, params=deciding)
        checkpoint.write(workspace, 0, model, tokenizer, origin, dtype=params.checkpoint_dtype)
        if registry:
            registry.register(0)
        shutil.rmtree(state, ignore_errors=True)


def _base(context: Context) -> tuple[Any, Any]:
    """The model before fine-tuning, and its tokenizer: loaded, or made from the training rows."""
    from tpaw_core.engine import scratch

    own, params = context.params.model, context.params
    if own.model_name_or_path is None:
        assert own.scratch is not None
        rows = read_rows(context.workspace.train_rows)
        texts = chain.from_iterable([*(m["content"] for m in row.prompt), row.completion] for row in rows)
        tokenizer = scratch.tokenizer(texts, own.scratch, own.max_length)
        return scratch.model(own.scratch, tokenizer, max_length=own.max_length, seed=params.seed), tokenizer
    source = _source(context, own.model_name_or_path)
    tokenizer = checkpoint.load_tokenizer(source, own.revision)
    dtype = "float32" if params.sft.enabled else own.dtype
    model = checkpoint.load_model(source, dtype=dtype, revision=own.revision)
    if own.chat_template is not None:
        tokenizer.chat_template = own.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _source(context: Context, name: str) -> str:
    """The folder that the recipe names, if there is one, else a hub id."""
    folder = context.workspace.input(name)
    return str(folder) if folder.exists() else name
