"""Generation, here or on the ranks of a machine, each with its share of the prompts."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tpaw_core.config.machine import Machine
from tpaw_core.config.params import Generation
from tpaw_core.data.endings import Response
from tpaw_core.data.tokens import Ids
from tpaw_core.engine import ranks
from tpaw_core.engine.generation import in_process, vllm_client
from tpaw_core.launch import launcher
from tpaw_core.launch.journal import Journal
from tpaw_core.launch.source import Source

RESPONSES = "responses.jsonl"


def generate(
    machine: Machine, home: Path, source: Source, prompts: Sequence[Ids], settings: Generation, **options: Any
) -> list[Response]:
    """As `in_process.generate`: the same answers on any number of ranks."""
    if machine.world_size == 1:
        return in_process.generate(source.load(), prompts, settings, **options)
    return _by_ranks(machine, home, partial(_in_process, source, prompts, settings, options))


def generate_by_vllm(
    machine: Machine, home: Path, model: str, prompts: Sequence[Ids], settings: Generation, **options: Any
) -> list[Response]:
    """As `vllm_client.generate`: a replica on every `machine.tensor_parallel` accelerators.

    A prompt keeps its seed, but vllm's last bits depend on what it computes together, unless VLLM_BATCH_INVARIANT=1.
    """
    if machine.world_size == 1:
        return vllm_client.generate(model, prompts, settings, **options)
    return _by_ranks(machine, home, partial(_by_vllm, model, prompts, settings, machine.tensor_parallel, options))


def _by_ranks(machine: Machine, home: Path, work: launcher.Work) -> list[Response]:
    with launcher.folder(home) as folder:
        for _ in launcher.run(machine, folder, work):
            pass
        return [Response(array("i", ids), reason) for ids, reason in Journal(folder / RESPONSES).new()]


def _in_process(
    source: Source, prompts: Sequence[Ids], settings: Generation, options: dict[str, Any], folder: Path
) -> None:
    _write(in_process.generate(source.load(), prompts, settings, **options), folder)


def _by_vllm(
    model: str, prompts: Sequence[Ids], settings: Generation, size: int, options: dict[str, Any], folder: Path
) -> None:
    """On a rank: the first of each replica's starts it on the accelerators of all of them, and answers for them."""
    replica, replicas = ranks.rank() // size, ranks.world() // size
    own: list[Response] = []
    numbers = range(replica, len(prompts), replicas)
    if ranks.rank() % size == 0 and numbers:
        first = int(os.environ["LOCAL_RANK"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(first + size)]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + size])}
        asked = [prompts[number] for number in numbers]
        options = {**options, "tensor_parallel": size, "numbers": numbers, "environment": environment}
        own = vllm_client.generate(model, asked, settings, **options)
    everyone = ranks.gather(own)[::size]
    _write([everyone[number % replicas][number // replicas] for number in range(len(prompts))], folder)


def _write(responses: list[Response], folder: Path) -> None:
    if ranks.rank() == 0:
        Journal(folder / RESPONSES).extend([(list(ids), reason) for ids, reason in responses])
