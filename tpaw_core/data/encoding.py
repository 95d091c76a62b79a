"""The one tokenisation: a row as its prompt's and its target's token ids, made once and read by every stage.

Prompt and target are tokenised together, as the chat template writes the conversation. The target is what follows the
prompt's ids, up to and with the first stop token. Knows tokenizers and templates; must not know models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from tpaw_core.data.endings import Ending, fit
from tpaw_core.data.messages import Unusable
from tpaw_core.data.rows import Row, refuse_if_too_many
from tpaw_core.data.tokens import TokenRows
from tpaw_core.data.turns import Turn, turn
from tpaw_core.errors import TpawError

ROWS_AT_A_TIME = 1000
ROWS_FOR_THE_END = 100  # that must agree on the token which ends a turn


class EncodedRows(NamedTuple):
    """Rows as token ids; their texts stay in the file that they come from."""

    row_ids: list[str]  # Row.prompt_id of each
    places: list[int]  # of each in its file, from 0
    prompts: TokenRows
    chosen: TokenRows  # targets; each ends in the template's end of a turn, unless cut at max_length


def find_ending(tokenizer: Any, rows: Iterable[Row], options: Mapping[str, Any], shipped: Iterable[int]) -> Ending:
    """How texts end: a target in the token with which the template ends an answer, or else in EOS.

    ``shipped``: the stop tokens that the model's own configuration names. Raises TpawError where there is no end.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = list(dict.fromkeys([*own, *shipped]))
    if unknown := [token for token in stops if not 0 <= token < len(tokenizer)]:
        raise TpawError(
            f"{tokenizer.name_or_path}: the model's configuration names the stop token {unknown[0]}, which its "
            "tokenizer does not have; correct eos_token_id in config.json and generation_config.json"
        )
    ends: set[int | None] = set()
    openings: set[str] = set()
    for row in islice(rows, ROWS_FOR_THE_END):
        with suppress(Unusable):
            own_turn = turn(tokenizer, row, options)
            ends.add(_end_of_turn(tokenizer, own_turn, stops))
            openings.add(own_turn.opening)
    if len(ends) > 1:
        names = [str(tokenizer.convert_ids_to_tokens(end)) if end is not None else "none" for end in ends]
        raise TpawError(
            f"{tokenizer.name_or_path}: its chat template ends answers with different tokens "
            f"({', '.join(sorted(names))}); set a different template in model.chat_template"
        )
    openings -= {""}
    opening = min(openings, key=len, default="")
    if not all(other.endswith(opening) for other in openings):
        raise TpawError(
            f"{tokenizer.name_or_path}: the text that its chat template writes before answers ends differently "
            f"from row to row ({', '.join(sorted(openings))}), so where an answer begins is unknown; set a different "
            "template in model.chat_template"
        )
    end = ends.pop() if ends else None
    if end is None and not own:
        raise TpawError(
            f"{tokenizer.name_or_path}: there is no token that can end an answer: the tokenizer has no EOS token, and "
            "the chat template ends no turn with a special token; set an EOS token, or set model.chat_template to a "
            "template that ends each turn with a special token"
        )
    last = own[0] if end is None else end
    return Ending(last, tuple(dict.fromkeys([last, *stops])), end is not None, opening)


def _end_of_turn(tokenizer: Any, own: Turn, stops: list[int]) -> int | None:
    """The stop token that the template writes after an answer, or else the first special token that starts no turn.

    One that starts the next turn is followed by the same words as the last one of the prompt.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tail, prompt = _ids([own.tail, own.prompt], tokenizer)
    start = prompt[max((place for place, token in enumerate(prompt) if token in special), default=0) :]
    known = next((token for token in tail if token in stops), None)
    ends = (token for place, token in enumerate(tail) if token in special and tail[place:] != start)
    return known if known is not None else next(ends, None)


def encode(
    rows: Iterable[Row],
    tokenizer: Any,
    ending: Ending,
    *,
    max_length: int,
    max_skipped: float,
    name: str,
    options: Mapping[str, Any],
) -> EncodedRows:
    """Rows as ids. A target that does not fit is cut at ``max_length`` tokens (without its end, as it is not finished).

    A row is left out and reported where its prompt leaves no room for a response, where its text holds a special token,
    which would end or begin a turn that the row does not have, or where `turn` refuses it.
    Raises TpawError where these are more than the share ``max_skipped``.
    """
    encoded, reasons, total = EncodedRows([], [], TokenRows(), TokenRows()), [], 0
    special = _special(tokenizer, ending)
    left = iter(rows)
    while some := list(islice(left, ROWS_AT_A_TIME)):
        kept: list[tuple[int, Row]] = []
        texts: list[tuple[str, str]] = []
        for place, row in enumerate(some, start=total):
            try:
                texts.append(_texts(tokenizer, row, ending, options, special))
                kept.append((place, row))
            except Unusable as reason:
                reasons.append(f"row {place + 1}: {reason}")
        total += len(some)
        for (place, row), (prompt, ids) in zip(kept, _tokenised(texts, tokenizer), strict=True):
            if ids is None:
                reasons.append(f"row {place + 1}: a token spans the boundary between its prompt and its answer")
                continue
            target = ending.close(ids)
            if len(prompt) >= max_length:
                reasons.append(
                    f"row {place + 1}: its prompt has {len(prompt)} tokens, which leaves no room for an answer "
                    f"(model.max_length is {max_length})"
                )
                continue
            if (early := ending.early(target)) is not None:
                stop = tokenizer.convert_ids_to_tokens(early)
                reasons.append(f"row {place + 1}: its target contains the stop token {stop!r} before its end")
                continue
            encoded.row_ids.append(row.prompt_id)
            encoded.places.append(place)
            encoded.prompts.append(prompt)
            encoded.chosen.append(fit(target, prompt, max_length))
    refuse_if_too_many(name, reasons, total, max_skipped)
    if total and not encoded.row_ids:
        raise TpawError(f"{name}: none of its {total} rows can be used; the first: {reasons[0]}")
    return encoded


def _texts(
    tokenizer: Any, row: Row, ending: Ending, options: Mapping[str, Any], special: re.Pattern[str]
) -> tuple[str, str]:
    """A row's prompt and target as texts, the target with its end where the template writes one."""
    contents = [message["content"] for message in row.conversation]
    others = json.dumps([row.tools, row.conversation], ensure_ascii=False)  # tools, calls of them, reasoning
    if found := special.search("\n".join([*contents, others])):
        raise Unusable(f"its text contains the special token {found[0]!r}")
    own = turn(tokenizer, row, options)
    if own.opening and not (ending.opening and own.opening.endswith(ending.opening)):
        raise Unusable(
            f"the chat template writes {own.opening!r} before this row's answer, but not before the answers of the "
            f"first {ROWS_FOR_THE_END} rows; move a row like this one among them"
        )
    if not ending.in_template:
        if own.preamble.strip():  # its end could then be mistaken
            raise Unusable(f"the chat template writes {own.preamble!r} before an answer, but no special token after it")
        if (row.answer or {}).get("tool_calls"):
            raise Unusable("its answer calls a tool, but the chat template writes no special token after the call")
        return own.prompt, own.preamble + own.answer
    end = tokenizer.convert_ids_to_tokens(ending.end_id)
    before, found_end, _ = own.tail.partition(end)
    if not found_end:
        raise Unusable(
            f"the chat template does not end this row's answer with {end!r}, although it ends other rows' answers "
            "with it"
        )
    return own.prompt, own.preamble + own.answer + before + end


def _tokenised(texts: list[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[int] | None]]:
    """Each row's prompt and target, tokenised together.

    Where a token would span the end of the prompt, the prompt keeps its own ids, as generation starts from them, and
    the target gets those that make the same text together; None where there are none.
    """
    prompts = _ids([prompt for prompt, _ in texts], tokenizer)
    together = _ids([prompt + target for prompt, target in texts], tokenizer)
    for prompt, whole, (_, target) in zip(prompts, together, texts, strict=True):
        yield (
            prompt,
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else _apart(prompt, whole, target, tokenizer),
        )


def _apart(prompt: list[int], whole: list[int], target: str, tokenizer: Any) -> list[int] | None:
    """The target tokenised by itself, or after a line break: SentencePiece puts a space before a text's first word."""
    text = tokenizer.decode(whole)
    for before in ("", "\n"):
        start, both = _ids([before, before + target], tokenizer)
        if both[: len(start)] == start and tokenizer.decode([*prompt, *both[len(start) :]]) == text:
            return both[len(start) :]
    return None


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _special(tokenizer: Any, ending: Ending) -> re.Pattern[str]:
    """Matches the tokens that structure a conversation."""
    known = tokenizer.added_tokens_decoder.items()
    added = [token.content for number, token in known if token.special or number in ending.stop_ids]
    tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")
