"""Endings: which token ends a text, how a target gets it, how long a text may be, and where an answer is cut.

Knows token ids and where a tokenizer or a model's config names the ending token; must not know torch or rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tpaw_core.data.tokens import Ids


class Response(NamedTuple):
    ids: Ids  # array("i"), as generated; a stop id is the last one exactly when the model ended the answer itself
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True)
class Ending:
    """How texts end: a target with ``end_id``, a generated answer with any of ``stop_ids``."""

    end_id: int
    stop_ids: tuple[int, ...]  # end_id among them
    in_template: bool = False  # whether the chat template itself writes end_id after an answer
    opening: str = ""  # the last word that it writes before an answer's own text, such as </think>

    def close(self, target: Ids) -> list[int]:
        """The target with ``end_id`` at its end, once."""
        return list(target) if len(target) and target[-1] == self.end_id else [*target, self.end_id]

    def early(self, target: Ids) -> int | None:
        """A stop token before the target's end: an answer would stop there."""
        return next((token for token in target[:-1] if token in self.stop_ids), None)

    def answer(self, text: str) -> str:
        """An answer's own text, without the reasoning before it."""
        return (text.rpartition(self.opening)[2] if self.opening else text).strip()

    def cut(self, answer: Sequence[int], room: int) -> Response:
        """Removes what follows a stop token or exceeds ``room``; an answer without one gets none."""
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


def configured(*settings: Any) -> list[int]:
    """The stop tokens that a model's config and generation config name, in that order."""
    found: list[int] = []
    for setting in settings:
        own = getattr(setting, "eos_token_id", None)
        found += own if isinstance(own, (list, tuple)) else [] if own is None else [own]
    return [int(token) for token in dict.fromkeys(found)]
