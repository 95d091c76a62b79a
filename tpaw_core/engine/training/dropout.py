"""No dropout while a policy is compared with its own earlier log-probabilities, as in TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, ``model`` computes as in evaluation, whatever Trainer sets.

    Dropout, noise in routers and layers that are left out all follow the mode, where a config has a dozen names for
    them. What asks for training, activation checkpointing, is kept. The config is not touched.
    """
    policy: Any = model
    before, mode = model.training, type(model).train

    def train(training: bool = True) -> Any:
        mode(model, False)
        layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            if training and layer.gradient_checkpointing:
                layer.training = True
                if not isinstance(layer._gradient_checkpointing_func, _Evaluated):
                    layer._gradient_checkpointing_func = _Evaluated(layer, layer._gradient_checkpointing_func)
        return model

    policy.train = train
    try:
        model.train(before)
        yield
    finally:
        del policy.train
        for layer in policy.modules():
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(function, _Evaluated):
                layer._gradient_checkpointing_func = function.checkpoint
        model.train(before)


class _Evaluated:
    """Checkpoints a layer that asks to be, but computes it in evaluation mode, both times."""

    def __init__(self, layer: Any, checkpoint: Callable[..., Any]) -> None:
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        def evaluated(*inputs: Any) -> Any:
            self.layer.training = False
            try:
                return forward(*inputs)
            finally:
                self.layer.training = True

        return self.checkpoint(evaluated, *inputs)
