"""Endings: which token ends a text, how a target gets it, how long a text may be, and where an answer is cut.

Knows token ids and where a tokenizer or a model's config names the ending token; must not know torch or rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tpaw_core.data.tokens import Ids
from tpaw_core.errors import TpawError


class Response(NamedTuple):
    ids: Ids  # array("i"), as generated; a stop id is the last one exactly when the model ended the answer itself
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True)
class Ending:
    """How texts end: a target with ``eos_id``, a generated answer with any of ``stop_ids``."""

    eos_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> Ending:
        """Raises TpawError for a tokenizer that has no EOS."""
        if tokenizer.eos_token_id is None:
            raise TpawError(f"{tokenizer.name_or_path}: its tokenizer has no EOS token, so no answer could ever end")
        return cls(tokenizer.eos_token_id)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    def close(self, target: Ids) -> list[int]:
        """The target with its end; `fit` may cut it off again."""
        return [*target, self.eos_id]

    def cut(self, answer: Sequence[int], room: int) -> Response:
        """Removes what follows a stop id or exceeds ``room``; an answer without a stop id gets none."""
        ids = array("i", answer[:room])
        for place, token in enumerate(ids):
            if token in self.stop_ids:
                return Response(ids[: place + 1], "stop")
        return Response(ids, "length")


def fit(target: Sequence[int], prompt: Ids, max_length: int) -> Sequence[int]:
    """What the prompt leaves room for; a target that is cut has no EOS, as it is not finished."""
    return target[: max_length - len(prompt)]


def limits(prompts: Sequence[Ids], *, max_new_tokens: int, max_length: int) -> list[int]:
    """Tokens each response may have: what the prompt leaves of ``max_length``, at most ``max_new_tokens``."""
    return [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts]


def saved_stop_ids(model_config: Any) -> int | list[int] | None:
    """What a checkpoint's generation_config.json tells other programs to stop at: the model's own."""
    return model_config.eos_token_id
