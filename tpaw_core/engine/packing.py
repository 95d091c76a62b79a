"""Packed batches: every prompt once, followed by its responses; the linear layers see no padding at all.

A group is one prompt with its responses. All prompts of a batch come first, then all responses, as one sequence. Each
response's positions continue from its prompt's end, and `attention` keeps the responses apart. The last token of a
response predicts nothing, so it is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpaw_core.data.tokens import Ids

PromptGroup = tuple[Ids, Sequence[Ids]]  # prompt ids, the ids of its responses


class Layout(NamedTuple):
    """Where the tokens of B prompts (at most P long) and S responses (at most R computed tokens) lie."""

    shape: tuple[int, int, int, int]  # B, P, S, R
    prompt_slots: Tensor  # [prompt tokens] -> B * P
    response_slots: Tensor  # [response tokens] -> S * R
    prompt_of: Tensor  # [S] -> B
    prompts: Tensor  # [B] tokens
    prompt_index: Tensor  # [tokens] -> B
    response_index: Tensor  # [tokens] -> S, -1 in a prompt


class Pack(NamedTuple):
    """What a model computes, and where its hidden states predict response tokens."""

    inputs: dict[str, Any]  # arguments of the base model; input_ids [1, tokens] or, not shared, [S, length]
    source: Tensor  # [N] flat position whose hidden state predicts the token
    target: Tensor  # [N] the token
    sequence: Tensor  # [N] -> S, the response it belongs to
    responses: int  # S
    by_logits: bool = False  # whether the model's own logits are needed, as its hidden states do not give them

    def to(self, device: torch.device) -> Pack:
        return Pack(*(_moved(part, device) for part in self))


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, dict):
        return {name: _moved(value, device) for name, value in part.items()}
    return Layout(*(_moved(item, device) for item in part)) if isinstance(part, Layout) else part


def tokens(group: PromptGroup) -> int:
    """How many tokens a group costs when its prompt is shared."""
    prompt, responses = group
    return len(prompt) + sum(map(len, responses))


def pack(groups: Sequence[PromptGroup]) -> Pack:
    """Groups as one sequence without padding, each prompt once; responses in the order given."""
    prompts = _lengths([prompt for prompt, _ in groups])
    whole = _lengths([ids for _, responses in groups for ids in responses])
    responses = np.maximum(whole - 1, 0)
    prompt_of = np.repeat(np.arange(len(groups)), [len(responses) for _, responses in groups])
    in_prompt, in_response = _within(prompts), _within(responses)
    widest, longest = int(prompts.max()), int(responses.max(initial=0))
    position = np.concatenate([in_prompt, np.repeat(prompts[prompt_of], responses) + in_response])
    flat = [np.asarray(response, np.int64) for _, responses in groups for response in responses]
    ids = np.concatenate([*(np.asarray(prompt, np.int64) for prompt, _ in groups), *(ids[:-1] for ids in flat)])

    # The token before the first one of a response is its prompt's last, before another one its neighbour.
    sequence = np.repeat(np.arange(len(whole)), whole)
    first = _within(whole) == 0
    source = prompts.sum() + np.cumsum(~first) - 1
    source[first] = (np.cumsum(prompts) - 1)[prompt_of[sequence[first]]]

    layout = Layout(
        (len(groups), widest, len(whole), longest),
        torch.from_numpy(np.repeat(np.arange(len(groups)) * widest, prompts) + in_prompt),
        torch.from_numpy(np.repeat(np.arange(len(whole)) * longest, responses) + in_response),
        torch.from_numpy(prompt_of),
        torch.from_numpy(prompts),
        torch.from_numpy(np.concatenate([np.repeat(np.arange(len(groups)), prompts), np.repeat(prompt_of, responses)])),
        torch.from_numpy(np.concatenate([np.full(prompts.sum(), -1), np.repeat(np.arange(len(whole)), responses)])),
    )
    return Pack(
        {"input_ids": torch.from_numpy(ids)[None], "position_ids": torch.from_numpy(position)[None], "layout": layout},
        torch.from_numpy(source),
        torch.from_numpy(np.concatenate(flat)),
        torch.from_numpy(sequence),
        len(whole),
    )


def pad(groups: Sequence[PromptGroup], pad_id: int) -> Pack:
    """The same groups as plain rows padded on the right, the prompt before each of its responses."""
    pairs = [(prompt, response) for prompt, responses in groups for response in responses]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = np.full((len(pairs), length), pad_id)
    attention = np.zeros_like(ids)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = [*prompt, *response]
        attention[row, :end] = 1
    whole = _lengths([response for _, response in pairs])
    sequence = np.repeat(np.arange(len(pairs)), whole)
    starts = np.arange(len(pairs)) * length + _lengths([prompt for prompt, _ in pairs])
    source = starts[sequence] + _within(whole) - 1
    return Pack(
        {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attention)},
        torch.from_numpy(source),
        torch.from_numpy(ids.reshape(-1)[source + 1]),
        torch.from_numpy(sequence),
        len(pairs),
    )


def _lengths(items: Sequence[Ids]) -> NDArray[np.int64]:
    return np.fromiter(map(len, items), np.int64, len(items))


def _within(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..n-1 for each length n, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def split(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Places in ``sizes``, in their order, in parts of at most ``most``; what is larger is a part by itself."""
    parts: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(place)
        room -= size
    return parts
