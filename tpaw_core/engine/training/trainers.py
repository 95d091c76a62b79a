"""One forward and backward pass of each kind of training, and the averages that it logs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tpaw_core.engine import ranks
from tpaw_core.engine.precision import multiplies_bfloat16
from tpaw_core.engine.training.batches import Targets, Triplets
from tpaw_core.engine.training.states import ResumableTrainer
from tpaw_core.method.objectives.base import LogProbs, Losses, Settings
from tpaw_core.method.objectives.base import Objective as Loss
from tpaw_core.method.objectives.by_name import OBJECTIVES

if TYPE_CHECKING:
    from tpaw_core.config.params import Objective


NO_ROW = torch.iinfo(torch.int64).max
# Up to which share passes of one model may differ, as they are packed differently; a coarse one would hide learning.
ROUNDING, ROUNDING_OF_BFLOAT16 = 1e-5, 2**-7


class PartsTrainer(ResumableTrainer):
    """Trainer whose batch is a list of parts, each small enough for one pass; their losses add up to the batch's.

    On several ranks each has its own parts of a batch. Means for the log stay on the device until a log line is due.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # each batch is a mean: Trainer divides by how many are accumulated
        self._means: dict[str, list[tuple[Tensor, int]]] = {}
        self._broken = torch.tensor(NO_ROW)
        self._tokens = 0

    def get_train_dataloader(self) -> Any:
        """Every rank gets each whole batch, in the order of one process; the collator keeps the rank's own parts."""
        loader = super().get_train_dataloader()
        if ranks.world() > 1:
            batches: Any = loader.batch_sampler
            batches.num_processes, batches.process_index, batches.even_batches = 1, 0, False
        return loader

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # accelerate has brought them to the device

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        losses = []
        for number, part in enumerate(inputs, start=1):
            self._tokens += part.pack.inputs["input_ids"].numel() if len(part.rows) else 0
            last = number == len(inputs)
            # Gradients meet once a step; those of divided weights with each part, or every rank would keep them whole.
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part))
        return torch.stack(losses).sum()

    def count(self, rows: int, means: dict[str, Tensor]) -> None:
        for name, value in means.items():
            self._means.setdefault(name, []).append((value.detach(), rows))

    def watch(self, losses: Tensor, rows: Tensor) -> None:
        """Remember the first row whose loss was not finite, without waiting for the device."""
        if len(losses):
            worst = torch.where(losses.detach().isfinite(), NO_ROW, rows).min()
            broken = self._broken.to(worst.device)
            self._broken = torch.where(broken == NO_ROW, worst, broken)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Of all ranks, and on all: that the numbers are not finite ends every one."""
        means = {}
        for name, parts in self._means.items():
            values, rows = zip(*parts, strict=True)
            means[name] = list(zip(torch.stack(values).double().tolist(), rows, strict=True))
        everyone = ranks.gather((int(self._broken), self._tokens, means))
        self._means.clear()
        self._tokens = 0
        if (row := min(row for row, _, _ in everyone)) != NO_ROW:
            logs["row"] = row
        for name in dict.fromkeys(name for _, _, own in everyone for name in own):
            whole = [part for _, _, own in everyone for part in own.get(name, [])]
            value, count = torch.tensor(whole, dtype=torch.float64).unbind(1)
            logs[name] = (value * (count / count.sum())).sum().item()
        self.state.num_input_tokens_seen += sum(tokens for _, tokens, _ in everyone)
        logs["tokens"] = self.state.num_input_tokens_seen  # computed, each shared prompt once
        super().log(logs, *args, **kwargs)


class SftTrainer(PartsTrainer):
    """Mean negative log-probability of the target's tokens."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        inputs = cast(Targets, inputs)
        logps = model(inputs.pack)[: len(inputs.rows)]
        self.watch(logps, inputs.rows)
        if len(logps):
            self.count(len(logps), {"logps/chosen": logps.mean()})
        return -logps.sum() * ranks.world() / inputs.tokens  # gradients, and what is logged, are means over ranks


class SelfPlayTrainer(PartsTrainer):
    """The mean of the objective over triplets; the policy computes one forward pass, however large the team."""

    def __init__(
        self, *, objective: Objective, triplets_per_group: float, tokens_per_target: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self.triplets_per_group = triplets_per_group
        self.objective: Loss = OBJECTIVES[objective.name]
        mean_tokens = tokens_per_target if objective.per_token else None
        self.settings = Settings(objective.lambda_, objective.eta, objective.history, mean_tokens)

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        inputs = cast(Triplets, inputs)
        logps = model(inputs.pack)
        chosen, rejected = logps[inputs.chosen], logps[inputs.rejected]
        # Scoring packs differently: without this, P_{t-1} = 0 at the first step would fall on either side by rounding.
        # On a bfloat16 base rounding is larger than what a step changes, so that holds before the first step alone.
        before_bfloat16 = self.state.global_step == 0 and multiplies_bfloat16(cast(Any, self.model))
        near = (ROUNDING_OF_BFLOAT16 if before_bfloat16 else ROUNDING) * inputs.players_chosen.abs()
        same = (chosen.detach()[:, None] - inputs.players_chosen).abs() <= near
        players_chosen = torch.where(same, chosen.detach()[:, None], inputs.players_chosen)
        players = players_chosen, inputs.players_rejected, inputs.beta
        batch = LogProbs(
            chosen, rejected, logps[inputs.initial], *players, inputs.chosen_tokens, inputs.rejected_tokens
        )
        losses = self.objective(batch, self.settings)
        self.watch(losses.loss, inputs.rows)
        if len(chosen):
            self.count(len(chosen), reward_means(losses, inputs.beta, chosen, rejected))
        # A constant divisor keeps one batch of eight equal to eight of one, wherever the triplets fall.
        return losses.loss.sum() * ranks.world() / (inputs.groups * self.triplets_per_group)


def reward_means(losses: Losses, beta: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """TRL's metric names; rewards are means over triplets of the beta-weighted mean over players (lambda included)."""
    margins = losses.reward_chosen - losses.reward_rejected
    means = {
        "rewards/chosen": (beta * losses.reward_chosen).sum(-1).mean(),
        "rewards/rejected": (beta * losses.reward_rejected).sum(-1).mean(),
        "rewards/margins": (beta * margins).sum(-1).mean(),
        "rewards/accuracies": (beta * (margins > 0)).sum(-1).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "weights/target_active": losses.target_active.float().mean(),
    }
    for k in range(beta.shape[-1]):
        means[f"weights/player/{k}"] = beta[:, k].mean()
        means[f"players/{k}/rewards/chosen"] = losses.reward_chosen[:, k].mean()
        means[f"players/{k}/rewards/rejected"] = losses.reward_rejected[:, k].mean()
    return means
