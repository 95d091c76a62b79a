"""Precision: which numbers a model multiplies in training, scoring and generation, and which a checkpoint stores.

In training and scoring the weights stay float32, and bfloat16 means that their products are (autocast); generation
casts the weights themselves. Knows devices and tensors; must not know stages or files.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config.optimisation import Optimisation
    from tpaw_core.config.params import Precision

CPU_FLAGS = Path("/proc/cpuinfo")
MULTIPLY = {"amx_bf16", "avx512_bf16"}  # without them a processor emulates bfloat16, many times slower
logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    precision: Precision
    reason: str


@cache
def fastest() -> Choice:
    """What this device multiplies faster. Asked, not timed: the same on every call and on every device of one kind."""
    if torch.cuda.is_available():
        has, name = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    else:
        has, name = _processor_multiplies_bfloat16(), "this processor"
    if has:
        return Choice("bfloat16", f"{name} multiplies it faster than float32")
    return Choice("float32", f"{name} has no bfloat16 arithmetic and would emulate it")


def _processor_multiplies_bfloat16() -> bool:
    try:
        return not MULTIPLY.isdisjoint(CPU_FLAGS.read_text(encoding="utf-8").split())
    except OSError:  # not Linux
        return False


def of_products(bf16: bool | Literal["auto"], key: str = "bf16") -> Precision:
    """The precision that ``bf16`` asks for, said in a line where the device decides it or is slow at it.

    ``key`` is where ``bf16`` was set, for that line.
    """
    best, reason = fastest()
    if bf16 == "auto":
        logger.info("%s=auto: %s, as %s", key, best, reason)
        return best
    if bf16 and best == "float32":
        logger.warning("%s: bfloat16, but %s; a step may take 20 times as long as in float32", key, reason)
    return "bfloat16" if bf16 else "float32"


def settled(settings: Optimisation, section: str, scored: Precision | None = None) -> Optimisation:
    """``settings`` with bf16 true or false: as ``scored`` if given, else what they ask for; ``section`` names them."""
    wanted = settings.bf16 if scored is None else scored == "bfloat16"
    return settings.model_copy(update={"bf16": of_products(wanted, f"{section}.bf16") == "bfloat16"})


def on_a_base(settings: Optimisation) -> Optimisation:
    """``settings`` for adapters on a bfloat16 base, whatever bf16 says: no autocast, which would round them too."""
    best, reason = fastest()
    if best == "float32":
        logger.warning("lora: its base is in bfloat16, but %s; a step may take 20 times as long", reason)
    return settings.model_copy(update={"bf16": False})


def of_generation(dtype: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """What generation casts the weights to."""
    if dtype != "auto":
        return dtype
    best, reason = fastest()
    logger.info("generation.dtype=auto: %s, as %s", best, reason)
    return best


def multiplies_bfloat16(model: PreTrainedModel) -> bool:
    """Whether its layers compute in bfloat16 by themselves, not by autocast: in their weights, or copies of them."""
    divided = getattr(model.config, "distributed_config", None)
    return model.dtype in (torch.bfloat16, torch.float16) or bool(divided and divided.fsdp_mixed_precision)


def checkpoint_bytes(parameters: int, dtype: str) -> int:
    """What so many parameters take on disk in ``dtype``, a name in torch."""
    size: int = getattr(torch, dtype).itemsize
    return parameters * size


@torch.no_grad()
def update_kept(trained: torch.nn.Module, before: torch.nn.Module | None, dtype: str) -> float:
    """The share of its update that ``trained`` keeps when it is stored in ``dtype``.

    1 - |stored - trained| / |trained - before|, Euclidean norms over all parameters; 0 where rounding is larger than
    the update. ``before`` None: trained from nothing, so that all of it is update. Needs room for one tensor more.
    """
    parents = {} if before is None else dict(before.named_parameters())
    stored, rounding, update = getattr(torch, dtype), 0.0, 0.0
    for name, parameter in trained.named_parameters():
        rounding += _norm(parameter.to(stored).to(parameter.dtype) - parameter) ** 2
        change = parameter - parents[name].to(parameter) if parents else parameter
        update += _norm(change) ** 2
    if rounding == 0:
        return 1.0
    return max(0.0, 1 - math.sqrt(rounding / update)) if update else 0.0


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
