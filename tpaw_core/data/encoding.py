"""The one tokenisation path: generation, scoring, training and evaluation see the same ids for the same row.

A prompt is rendered by the tokenizer's chat template and tokenised by itself; a target is tokenised by itself and
ends in EOS; a generated response is kept as the ids that were generated and is never tokenised again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

from tpaw_core.data.endings import Ending, fit
from tpaw_core.data.rows import Message, Row, refuse_if_too_many
from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError

ROWS_AT_A_TIME = 1000


class EncodedRows(NamedTuple):
    """Rows as token ids; their texts stay in the file."""

    row_ids: list[str]  # Row.prompt_id of each
    prompts: TokenRows
    chosen: TokenRows  # each ends in EOS unless cut at max_length


def render(messages: list[Message], tokenizer: Any) -> str:
    """The prompt as text, ready for the response to follow."""
    if not tokenizer.chat_template:
        raise TpawError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; set one in model.chat_template "
            "so that generation and training use the same prompt"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _special(tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokens that structure a conversation."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def encode_prompts(prompts: list[list[Message]], tokenizer: Any) -> list[list[int]]:
    return _ids([render(messages, tokenizer) for messages in prompts], tokenizer)


def encode_completions(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The targets' ids, each with its end."""
    ending = Ending.of(tokenizer)
    return [ending.close(ids) for ids in _ids(texts, tokenizer)]


def encode(rows: Iterable[Row], tokenizer: Any, *, max_length: int, max_skipped: float, name: str) -> EncodedRows:
    """Rows as ids. A target that does not fit is cut at ``max_length`` tokens (without EOS, as it is not finished).

    A row is left out and reported where its prompt leaves no room for a response, or where its text holds a special
    token, which would end or begin a turn that the row does not have.
    Raises TpawError where these are more than the share ``max_skipped``.
    """
    encoded, reasons, total = EncodedRows([], TokenRows(), TokenRows()), [], 0
    special = _special(tokenizer)
    left = iter(rows)
    while some := list(islice(left, ROWS_AT_A_TIME)):
        prompts = encode_prompts([row.prompt for row in some], tokenizer)
        targets = encode_completions([row.completion for row in some], tokenizer)
        for row, prompt, chosen in zip(some, prompts, targets, strict=True):
            total += 1
            if found := special.search("\n".join([*(message["content"] for message in row.prompt), row.completion])):
                reasons.append(f"row {total}: its text holds the special token {found[0]!r}")
                continue
            if len(prompt) >= max_length:
                reasons.append(f"row {total}: its prompt has {len(prompt)} tokens, model.max_length is {max_length}")
                continue
            encoded.row_ids.append(row.prompt_id)
            encoded.prompts.append(prompt)
            encoded.chosen.append(fit(chosen, prompt, max_length))
    refuse_if_too_many(name, reasons, total, max_skipped)
    return encoded
