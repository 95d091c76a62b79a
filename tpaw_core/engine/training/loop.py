"""The two ways to train a model: supervised fine-tuning, and self-play against a team."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from tpaw_core.data.tokens import Pair
from tpaw_core.engine import ranks
from tpaw_core.engine.packer import Packer, packer
from tpaw_core.engine.packing import PromptGroup, tokens
from tpaw_core.engine.precision import fastest
from tpaw_core.engine.training.batches import Group, Targets, Triplets, prompt_group, silent, triplets
from tpaw_core.engine.training.dropout import without_dropout
from tpaw_core.engine.training.log import OnLog, TrainingLog
from tpaw_core.engine.training.trainers import PartsTrainer, SelfPlayTrainer, SftTrainer
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config.optimisation import Optimisation
    from tpaw_core.config.params import Objective

logger = logging.getLogger(__name__)


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
    """Fine-tune ``model`` in place on (prompt ids, target ids). Returns the log, one entry per logging step.

    Dropout stays as the model's config has it, as in TRL's SFTTrainer.
    """

    probe("sft", settings)

    def collate(places: list[int], pack: Packer) -> list[Targets]:
        found = [(rows[place][0], [rows[place][1]]) for place in places]
        own = ranks.spread(list(map(tokens, found)), settings.max_tokens, ranks.world())[ranks.rank()]
        predicted = sum(len(rows[place][1]) for place in places)
        return [
            Targets(
                pack([found[i] for i in part] or found[:1]),
                torch.tensor([places[i] for i in part], dtype=torch.int64),
                predicted,
            )
            for part in own
        ]

    with _policy(model, ((prompt, [ids]) for prompt, ids in rows), pad_id) as pack:
        return _run(
            SftTrainer(
                model=model,
                args=_arguments(model, settings, seed, state, len(rows)),
                train_dataset=range(len(rows)),
                data_collator=lambda places: collate(places, pack),
                callbacks=[TrainingLog("sft", on_log, row_ids)],
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
    """Train ``model`` in place on the team's triplets, without dropout. Returns the log, one entry per logging step.

    ``row_ids`` name the groups. ``state`` holds resumable states; a call that finds one resumes from it and ends where
    an uninterrupted call would.

    Raises Diverged where the loss, a gradient or a log-probability is not finite.
    """

    probe("training", settings)

    def collate(batch: list[Group], pack: Packer) -> list[Triplets]:
        sizes = [tokens(prompt_group(group)) for group in batch]
        own = ranks.spread(sizes, settings.max_tokens, ranks.world())[ranks.rank()]
        return [triplets([batch[i] for i in part] or [silent(batch[0])], pack, of=len(batch)) for part in own]

    with without_dropout(model), _policy(model, map(prompt_group, groups), pad_id) as pack:
        return _run(
            SelfPlayTrainer(
                objective=objective,
                triplets_per_group=max(1, sum(len(group.rejected_ids) for group in groups)) / len(groups),
                tokens_per_target=sum(len(group.chosen_ids) for group in groups) / len(groups),
                model=model,
                args=_arguments(model, settings, seed, state, len(groups)),
                train_dataset=groups,
                data_collator=lambda batch: collate(batch, pack),
                callbacks=[TrainingLog("training", on_log, row_ids)],
            ),
            state,
        )


@contextmanager
def _policy(model: PreTrainedModel, groups: Iterable[PromptGroup], pad_id: int) -> Iterator[Packer]:
    """The way to pack for ``model``; afterwards it is as it was before Trainer had it."""
    cached = getattr(model.config, "use_cache", None)
    with packer(model, groups, pad_id) as pack:
        try:
            yield pack
        finally:
            # Accelerate's marks: it would leave a model that bears them as it is, and the next run without autocast.
            for mark in ("_is_accelerate_prepared", "_original_forward"):
                vars(model).pop(mark, None)
            if cached is not None:
                model.config.use_cache = cached  # Trainer has turned it off, and it would be saved so


def _arguments(
    model: PreTrainedModel, settings: Optimisation, seed: int, state: Path, rows: int, *, probing: bool = False
) -> TrainingArguments:
    """``probing``: for a layer instead of a model, which checkpoints no activations."""
    if not probing:
        need_checkpointing(model, settings)
    batch = settings.train_batch_size
    bf16 = fastest().precision == "bfloat16" if settings.bf16 == "auto" else settings.bf16
    # new in transformers 5.18
    checkpointing: dict[str, Any] = {}
    if settings.activation_checkpointing and not probing:
        checkpointing["activation_checkpointing"] = True
    steps = math.ceil(rows / batch) * settings.num_train_epochs
    arguments = TrainingArguments(
        output_dir=str(state),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=batch,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16 and not settings.sharded,  # its layers round their own weights when they are gathered
        use_cpu=not torch.cuda.is_available(),
        **checkpointing,
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
        ddp_find_unused_parameters=False,
        save_only_model=settings.sharded,  # Trainer asks for that; PartsTrainer saves what it would leave out
    )
    if arguments.n_gpu > 1:  # Trainer would split a batch's rows over devices, and the triplets that index them
        arguments._n_gpu = 1
    return arguments


def need_checkpointing(model: PreTrainedModel, settings: Optimisation) -> None:
    """Raise TpawError if the settings ask for activation checkpointing and the model does not support it."""
    if settings.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise TpawError(
            f"{type(model).__name__} does not support activation checkpointing; set sft.activation_checkpointing=false "
            "and training.activation_checkpointing=false"
        )


def probe(section: str, settings: Optimisation) -> None:
    """One step of a small layer with the section's optimiser and schedule. Raises TpawError if it fails."""
    layer = torch.nn.Linear(2, 2)
    try:
        with tempfile.TemporaryDirectory(prefix="tpaw-probe-") as folder:
            trainer = Trainer(
                layer, _arguments(cast("PreTrainedModel", layer), settings, 0, Path(folder), rows=100, probing=True)
            )
            trainer.create_optimizer_and_scheduler(100)
            layer(torch.ones(1, 2, device=layer.weight.device)).sum().backward()
            assert trainer.optimizer is not None
            assert trainer.lr_scheduler is not None
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
    except Exception as error:  # an unknown name, a package that is missing, an option that has no key here
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        used = f"optim={settings.optim}, lr_scheduler_type={settings.lr_scheduler_type}, bf16={settings.bf16}"
        raise TpawError(f"{section}: training fails with {used}: {reason}") from None


def _run(trainer: PartsTrainer, state: Path) -> list[dict[str, float]]:
    trainer.remove_callback(PrinterCallback)
    resume = _last_state(state)
    if resume is not None:
        logger.info("resuming from %s", resume)
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
