"""What a training step takes: groups of one prompt, its target and the team's responses, as packed triplets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpaw_core.data.tokens import Ids, TokenRows
from tpaw_core.engine.packer import Packer
from tpaw_core.engine.packing import Pack, PromptGroup


class Group(NamedTuple):
    """One prompt with its target and the team's responses: n triplets, K players."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: list[Ids]  # n
    players_chosen: list[float]  # [K]  log pi_j(y|x)
    players_rejected: list[list[float]]  # [n, K]  log pi_j(g|x)
    beta: list[list[float]]  # [n, K]
    initial_ids: Ids | None = None  # checkpoint 0's answer, where the objective asks for it
    row: int = 0  # its place among the rows


class Groups(Sequence[Group]):
    """Rows with their n responses and K players; a group is made when it is asked for.

    ``initial``: checkpoint 0's answers.  ``drop_equal``: without the responses that equal their target.
    """

    def __init__(
        self,
        prompts: TokenRows,
        chosen: TokenRows,
        rejected: Sequence[TokenRows],  # n
        players_chosen: NDArray[np.float64],  # [rows, K]
        players_rejected: NDArray[np.float64],  # [n, rows, K]
        beta: NDArray[np.float64],  # [n, rows, K]
        *,
        initial: TokenRows | None = None,
        drop_equal: bool = False,
    ) -> None:
        self.prompts, self.chosen, self.rejected = prompts, chosen, rejected
        self.initial, self.drop_equal = initial, drop_equal
        self.players_chosen, self.players_rejected, self.beta = players_chosen, players_rejected, beta

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: Any) -> Any:
        chosen, rejected = self.chosen[row], [ids[row] for ids in self.rejected]
        kept = [n for n, ids in enumerate(rejected) if not (self.drop_equal and ids == chosen)]
        return Group(
            self.prompts[row],
            chosen,
            [rejected[n] for n in kept],
            self.players_chosen[row].tolist(),
            self.players_rejected[kept, row].tolist(),
            self.beta[kept, row].tolist(),
            None if self.initial is None else self.initial[row],
            int(row),
        )


class Triplets(NamedTuple):
    """One forward and backward pass: T triplets among the S responses of a pack."""

    pack: Pack
    chosen: Tensor  # [T] which response is the triplet's target
    rejected: Tensor  # [T] which is its answer
    initial: Tensor  # [T] which is checkpoint 0's answer; the triplet's own answer where the objective has none
    chosen_tokens: Tensor  # [T]
    rejected_tokens: Tensor  # [T]
    players_chosen: Tensor  # [T, K]
    players_rejected: Tensor  # [T, K]
    beta: Tensor  # [T, K]
    rows: Tensor  # [T] the group's place
    groups: int  # in the whole batch that this is a part of


class Targets(NamedTuple):
    """One forward and backward pass of SFT."""

    pack: Pack
    rows: Tensor  # [targets] their places; none where the pass only makes up the number
    tokens: int  # in the targets of the whole batch that this is a part of


def prompt_group(group: Group) -> PromptGroup:
    """The prompt with each distinct response once, so that equal ones are not computed twice."""
    responses = [group.chosen_ids, *group.rejected_ids, *([] if group.initial_ids is None else [group.initial_ids])]
    return group.prompt_ids, list({tuple(ids): ids for ids in responses}.values())


def silent(group: Group) -> Group:
    """The group without responses: its pass has no triplets and adds nothing."""
    return group._replace(rejected_ids=[], players_rejected=[], beta=[], initial_ids=None)


def triplets(groups: Sequence[Group], pack: Packer, of: int) -> Triplets:
    """A part of a batch of ``of`` groups."""
    packed, players = [prompt_group(group) for group in groups], len(groups[0].players_chosen)
    chosen, rejected, initial, before = [], [], [], 0
    for group, (_, responses) in zip(groups, packed, strict=True):
        rows = {tuple(ids): before + row for row, ids in enumerate(responses)}
        chosen += [rows[tuple(group.chosen_ids)]] * len(group.rejected_ids)
        rejected += [rows[tuple(ids)] for ids in group.rejected_ids]
        initial += [rows[tuple(ids if group.initial_ids is None else group.initial_ids)] for ids in group.rejected_ids]
        before += len(responses)
    return Triplets(
        pack(packed),
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(rejected, dtype=torch.int64),
        torch.tensor(initial, dtype=torch.int64),
        torch.tensor([len(group.chosen_ids) for group in groups for _ in group.rejected_ids]),
        torch.tensor([len(ids) for group in groups for ids in group.rejected_ids]),
        torch.tensor([group.players_chosen for group in groups for _ in group.rejected_ids]).view(-1, players),
        torch.tensor([row for group in groups for row in group.players_rejected]).view(-1, players),
        torch.tensor([row for group in groups for row in group.beta]).view(-1, players),
        torch.tensor([group.row for group in groups for _ in group.rejected_ids], dtype=torch.int64),
        of,
    )
