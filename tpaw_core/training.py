"""The optimisation loop: supervised fine-tuning and self-play, both on transformers.Trainer, one model in memory.

Needs torch and transformers only; must not know files of other stages, teams by name, or services.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tpaw_core.errors import Diverged, TpawError
from tpaw_core.logps import response_logps
from tpaw_core.objective import Losses, dpo_nll_loss, space_loss, spin_loss, tpaw_loss, tspin_loss
from tpaw_core.packing import Ids, Pack, Tree
from tpaw_core.progress import Progress
from tpaw_core.ragged import Ragged
from tpaw_core.scoring import Packer, Pair, by_tokens, packer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config import Objective, Optimisation

OnLog = Callable[[int, dict[str, float]], None]
NO_ROW = torch.iinfo(torch.int64).max


class Group(NamedTuple):
    """One prompt with its target and the team's responses: n triplets, K players, all constants but the ids."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: list[Ids]  # n
    players_chosen: list[float]  # [K]  log pi_j(y|x)
    players_rejected: list[list[float]]  # [n, K]  log pi_j(g|x)
    beta: list[list[float]]  # [n, K]
    first_ids: Ids | None = None  # checkpoint 0's answer, where the objective asks for it
    row: int = 0  # its place among the rows


class Groups(Sequence[Group]):
    """Rows with their n responses and K players; a group is made when it is asked for.

    ``first``: checkpoint 0's answers.  ``drop_equal``: without the responses that equal their target.
    """

    def __init__(
        self,
        prompts: Ragged,
        chosen: Ragged,
        rejected: Sequence[Ragged],  # n
        players_chosen: NDArray[np.float64],  # [rows, K]
        players_rejected: NDArray[np.float64],  # [n, rows, K]
        beta: NDArray[np.float64],  # [n, rows, K]
        *,
        first: Ragged | None = None,
        drop_equal: bool = False,
    ) -> None:
        self.prompts, self.chosen, self.rejected = prompts, chosen, rejected
        self.first, self.drop_equal = first, drop_equal
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
            None if self.first is None else self.first[row],
            int(row),
        )


class Triplets(NamedTuple):
    """One forward and backward pass: T triplets among the S responses of a pack."""

    pack: Pack
    chosen: Tensor  # [T] which response is the triplet's target
    rejected: Tensor  # [T] which is its answer
    first: Tensor  # [T] which is checkpoint 0's answer; the triplet's own answer where the objective has none
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
    rows: Tensor  # [targets] their places
    tokens: int  # in the targets of the whole batch that this is a part of


def tree(group: Group) -> Tree:
    """The prompt with each distinct response once: equal ones are not computed again."""
    responses = [group.chosen_ids, *group.rejected_ids, *([] if group.first_ids is None else [group.first_ids])]
    return group.prompt_ids, list({tuple(ids): ids for ids in responses}.values())


def triplets(groups: Sequence[Group], pack: Packer, of: int) -> Triplets:
    """A part of a batch of ``of`` groups."""
    trees, players = [tree(group) for group in groups], len(groups[0].players_chosen)
    chosen, rejected, first, before = [], [], [], 0
    for group, (_, responses) in zip(groups, trees, strict=True):
        rows = {tuple(ids): before + row for row, ids in enumerate(responses)}
        chosen += [rows[tuple(group.chosen_ids)]] * len(group.rejected_ids)
        rejected += [rows[tuple(ids)] for ids in group.rejected_ids]
        first += [rows[tuple(ids if group.first_ids is None else group.first_ids)] for ids in group.rejected_ids]
        before += len(responses)
    return Triplets(
        pack(trees),
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(rejected, dtype=torch.int64),
        torch.tensor(first, dtype=torch.int64),
        torch.tensor([len(group.chosen_ids) for group in groups for _ in group.rejected_ids]),
        torch.tensor([len(ids) for group in groups for ids in group.rejected_ids]),
        torch.tensor([group.players_chosen for group in groups for _ in group.rejected_ids]).view(-1, players),
        torch.tensor([row for group in groups for row in group.players_rejected]).view(-1, players),
        torch.tensor([row for group in groups for row in group.beta]).view(-1, players),
        torch.tensor([group.row for group in groups for _ in group.rejected_ids], dtype=torch.int64),
        of,
    )


class _Trainer(Trainer):
    """Trainer whose batch is a list of parts, each small enough for one pass; their losses add up to the batch's.

    Means for the log stay on the device until a log line is due.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # each batch is a mean: Trainer divides by how many are accumulated
        self._means: dict[str, list[tuple[Tensor, int]]] = {}
        self._broken = torch.tensor(NO_ROW)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # accelerate has brought them to the device

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.state.num_input_tokens_seen += sum(part.pack.inputs["input_ids"].numel() for part in inputs)
        return torch.stack([super(_Trainer, self).training_step(model, part) for part in inputs]).sum()

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


class SftTrainer(_Trainer):
    """Mean negative log-probability of the target's tokens."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        inputs = cast(Targets, inputs)
        logps = model(inputs.pack)
        self.watch(logps, inputs.rows)
        self.count(len(logps), {"logps/chosen": logps.mean()})
        return -logps.sum() / inputs.tokens


class SelfPlayTrainer(_Trainer):
    """E over triplets of the TPAW loss; the model's forward pass is one, however large the team."""

    def __init__(
        self, *, objective: Objective, triplets_per_group: float, tokens_per_target: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self.objective: Objective = objective
        self.triplets_per_group, self.tokens_per_target = triplets_per_group, tokens_per_target

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        inputs = cast(Triplets, inputs)
        logps = model(inputs.pack)
        chosen, rejected = logps[inputs.chosen], logps[inputs.rejected]
        # Scoring packs differently: without this, P_{t-1} = 0 at the first step would fall on either side by rounding.
        same = (chosen.detach()[:, None] - inputs.players_chosen).abs() <= 1e-5 * inputs.players_chosen.abs()
        inputs = inputs._replace(players_chosen=torch.where(same, chosen.detach()[:, None], inputs.players_chosen))
        losses = self.losses(chosen, rejected, logps[inputs.first], inputs)
        self.watch(losses.loss, inputs.rows)
        if len(chosen):
            self.count(len(chosen), reward_means(losses, inputs.beta, chosen, rejected))
        # A constant divisor keeps one batch of eight equal to eight of one, however triplets fall into them.
        return losses.loss.sum() / (inputs.groups * self.triplets_per_group)

    def losses(self, chosen: Tensor, rejected: Tensor, first: Tensor, inputs: Triplets) -> Losses:
        """What the objective makes of log pi_theta of targets, answers and checkpoint 0's answers, [T] each."""
        objective = self.objective
        scale, players = objective.lambda_, (inputs.players_chosen, inputs.players_rejected)
        match objective.name:
            case "spin":
                return spin_loss(chosen, rejected, *players, scale=scale)
            case "dpo_nll":
                return dpo_nll_loss(chosen, rejected, *players, inputs.chosen_tokens, scale=scale)
            case "space":
                return space_loss(chosen, rejected, *players, scale=scale)
            case "tspin":
                history = objective.history
                return tspin_loss(chosen, rejected, first, *players, scale=scale, history=history)
        if objective.per_token:
            by_chosen, by_rejected = (
                self.tokens_per_target / n for n in (inputs.chosen_tokens, inputs.rejected_tokens)
            )
            chosen, rejected = chosen * by_chosen, rejected * by_rejected
            players = players[0] * by_chosen[:, None], players[1] * by_rejected[:, None]
        return tpaw_loss(chosen, rejected, *players, inputs.beta, scale=scale, eta=objective.eta)


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
    row_ids: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Fine-tune ``model`` in place on (prompt ids, target ids); gives the training log, one entry a logging step."""

    def collate(places: list[int], pack: Packer) -> list[Targets]:
        tokens = sum(len(rows[place][1]) for place in places)
        parts = by_tokens(places, lambda place: (rows[place][0], [rows[place][1]]), settings.max_tokens)
        return [
            Targets(pack([(rows[place][0], [rows[place][1]]) for place in part]), torch.tensor(part), tokens)
            for part in parts
        ]

    with _policy(model, ((prompt, [ids]) for prompt, ids in rows), pad_id) as pack:
        return _run(
            SftTrainer(
                model=model,
                args=_arguments(settings, seed, state, len(rows)),
                train_dataset=range(len(rows)),
                data_collator=lambda places: collate(places, pack),
                callbacks=[_Report("sft", on_log, row_ids)],
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
    row_ids: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Train ``model`` in place on the team's triplets; gives the training log, one entry a logging step.

    ``row_ids`` name the groups. ``state`` holds resumable states; a call that finds one goes on from it and ends where
    an uninterrupted call would.

    Raises Diverged where the loss, a gradient or a log-probability is not finite.
    """

    def collate(batch: list[Group], pack: Packer) -> list[Triplets]:
        parts = by_tokens(batch, tree, settings.max_tokens)
        return [triplets(part, pack, of=len(batch)) for part in parts]

    with _policy(model, map(tree, groups), pad_id) as pack:
        return _run(
            SelfPlayTrainer(
                objective=objective,
                triplets_per_group=max(1, sum(len(group.rejected_ids) for group in groups)) / len(groups),
                tokens_per_target=sum(len(group.chosen_ids) for group in groups) / len(groups),
                model=model,
                args=_arguments(settings, seed, state, len(groups)),
                train_dataset=groups,
                data_collator=lambda batch: collate(batch, pack),
                callbacks=[_Report("training", on_log, row_ids)],
            ),
            state,
        )


@contextmanager
def _policy(model: PreTrainedModel, trees: Iterable[Tree], pad_id: int) -> Iterator[Packer]:
    """While this holds, calling ``model`` with a pack gives log-probabilities, whatever Trainer wraps around it."""
    with packer(model, trees, pad_id) as pack:
        model.forward = partial(response_logps, model)
        try:
            yield pack
        finally:
            del model.forward


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
        use_cpu=not torch.cuda.is_available(),
        **({"activation_checkpointing": True} if settings.activation_checkpointing else {}),  # new in transformers 5.18
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

    def __init__(self, what: str, send: OnLog, row_ids: Sequence[str]) -> None:
        self.what, self.send, self.row_ids = what, send, row_ids
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

    def _name(self, row: int) -> str:
        return f"the row with prompt_id {self.row_ids[row]}" if self.row_ids else f"row {row + 1}"

    def _send(self, entry: dict[str, float]) -> None:
        if "loss" not in entry:
            return
        bad = [name for name, value in entry.items() if not math.isfinite(value)]
        if bad:
            row = int(entry["row"]) if "row" in entry else None
            first = f", first in {self._name(row)}" if row is not None else ""
            raise Diverged(
                f"{self.what}: {', '.join(bad)} not finite by step {entry['step']}{first}; lower the learning rate "
                "or look at the rows. The last good state is kept, no checkpoint was made"
            )
        self.send(int(entry["step"]), {name: value for name, value in entry.items() if name != "step"})
