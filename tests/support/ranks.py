"""A small model, groups and settings that two processes share out unevenly, and what a rank does in tests."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    set_seed,
)

from tpaw_core.config.machine import Machine
from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Objective
from tpaw_core.engine import attention, ranks
from tpaw_core.engine.packer import packer
from tpaw_core.engine.packing import PromptGroup
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group
from tpaw_core.errors import Diverged
from tpaw_core.launch import training
from tpaw_core.launch.source import Source

VOCABULARY = 98
TWO = Machine(processes=2)


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def save_model(folder: Path, *, tied: bool) -> Path:
    set_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **SHAPE)).save_pretrained(folder)
    return folder


def save_phi(folder: Path) -> Path:
    """Its output projection has a bias, and is not gathered with the last norm."""
    set_seed(1)
    PhiForCausalLM(PhiConfig(vocab_size=VOCABULARY + 1, **SHAPE)).save_pretrained(folder)
    return folder


def save_nemotron(folder: Path) -> Path:
    """Untied; a pass with packed attention breaks off in its first layer."""
    set_seed(1)
    NemotronForCausalLM(NemotronConfig(vocab_size=VOCABULARY + 1, **SHAPE)).save_pretrained(folder)
    return folder


def make_groups() -> list[Group]:
    """22 groups of very different lengths, two of them without a response, as drop_equal leaves them."""
    draw = random.Random(3)

    def ids(most: int) -> list[int]:
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, most))]

    made = []
    for row in range(22):
        rejected = [] if row in (4, 5) else [ids(20), ids(4)]
        players = [[-40.0, -41.0], [-20.0, -21.0]][: len(rejected)]
        made.append(Group(ids(9), ids(9), rejected, [-30.0, -29.0], players, [[0.5, 0.5]] * len(rejected), None, row))
    return made


def settings(**changes: Any) -> Optimisation:
    """Seven prompts a step: the last step has one, fewer than there are ranks."""
    base = {"learning_rate": 1e-3, "num_train_epochs": 2, "train_batch_size": 7, "max_tokens": 60, "warmup_ratio": 0}
    return Optimisation.model_validate({**base, "logging_steps": 1, "save_steps": 2, **changes})


def train(
    machine: Machine, source: Source, home: Path, learn: Any = loop.self_play, state: str = "state", **changes: Any
) -> tuple[Any, list[dict[str, float]]]:
    groups = make_groups()
    own: dict[str, Any] = {"groups": groups, "objective": Objective.model_validate({"lambda": 0.1})}
    if learn is loop.sft:
        own = {"rows": [(group.prompt_ids, group.chosen_ids) for group in groups]}
    place = home / f"{state}-{machine.processes}"
    options: dict[str, Any] = {"pad_id": 0, "seed": 5, "state": place, **own}
    return training.train(machine, home, source, learn, settings(**changes), lambda step, metrics: None, **options)


def self_play_until_killed(model: Any, *, on_log: Any, **options: Any) -> Any:
    """Rank 1 is killed after the third step."""

    def killed(step: int, metrics: dict[str, float]) -> None:
        on_log(step, metrics)
        if ranks.rank() == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    return loop.self_play(model, on_log=killed, **options)


def self_play_until_it_diverges(model: Any, *, on_log: Any, **options: Any) -> Any:
    """After the third step."""

    def ended(step: int, metrics: dict[str, float]) -> None:
        on_log(step, metrics)
        if step == 3:
            raise Diverged("ended here")

    return loop.self_play(model, on_log=ended, **options)


def self_play_with_a_nan(model: Any, *, groups: list[Group], **options: Any) -> Any:
    """The row 11, wherever it falls, has a player without a number."""
    groups[11] = groups[11]._replace(players_chosen=[float("nan"), 0.0])
    return loop.self_play(model, groups=groups, row_ids=[f"id-{row}" for row in range(len(groups))], **options)


def wait(folder: Path) -> None:
    """Say who this is, and stay."""
    (folder / f"pid-{ranks.rank()}").write_text(str(os.getpid()))
    time.sleep(60)


def probe(sources: dict[str, tuple[Source, Any]], groups: list[PromptGroup], folder: Path) -> None:
    """What `logps_and_gradients` finds for each model, from rank 0."""
    found = {name: logps_and_gradients(source.load(sharding), groups) for name, (source, sharding) in sources.items()}
    if ranks.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


def logps_and_gradients(model: Any, groups: list[PromptGroup]) -> dict[str, Any]:
    """Of two steps of two parts each; and how many of their passes built an index."""
    built = 0
    make = attention._index

    def counted(layout: Any) -> Any:
        nonlocal built
        built += 1
        return make(layout)

    attention._index = counted  # type: ignore[assignment]
    found: dict[str, Any] = {"logps": [], "gradients": []}
    with packer(model, groups, 0) as pack:
        built = 0
        for _ in range(2):
            for part in (groups[:2], groups[2:]):
                logps = model(pack(part))
                found["dtype"] = str(logps.dtype)
                found["logps"].append(logps.tolist())
                (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
            found["gradients"].append({n: _whole(p.grad).tolist() for n, p in model.named_parameters()})
            model.zero_grad()
    attention._index = make
    return {**found, "built": built}


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
