"""The one tokenisation path: generation, scoring, training and evaluation see the same ids for the same row.

A prompt is rendered by the tokenizer's chat template and tokenised by itself; a target is tokenised by itself and
ends in EOS; a generated response is kept as the ids that were generated and is never tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpaw_core.data import Message, Row, refuse_if_too_many
from tpaw_core.errors import TpawError

SCRATCH_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Encoded:
    row: Row
    prompt_ids: list[int]
    chosen_ids: list[int]  # ends in EOS unless cut at max_length


def render(messages: list[Message], tokenizer: Any) -> str:
    """The prompt as text, ready for the response to follow."""
    if not tokenizer.chat_template:
        raise TpawError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; give one in model.chat_template "
            "so that generation and training use the same prompt"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(messages: list[Message], tokenizer: Any) -> list[int]:
    return tokenizer(render(messages, tokenizer), add_special_tokens=False)["input_ids"]


def encode_completion(text: str, tokenizer: Any) -> list[int]:
    """The target's ids, EOS at the end."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode(rows: list[Row], tokenizer: Any, *, max_length: int, max_skipped: float, name: str) -> list[Encoded]:
    """Rows as ids. A target that does not fit is cut at ``max_length`` tokens (without EOS, as it is not finished).

    Raises TpawError where more than the share ``max_skipped`` of the prompts leave no room for a response.
    """
    encoded, reasons = [], []
    for number, row in enumerate(rows, start=1):
        prompt = encode_prompt(row.prompt, tokenizer)
        if len(prompt) >= max_length:
            reasons.append(f"row {number}: its prompt has {len(prompt)} tokens, model.max_length is {max_length}")
            continue
        chosen = encode_completion(row.completion, tokenizer)[: max_length - len(prompt)]
        encoded.append(Encoded(row, prompt, chosen))
    refuse_if_too_many(name, reasons, len(rows), max_skipped)
    return encoded
