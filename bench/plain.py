"""Self-play the plain way: padded pairs, all logits and, on request, references scored in every step.

Needs only torch and transformers, so it can replace TRL's DPOTrainer on a bare machine; both compute the same.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from bench.rows import DEVICE, Shape, groups, model
from tpaw_core.method.objectives.base import LogProbs, Settings
from tpaw_core.method.objectives.tpaw import tpaw_loss


def logps(policy: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(response | prompt) of each row."""
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    inside = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end], mask[row, :end] = torch.tensor([*prompt, *response]), 1
        inside[row, len(prompt) - 1 : end - 1] = True
    ids, mask, inside = ids.to(DEVICE), mask.to(DEVICE), inside.to(DEVICE)
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (tokens * inside).sum(-1)


def train(shape: Shape, team: int, *, bf16: bool, live: bool, scale: float, eta: float) -> list[float]:
    """The end time of each optimiser step; ``live``: the team's models are in memory and score each step."""
    policy = model(shape)
    players = [model(shape, seed).eval() for seed in range(team)] if live else []
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    pairs = [
        (prompt, chosen, rejected) for prompt, (chosen, *responses) in groups(shape, team) for rejected in responses
    ]
    times = []
    for _ in range(1 + shape.steps):
        for start in range(0, len(pairs), shape.peer_batch):
            some = pairs[start : start + shape.peer_batch]
            rows = [(p, c) for p, c, _ in some] + [(p, r) for p, _, r in some]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                chosen, rejected = logps(policy, rows).split(len(some))
                with torch.no_grad():
                    known = [logps(player, rows) for player in players]
            table = torch.stack(known, 1) if live else torch.full((2 * len(some), 1), -50.0, device=DEVICE)
            beta = torch.full((len(some), table.shape[1]), 1 / table.shape[1], device=DEVICE)
            unread = chosen.new_empty(0)
            triplets = LogProbs(chosen, rejected, unread, *table.split(len(some)), beta, unread, unread)
            losses = tpaw_loss(triplets, Settings(scale, eta=eta))
            (losses.loss.sum() / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return times
