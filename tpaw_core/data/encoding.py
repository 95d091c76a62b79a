"""The one tokenisation: a row as its prompt's and its target's token ids, made once and read by every stage.

Prompt and target are tokenised together, as the chat template writes the conversation. The target is what follows the
prompt's ids, up to and with the first stop token. Knows tokenizers and templates; must not know models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from tpaw_core.data.endings import Ending, fit
from tpaw_core.data.rows import Message, Row, Unusable, refuse_if_too_many
from tpaw_core.data.tokens import TokenRows
from tpaw_core.errors import TpawError

ROWS_AT_A_TIME = 1000
ROWS_FOR_THE_END = 100  # that must agree on the token which ends a turn


class EncodedRows(NamedTuple):
    """Rows as token ids; their texts stay in the file that they come from."""

    row_ids: list[str]  # Row.prompt_id of each
    places: list[int]  # of each in its file, from 0
    prompts: TokenRows
    chosen: TokenRows  # targets; each ends in the template's end of a turn, unless cut at max_length


class Turn(NamedTuple):
    """The texts around an answer, as the template writes them."""

    prompt: str
    preamble: str  # what the template writes between the prompt and the answer's own text
    answer: str
    tail: str  # what it writes after it


def render(tokenizer: Any, messages: list[Message], options: Mapping[str, Any], **more: Any) -> str:
    """Raises Unusable with the template's own words where it refuses the messages."""
    if not tokenizer.chat_template:
        raise TpawError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; set one in model.chat_template "
            "so that generation and training use the same prompt"
        )
    try:
        return tokenizer.apply_chat_template(list(map(_shown, messages)), tokenize=False, **{**options, **more})
    except Exception as error:  # a template may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unusable(f"the chat template refuses it ({reason})") from None


def _shown(message: Message) -> Message:
    """With the arguments of its tool calls as objects, which templates write as JSON; rows often hold JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def turn(tokenizer: Any, row: Row, options: Mapping[str, Any]) -> Turn:
    """Where the prompt of a row ends, and its answer.

    What only the conversation writes between them, such as an empty block of reasoning, belongs to the answer: the
    model has to write it too. What only the generation prompt writes belongs to the prompt.

    Raises Unusable where the template does not show a text of the row, or where both write something of their own.
    """
    tools = {"tools": row.tools} if row.tools else {}
    prompt = render(tokenizer, row.prompt, options, add_generation_prompt=True, **tools)
    whole = render(tokenizer, row.conversation, options, **tools)
    _refuse_hidden(row, prompt)
    answer, same = row.completion.strip(), _common(prompt, whole)
    if same < len(prompt):  # the start of the answer may look like what the prompt alone has
        same = min(same, _common(render(tokenizer, row.prompt, options, add_generation_prompt=False, **tools), whole))
    reasoning = str((row.answer or {}).get("reasoning_content") or "").strip()
    shown = whole.find(reasoning, same) if reasoning else -1
    start = whole.find(answer, same if shown < 0 else shown + len(reasoning))
    if start < 0:
        raise Unusable("its answer is not in the conversation that the chat template writes")
    same = min(_common(prompt, whole), start)
    own, preamble = prompt[same:], whole[same:start]
    if own and preamble.strip():
        raise Unusable(
            f"the chat template starts an answer with {own!r} when it prompts, and with {preamble!r} in a "
            "conversation; give another one in model.chat_template, or look at model.chat_template_kwargs"
        )
    if reasoning and reasoning not in preamble:
        raise Unusable("the chat template does not show the reasoning_content of its answer")
    return Turn(prompt, "" if own else preamble, answer, whole[start + len(answer) :])


def _common(one: str, other: str) -> int:
    """How many characters both start with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _refuse_hidden(row: Row, prompt: str) -> None:
    for message in row.prompt:
        if (text := message["content"].strip()) and text not in prompt:
            raise Unusable(f"the chat template does not show its message of the role {message['role']!r}")
    calls = [call for message in row.prompt for call in message.get("tool_calls") or ()]
    for kind, shown in (("tool", row.tools or ()), ("tool call", calls)):
        for item in shown:
            name = (item.get("function") or item).get("name") if isinstance(item, dict) else None
            if name and name not in prompt:
                raise Unusable(f"the chat template does not show its {kind} {name!r}")


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
    for row in islice(rows, ROWS_FOR_THE_END):
        with suppress(Unusable):
            ends.add(_end_of_turn(tokenizer, turn(tokenizer, row, options), stops))
    if len(ends) > 1:
        names = [str(tokenizer.convert_ids_to_tokens(end)) if end is not None else "none" for end in ends]
        raise TpawError(
            f"{tokenizer.name_or_path}: its chat template ends answers with different tokens "
            f"({', '.join(sorted(names))}); set another one in model.chat_template"
        )
    end = ends.pop() if ends else None
    if end is None and not own:
        raise TpawError(
            f"{tokenizer.name_or_path}: no answer could ever end: its tokenizer has no EOS token, and its chat "
            "template ends no turn with a special token; set one of both"
        )
    last = own[0] if end is None else end
    return Ending(last, tuple(dict.fromkeys([last, *stops])), end is not None)


def _end_of_turn(tokenizer: Any, own: Turn, stops: list[int]) -> int | None:
    """The stop token that the template writes after an answer, or else the first special token that starts no turn."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tail, prompt = _ids([own.tail, own.prompt], tokenizer)
    starts = next((token for token in reversed(prompt) if token in special), None)
    known = next((token for token in tail if token in stops), None)
    return known if known is not None else next((t for t in tail if t in special and t != starts), None)


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
        kept: list[tuple[int, Row, Turn]] = []
        for place, row in enumerate(some, start=total):
            try:
                kept.append((place, row, _checked(tokenizer, row, ending, options, special)))
            except Unusable as reason:
                reasons.append(f"row {place + 1}: {reason}")
        total += len(some)
        turns = [own for _, _, own in kept]
        for (place, row, _), prompt, target in zip(kept, *_tokenised(turns, tokenizer, ending), strict=True):
            if len(prompt) >= max_length:
                reasons.append(
                    f"row {place + 1}: its prompt has {len(prompt)} tokens, model.max_length is {max_length}"
                )
                continue
            if (early := ending.early(target)) is not None:
                stop = tokenizer.convert_ids_to_tokens(early)
                reasons.append(f"row {place + 1}: its target holds the stop token {stop!r} before its end")
                continue
            encoded.row_ids.append(row.prompt_id)
            encoded.places.append(place)
            encoded.prompts.append(prompt)
            encoded.chosen.append(fit(target, prompt, max_length))
    refuse_if_too_many(name, reasons, total, max_skipped)
    if total and not encoded.row_ids:
        raise TpawError(f"{name}: none of its {total} rows can be used; the first: {reasons[0]}")
    return encoded


def _checked(tokenizer: Any, row: Row, ending: Ending, options: Mapping[str, Any], special: re.Pattern[str]) -> Turn:
    texts = [message["content"] for message in row.conversation]
    texts += [str(message.get("reasoning_content") or "") for message in row.conversation]
    if found := special.search("\n".join(texts)):
        raise Unusable(f"its text holds the special token {found[0]!r}")
    own = turn(tokenizer, row, options)
    if own.preamble.strip() and not ending.in_template:  # its end could then be mistaken
        raise Unusable(f"the chat template writes {own.preamble!r} before an answer, and no special token after it")
    return own


def _tokenised(turns: list[Turn], tokenizer: Any, ending: Ending) -> tuple[list[list[int]], list[list[int]]]:
    """Each turn's prompt and target.

    Where a token would span the end of the prompt, the prompt keeps its own ids, as generation starts from them, and
    the target's text is tokenised by itself.
    """
    end = tokenizer.convert_ids_to_tokens(ending.end_id)
    texts = []
    for own in turns:
        before, found, _ = own.tail.partition(end) if ending.in_template else ("", "", "")
        texts.append(own.preamble + own.answer + (before + found if found else ""))
    prompts = _ids([own.prompt for own in turns], tokenizer)
    together = _ids([own.prompt + text for own, text in zip(turns, texts, strict=True)], tokenizer)
    targets = []
    for prompt, whole, text in zip(prompts, together, texts, strict=True):
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _going_on(text, tokenizer)
        targets.append(ending.close(ids))
    return prompts, targets


def _going_on(text: str, tokenizer: Any) -> list[int]:
    """A text that another one precedes: some tokenizers write a space before the first word of any other."""
    before, both, alone = _ids(["\n", f"\n{text}", text], tokenizer)
    return both[len(before) :] if both[: len(before)] == before else alone


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _special(tokenizer: Any, ending: Ending) -> re.Pattern[str]:
    """Matches the tokens that structure a conversation."""
    known = tokenizer.added_tokens_decoder.items()
    added = [token.content for number, token in known if token.special or number in ending.stop_ids]
    tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")
