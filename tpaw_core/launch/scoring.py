"""Scoring, here or on the ranks of a machine; scores have the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tpaw_core.artifacts.pretrained import Sharding
from tpaw_core.config.machine import Machine
from tpaw_core.data.tokens import Pair
from tpaw_core.engine import ranks, scoring
from tpaw_core.launch import launcher
from tpaw_core.launch.journal import Journal
from tpaw_core.launch.source import Source

Batch = tuple[Sequence[int], Sequence[float]]


def batches(
    machine: Machine, home: Path, source: Source, pairs: Sequence[Pair], *, sharded: bool, pad_id: int, bf16: bool
) -> Iterator[Batch]:
    """As `engine.scoring.batches`, from several ranks as each has some."""
    with launcher.folder(home) as folder:
        journals = [Journal(folder / _name(rank)) for rank in range(machine.world_size)]
        for _ in launcher.run(machine, folder, partial(_score, source, pairs, sharded, pad_id, bf16)):
            for journal in journals:
                yield from journal.new()


def _score(source: Source, pairs: Sequence[Pair], sharded: bool, pad_id: int, bf16: bool, folder: Path) -> None:
    """On a rank."""
    model = source.load(Sharding(ranks.world()) if sharded else None)
    journal = Journal(folder / _name(ranks.rank()))
    for positions, values in scoring.batches(model, pairs, pad_id=pad_id, bf16=bf16):
        journal.extend([(positions, values)])


def _name(rank: int) -> str:
    return f"scores-{rank}.jsonl"
