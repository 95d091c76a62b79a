"""The optimisation loop: supervised fine-tuning and self-play, both on transformers.Trainer, one model in memory.

Needs torch and transformers only; must not know files of other stages, teams by name, or services.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tpaw_core.errors import TpawError
from tpaw_core.objective import Losses, tpaw_loss
from tpaw_core.progress import Progress
from tpaw_core.scoring import Batch, Pair, pad, response_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config import Objective, Optimisation

OnLog = Callable[[int, dict[str, float]], None]


class Group(NamedTuple):
    """One prompt with its target and the team's responses: n triplets, K players, all constants but the ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[list[int]]  # n
    players_chosen: list[float]  # [K]  log pi_j(y|x)
    players_rejected: list[list[float]]  # [n, K]  log pi_j(g|x)
    beta: list[list[float]]  # [n, K]


class GroupBatch(NamedTuple):
    """S distinct sequences and the T triplets among them."""

    sequences: Batch  # [S, L]
    chosen: Tensor  # [T] row of the triplet's target
    rejected: Tensor  # [T] row of the triplet's response
    players_chosen: Tensor  # [T, K]
    players_rejected: Tensor  # [T, K]
    beta: Tensor  # [T, K]
    groups: int


def collate(groups: Sequence[Group], pad_id: int) -> GroupBatch:
    """Every distinct sequence of a prompt once: its target and equal responses are not computed again."""
    pairs: list[Pair] = []
    chosen, rejected = [], []
    for group in groups:
        rows: dict[tuple[int, ...], int] = {}
        for ids in (group.chosen_ids, *group.rejected_ids):
            if tuple(ids) not in rows:
                rows[tuple(ids)] = len(pairs)
                pairs.append((group.prompt_ids, ids))
        chosen += [rows[tuple(group.chosen_ids)]] * len(group.rejected_ids)
        rejected += [rows[tuple(ids)] for ids in group.rejected_ids]
    return GroupBatch(
        pad(pairs, pad_id),
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor([group.players_chosen for group in groups for _ in group.rejected_ids]),
        torch.tensor([row for group in groups for row in group.players_rejected]),
        torch.tensor([row for group in groups for row in group.beta]),
        len(groups),
    )


class _Trainer(Trainer):
    """Trainer with our means in its log: sums stay on the device until a log line is due."""

    def __init__(self, *, pad_id: int, **options: Any) -> None:
        super().__init__(**options)
        self.pad_id = pad_id
        self.model_accepts_loss_kwargs = False  # each micro-batch is a mean: Trainer divides by their number
        self._sums: dict[str, list[Tensor]] = {}

    def count(self, **means: Tensor) -> None:
        for name, value in means.items():
            self._sums.setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name, values in self._sums.items():
            logs[name] = torch.stack(values).double().mean().item()
        self._sums.clear()
        super().log(logs, *args, **kwargs)


class SftTrainer(_Trainer):
    """Mean negative log-probability of the target's tokens."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        batch = Batch(**inputs)
        logps = response_logps(model, batch)
        tokens = batch.response_mask[:, 1:].sum()
        self.count(**{"logps/chosen": logps.mean()})
        return -logps.sum() / tokens


class SelfPlayTrainer(_Trainer):
    """E over triplets of the TPAW loss; the model's forward pass is one, however large the team."""

    def __init__(self, *, objective: Objective, triplets_per_group: float, **options: Any) -> None:
        super().__init__(**options)
        self.objective: Objective = objective
        self.triplets_per_group = triplets_per_group

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        sequences = Batch(*(inputs.pop(name) for name in Batch._fields))
        batch = GroupBatch(sequences, **inputs)
        logps = response_logps(model, sequences)
        chosen, rejected = logps[batch.chosen], logps[batch.rejected]
        # Scoring pads differently: without this, P_{t-1} = 0 at the first step would fall on either side by rounding.
        same = (chosen.detach()[:, None] - batch.players_chosen).abs() <= 1e-5 * batch.players_chosen.abs()
        players_chosen = torch.where(same, chosen.detach()[:, None], batch.players_chosen)
        losses = tpaw_loss(
            chosen,
            rejected,
            players_chosen,
            batch.players_rejected,
            batch.beta,
            scale=self.objective.lambda_,
            eta=self.objective.eta,
        )
        self.count(**reward_means(losses, batch.beta, chosen, rejected))
        # A constant divisor keeps one batch of eight equal to eight of one, however triplets fall into them.
        return losses.loss.sum() / (batch.groups * self.triplets_per_group)


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


def sft(
    model: PreTrainedModel,
    rows: Sequence[Pair],
    settings: Optimisation,
    *,
    pad_id: int,
    seed: int,
    state: Path,
    on_log: OnLog,
) -> list[dict[str, float]]:
    """Fine-tune ``model`` in place on (prompt ids, target ids); gives the training log, one entry a logging step."""
    return _run(
        SftTrainer(
            pad_id=pad_id,
            model=model,
            args=_arguments(settings, seed, state, len(rows)),
            train_dataset=list(rows),
            data_collator=lambda pairs: pad(pairs, pad_id)._asdict(),
            callbacks=[_Report("sft", on_log)],
        ),
        state,
    )


def self_play(
    model: PreTrainedModel,
    groups: Sequence[Group],
    objective: Objective,
    settings: Optimisation,
    *,
    pad_id: int,
    seed: int,
    state: Path,
    on_log: OnLog,
) -> list[dict[str, float]]:
    """Train ``model`` in place on the team's triplets; gives the training log, one entry a logging step.

    ``state`` holds resumable states; a call that finds one goes on from it and ends where an uninterrupted call would.

    Raises TpawError where the loss, a gradient or a log-probability is not finite.
    """

    def flat(items: list[Group]) -> dict[str, Any]:
        batch = collate(items, pad_id)._asdict()
        return {**batch.pop("sequences")._asdict(), **batch}

    return _run(
        SelfPlayTrainer(
            objective=objective,
            triplets_per_group=sum(len(group.rejected_ids) for group in groups) / len(groups),
            pad_id=pad_id,
            model=model,
            args=_arguments(settings, seed, state, len(groups)),
            train_dataset=list(groups),
            data_collator=flat,
            callbacks=[_Report("training", on_log)],
        ),
        state,
    )


def _arguments(settings: Optimisation, seed: int, state: Path, rows: int) -> TrainingArguments:
    batch = settings.per_device_train_batch_size
    steps = math.ceil(math.ceil(rows / batch) / settings.gradient_accumulation_steps) * settings.num_train_epochs
    arguments = _checked(
        output_dir=str(state),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        activation_checkpointing=settings.activation_checkpointing,
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # Trainer would split a batch's rows over devices, and the triplets that index them
        arguments._n_gpu = 1
    return arguments


def _checked(**options: Any) -> TrainingArguments:
    try:
        return TrainingArguments(**options)
    except (ValueError, ImportError) as error:  # an unknown optimiser or schedule, bf16 where the device has none
        raise TpawError(f"sft or training: {str(error).splitlines()[0]}") from None


def _run(trainer: _Trainer, state: Path) -> list[dict[str, float]]:
    trainer.remove_callback(PrinterCallback)
    resume = _last_state(state)
    if resume is not None:
        print(f"resuming from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _last_state(state: Path) -> Path | None:
    """The newest complete state; Trainer writes trainer_state.json last, so one that lacks it was cut short."""

    def complete(folder: Path) -> bool:
        try:
            return bool(json.loads((folder / "trainer_state.json").read_text()))
        except (OSError, ValueError):
            return False

    folders = [folder for folder in state.glob("checkpoint-*") if complete(folder)]
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]), default=None)


class _Report(TrainerCallback):
    """Progress on stderr, metrics to ``on_log``, and a stop where a number is not finite."""

    def __init__(self, what: str, send: OnLog) -> None:
        self.what, self.send = what, send
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress = Progress(state.max_steps, self.what)
        self.progress.done = state.global_step
        for entry in state.log_history:
            self._send(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.progress is not None
        self.progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._send(state.log_history[-1])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.progress is not None
        self.progress.close()

    def _send(self, entry: dict[str, float]) -> None:
        if "loss" not in entry:
            return
        bad = [name for name, value in entry.items() if not math.isfinite(value)]
        if bad:
            raise TpawError(
                f"{self.what}: {', '.join(bad)} not finite by step {entry['step']}; lower the learning rate "
                "or look at the rows. The last good state is kept, no checkpoint was made"
            )
        self.send(int(entry["step"]), {name: value for name, value in entry.items() if name != "step"})
