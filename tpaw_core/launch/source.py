"""Source: which model a process loads. It can be pickled, so that every rank loads the same one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.artifacts.pretrained import Sharding
from tpaw_core.config.params import Lora, Scratch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FromScratch:
    """What a model with random weights is made from."""

    settings: Scratch
    tokenizer: Path
    max_length: int
    seed: int


@dataclass(frozen=True)
class Source:
    """A whole model; or an adapter, stored or new, on its base, which is rounded to bfloat16 first."""

    place: str = ""  # the whole model: a folder or a hub id
    revision: str | None = None
    dtype: str = "float32"  # in which it computes
    is_base: bool = False
    adapter: Path | None = None
    name: str = "default"  # of the adapter in memory
    new: tuple[Lora, int] | None = None  # settings and seed of a new adapter
    scratch: FromScratch | None = None

    def load(self, sharding: Sharding | None = None, device: str | None = None) -> PreTrainedModel:
        """In evaluation mode, by default on this process's accelerator if there is one; with ``sharding`` its share.

        Raises TpawError where it cannot be loaded.
        """
        from tpaw_core.engine import scratch

        if self.scratch is not None:
            own = self.scratch
            tokenizer = checkpoint.load_tokenizer(own.tokenizer)
            return scratch.model(own.settings, tokenizer, max_length=own.max_length, seed=own.seed)
        if not self.is_base:
            where: Any = {"sharding": sharding, "device": device}
            return checkpoint.load_model(self.place, dtype=self.dtype, revision=self.revision, **where)
        model = self.load_base(sharding, device)
        self._put_adapter_on(model)
        return model

    def load_base(self, sharding: Sharding | None = None, device: str | None = None) -> PreTrainedModel:
        """The base, without its adapter."""
        where: Any = {"sharding": sharding, "device": device}
        model = checkpoint.load_model(self.place, dtype="bfloat16", revision=self.revision, **where)
        return model.float() if self.dtype == "float32" else model

    def empty(self) -> PreTrainedModel:
        """The same without memory for the weights of the whole model."""
        if self.scratch is not None:
            return self.load()
        model = checkpoint.load_empty(self.place, self.revision)
        self._put_adapter_on(model)
        return model

    def _put_adapter_on(self, model: PreTrainedModel) -> None:
        if self.new is not None:
            adapters.attach(model, *self.new)
        elif self.adapter is not None:
            adapters.use(model, self.adapter, self.name)
