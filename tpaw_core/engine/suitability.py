"""Whether a model can be fine-tuned, scored and sampled here: asked of its structure, then of a few tokens.

Every refusal is a sentence that names what is wrong and what to do, so that all of them can be listed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from tpaw_core.engine.generation import way
from tpaw_core.engine.packer import packer
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?|positional)([._]|$)")


def require(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, pad_id: int) -> None:
    """Raises TpawError with every reason for which ``model`` cannot be used."""
    if found := list(reasons(model, tokenizer, max_length=max_length, pad_id=pad_id)):
        name = model.config.name_or_path or type(model).__name__
        raise TpawError(f"model {name!r} cannot be used: {'; '.join(found)}")


def reasons(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, pad_id: int
) -> Iterator[str]:
    """Why ``model`` cannot be used with texts of up to ``max_length`` tokens. Computes only where all else fits."""
    found = list(chain(of_tokenizer(tokenizer), of_structure(model, tokenizer, max_length)))
    yield from found or of_behaviour(model, pad_id)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Needs no model."""
    from jinja2 import TemplateSyntaxError

    template: Any = tokenizer.chat_template
    if not template:
        yield "its tokenizer has no chat template; set one in model.chat_template"
    elif isinstance(template, dict):
        yield (
            f"its tokenizer has several chat templates ({', '.join(sorted(template))}) and none is named default; "
            "save the one to use in a file, and set model.chat_template to its path"
        )
    else:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "2 + 3"}], tokenize=False)
        except TemplateSyntaxError as error:
            yield (
                f"its chat template is not valid Jinja (line {error.lineno}: {error.message}); give another one in "
                "model.chat_template"
            )
        except Exception:  # a template may refuse a conversation: its rows are then refused one by one
            return


def of_structure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[str]:
    """Needs no weights: ``model`` may lie on the device meta."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield "it has no weights that can be trained; use a model with floating-point weights"
    layers: tuple[Any, ...] = model.get_input_embeddings(), model.get_output_embeddings()
    rows = min(len(layer.weight) for layer in layers if layer is not None)
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        yield (
            f"{len(beyond)} tokens of its tokenizer have no embedding (the embedding has {rows} rows; "
            f"{', '.join(f'{token!r} is {number}' for number, token in beyond[:3])}); add rows with "
            f"resize_token_embeddings({beyond[-1][0] + 1}) of transformers, or remove the tokens; then save the "
            "model again"
        )
    limit, why = _longest(model)
    if limit is not None and limit < max_length:
        yield f"model.max_length is {max_length}, but {why}; set model.max_length={limit} or lower"


def of_behaviour(model: PreTrainedModel, pad_id: int) -> Iterator[str]:
    """Computes a few tokens: are log-probabilities numbers, and does decoding choose from the same ones?"""
    try:
        with packer(model, [], pad_id):
            pass
        way.find(model, pad_id)
    except TpawError as error:
        yield str(error)
    except Exception as error:  # whatever a model raises on three short texts, it is not for it to be trained here
        first = (str(error).splitlines() or [""])[0]
        yield (
            f"{type(model).__name__} fails on a short test input ({type(error).__name__}: {first}); correct "
            "its config.json, or use another model"
        )


def _longest(model: PreTrainedModel) -> tuple[int | None, str]:
    """The longest text whose tokens get the positions that they would get in any other, and why; None: any length."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    limits: list[tuple[int, str]] = []
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        # Some tables begin with a row or two that no position uses.
        if positions and tensor.dim() == 2 and 0 <= len(tensor) - positions <= 2 and POSITIONS.search(name):
            limits.append((positions, f"it has {positions} positions ({name})"))
    if slopes := getattr(config, "max_seq_len", None):
        limits.append((slopes, f"it has {slopes} positions (max_seq_len in its config.json)"))
    rope = getattr(config, "rope_parameters", None) or {}
    for own in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if own.get("rope_type") in ("dynamic", "longrope"):
            first = min(filter(None, (own.get("original_max_position_embeddings"), positions)))
            why = f"it scales RoPE ({own['rope_type']}): one text of over {first} tokens changes its whole batch"
            limits.append((first, why))
    return min(limits, default=(None, ""))
