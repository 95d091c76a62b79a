"""One forward and backward pass of each kind of training, and the averages that it logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from tpaw_core.engine.training.batches import Targets, Triplets
from tpaw_core.method.objectives.base import LogProbs, Losses, Settings
from tpaw_core.method.objectives.base import Objective as Loss
from tpaw_core.method.objectives.by_name import OBJECTIVES

if TYPE_CHECKING:
    from tpaw_core.config.params import Objective


NO_ROW = torch.iinfo(torch.int64).max
STATE = "adapter.safetensors"
# Up to which share passes of one model may differ, as they are packed differently; a coarse one would hide learning.
ROUNDING, ROUNDING_OF_BFLOAT16 = 1e-5, 2**-7


class PartsTrainer(Trainer):
    """Trainer whose batch is a list of parts, each small enough for one pass; their losses add up to the batch's.

    Means for the log stay on the device until a log line is due.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # each batch is a mean: Trainer divides by how many are accumulated
        self._means: dict[str, list[tuple[Tensor, int]]] = {}
        self._broken = torch.tensor(NO_ROW)

    @property
    def _has_frozen_base(self) -> bool:
        return bool(getattr(self.model, "peft_config", None))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Of adapters on a frozen base, a state holds the adapter alone; Trainer would not read what it writes."""
        if not self._has_frozen_base:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained()}, folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._has_frozen_base:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint, STATE))
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(saved[name])

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        model = cast(torch.nn.Module, self.model)
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # accelerate has brought them to the device

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.state.num_input_tokens_seen += sum(part.pack.inputs["input_ids"].numel() for part in inputs)
        return torch.stack([super(PartsTrainer, self).training_step(model, part) for part in inputs]).sum()

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
        if (row := int(self._broken)) != NO_ROW:
            logs["row"] = row
        for name, parts in self._means.items():
            values, rows = zip(*parts, strict=True)
            share = torch.tensor(rows, dtype=torch.float64) / sum(rows)
            logs[name] = (torch.stack(values).double().cpu() * share).sum().item()
        self._means.clear()
        logs["tokens"] = self.state.num_input_tokens_seen  # computed, each shared prompt once
        super().log(logs, *args, **kwargs)


class SftTrainer(PartsTrainer):
    """Mean negative log-probability of the target's tokens."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        inputs = cast(Targets, inputs)
        logps = model(inputs.pack)
        self.watch(logps, inputs.rows)
        self.count(len(logps), {"logps/chosen": logps.mean()})
        return -logps.sum() / inputs.tokens


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
        before_bfloat16 = self.state.global_step == 0 and cast(Any, self.model).dtype == torch.bfloat16
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
        return losses.loss.sum() / (inputs.groups * self.triplets_per_group)


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
