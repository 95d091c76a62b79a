"""Resumable states of training: what Trainer itself would not write, or not read again.

They are never published, and are read by the same program only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from tpaw_core.engine import ranks

ADAPTER, DIVIDED = "adapter.safetensors", "divided"


class ResumableTrainer(Trainer):
    """Resumes adapters on a frozen base, and models whose weights are divided among ranks, on any number of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.args.save_only_model = False

    def create_optimizer(self, model: Any = None) -> Any:
        """Of the divided weights: a pass without a backward one leaves some whole, and their updates would be lost."""
        for module in cast(torch.nn.Module, self.model).modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if len({isinstance(parameter, DTensor) for _, parameter in self._trained()}) > 1:
            raise RuntimeError(f"{type(self.model).__name__}: only some of its weights are divided")
        return super().create_optimizer(model)

    @property
    def _has_frozen_base(self) -> bool:
        return bool(getattr(self.model, "peft_config", None))

    @property
    def _is_divided(self) -> bool:
        return any(isinstance(parameter, DTensor) for _, parameter in self._trained())

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        model = cast(torch.nn.Module, self.model)
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self._is_divided:
            folder.mkdir(parents=True, exist_ok=True)  # the weights follow, with the optimiser's state
        elif not self._has_frozen_base:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in self._trained()}, folder / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_divided:
            return
        if not self._has_frozen_base:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint, ADAPTER))
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(saved[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_divided:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        dcp.save(self._divided_state(), checkpoint_id=Path(output_dir, DIVIDED))
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_divided:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = self._divided_state()
        dcp.load(state, checkpoint_id=Path(checkpoint, DIVIDED))
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        model = cast(torch.nn.Module, self.model)
        set_state_dict(model, _plain(self.optimizer), model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _divided_state(self) -> dict[str, Any]:
        assert self.optimizer is not None
        model, optimiser = get_state_dict(cast(torch.nn.Module, self.model), _plain(self.optimizer))
        return {"model": model, "optim": optimiser}

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        ranks.barrier()  # trainer_state.json, which rank 0 writes next, says that all are done


def _plain(optimiser: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper."""
    found: torch.optim.Optimizer = getattr(optimiser, "optimizer", optimiser)
    return found
