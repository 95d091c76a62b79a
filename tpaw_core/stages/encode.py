"""encode: the rows as token ids, once and for all stages."""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import write_encoding
from tpaw_core.config import params_file
from tpaw_core.data import encoding, endings, prepare
from tpaw_core.data.encoding import EncodedRows
from tpaw_core.data.endings import Ending
from tpaw_core.data.rows import read_rows
from tpaw_core.errors import TpawError
from tpaw_core.stages import members
from tpaw_core.stages.context import Context

logger = logging.getLogger(__name__)


def encode(context: Context) -> None:
    """Tokenizer and template fixed, every row rendered and tokenised.

    Reads: data/, the base model's tokenizer and configuration. Writes: encoded/. Refuses: a tokenizer without a
    template or an end, more than data.max_skipped rows that cannot be used.
    """
    workspace = context.workspace
    with workspace.exclusive("encode"):
        prepare.verify(workspace)
        tokenizer, shipped = base_tokenizer(context)
        if problems := reasons(tokenizer):
            raise TpawError("\n".join(problems))
        found = ending(context, tokenizer, shipped)
        write_encoding(
            workspace, tokenizer, found, {name: rows(context, tokenizer, found, name) for name in names(context)}
        )
        end, stops = (tokenizer.convert_ids_to_tokens(ids) for ids in (found.end_id, list(found.stop_ids)))
        logger.info("targets end in %s; answers stop at %s", end, ", ".join(stops))


def base_tokenizer(context: Context) -> tuple[Any, list[int]]:
    """The base model's, or one made from the rows; and the stop tokens that the model's configuration names."""
    from tpaw_core.engine import scratch

    own = context.params.model
    if own.model_name_or_path is None:
        assert own.scratch is not None
        found = read_rows(context.workspace.train_rows)
        texts = chain.from_iterable([*(m["content"] for m in row.prompt), row.completion] for row in found)
        return scratch.tokenizer(texts, own.scratch, own.max_length), []
    start = members.start(context)
    settings = checkpoint.load_settings(start.source, start.revision)
    tokenizer = checkpoint.load_tokenizer(*start.tokenizer)
    if own.chat_template is not None:
        tokenizer.chat_template = params_file.read_template(context.workspace, own.chat_template)
    shipped = endings.configured(*settings)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(shipped[0] if shipped else 0)
    return tokenizer, shipped


def reasons(tokenizer: Any) -> list[str]:
    """Why rows cannot be encoded with it."""
    from tpaw_core.engine import suitability

    return [f"{tokenizer.name_or_path}: {reason}" for reason in suitability.of_tokenizer(tokenizer)]


def ending(context: Context, tokenizer: Any, shipped: list[int]) -> Ending:
    options = context.params.model.chat_template_kwargs
    return encoding.find_ending(tokenizer, read_rows(context.workspace.train_rows), options, shipped)


def names(context: Context) -> list[str]:
    """The files of data/, without their ending."""
    return ["train", "heldout", *(["validation"] if context.workspace.validation_rows.exists() else [])]


def rows(context: Context, tokenizer: Any, found: Ending, name: str) -> EncodedRows:
    path, params = context.workspace.data / f"{name}.jsonl", context.params
    return encoding.encode(
        read_rows(path),
        tokenizer,
        found,
        max_length=params.model.max_length,
        max_skipped=params.data.max_skipped,
        name=str(path),
        options=params.model.chat_template_kwargs,
    )
