"""Training, here or on the ranks of a machine: the trained model in this process's memory, whoever trained it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tpaw_core.artifacts.pretrained import Sharding
from tpaw_core.config.machine import Machine
from tpaw_core.config.optimisation import Optimisation
from tpaw_core.engine import ranks
from tpaw_core.launch import launcher
from tpaw_core.launch.journal import Journal
from tpaw_core.launch.source import Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tpaw_core.engine.training.log import OnLog

STEPS, LOG, WEIGHTS = "steps.jsonl", "log.jsonl", "trained.safetensors"
Learn = Callable[..., list[dict[str, float]]]


def train(
    machine: Machine, home: Path, source: Source, learn: Learn, settings: Optimisation, on_log: OnLog, **options: Any
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """``learn(model, settings=, on_log=, **options)`` on every rank: the trained model, and its log.

    On several ranks the model comes back in main memory. ``home``: the workspace's `.tpaw`.
    """
    if machine.world_size == 1:
        model = source.load()
        return model, learn(model, settings=settings, on_log=on_log, **options)
    with launcher.folder(home) as folder:
        steps = Journal(folder / STEPS)
        for _ in launcher.run(machine, folder, partial(_learn, source, learn, settings, options)):
            for step, metrics in steps.new():
                on_log(step, metrics)
        return _filled(source, folder / WEIGHTS), Journal(folder / LOG).new()


def _learn(source: Source, learn: Learn, settings: Optimisation, options: dict[str, Any], folder: Path) -> None:
    """On a rank."""
    sharding = None
    if settings.sharded:
        frozen, bfloat16 = source.is_base, settings.bf16 is True and not source.is_base
        sharding = Sharding(ranks.world(), frozen, bfloat16, settings.cpu_offload)
    model, steps = source.load(sharding), Journal(folder / STEPS)

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if ranks.rank() == 0:
            steps.extend([(step, metrics)])

    log = learn(model, settings=settings, on_log=on_log, **options)
    trained = _whole(model)
    if ranks.rank() == 0:
        from safetensors.torch import save_file

        save_file(trained, folder / WEIGHTS)
        Journal(folder / LOG).extend(log)


def _whole(model: PreTrainedModel) -> dict[str, Tensor]:
    """On rank 0 what was trained, in main memory, each tied weight once; all ranks give their shares."""
    from torch.distributed.tensor import DTensor

    adapters = bool(getattr(model, "peft_config", None))
    found: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad or not adapters}
    if not adapters:
        kept = model.state_dict()
        found |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    whole = {}
    for name, parameter in found.items():
        tensor: Any = parameter.detach()
        if isinstance(tensor, DTensor):  # with cpu_offload it lies in main memory, where ranks cannot exchange it
            tensor = cast(Any, tensor.to(tensor.device_mesh.device_type)).full_tensor()
        if ranks.rank() == 0:
            whole[name] = tensor.cpu().contiguous()
    return whole


def _filled(source: Source, path: Path) -> PreTrainedModel:
    """The model with the weights in a file; under an adapter the base has none."""
    from safetensors.torch import load_file

    # A whole one is loaded: transformers writes under the names, and in the order, that it has found.
    model = source.empty() if source.is_base else source.load(device="cpu")
    model.load_state_dict(load_file(path), strict=False, assign=True)
    model.tie_weights()
    return model
