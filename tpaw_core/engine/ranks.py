"""The processes that share a computation, an accelerator each: those of torch.distributed, or this one alone.

Every rank decides by the same rule what is whose, so nothing is agreed on in messages, and all compute equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from tpaw_core.engine.packing import split

T = TypeVar("T")


def world() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one; 0 writes and reports."""
    return dist.get_rank() if world() > 1 else 0


def gather(own: T) -> list[T]:
    """What each rank has, in their order."""
    everyone: list[Any] = [own] * world()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, own)
    return everyone


def barrier() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()


def spread(sizes: Sequence[int], most: int, ranks: int) -> list[list[list[int]]]:
    """Each rank's parts: every place in exactly one, no part above ``most`` but of one place, equally many per rank.

    A part without places makes up the number: a rank that computed less often would be waited for without end.
    """
    if ranks == 1:
        return [split(sizes, most)]
    loads = [0] * ranks
    owned: list[list[int]] = [[] for _ in loads]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        lightest = loads.index(min(loads))
        owned[lightest].append(place)
        loads[lightest] += sizes[place]
    shares = []
    for places in map(sorted, owned):
        shares.append([[places[i] for i in part] for part in split([sizes[place] for place in places], most)])
    passes = max(map(len, shares))
    for share in shares:
        while len(share) < passes:
            longest = max(share, key=len, default=[])
            half = len(longest) // 2
            share.append(longest[:half])
            if half:
                share[share.index(longest)] = longest[half:]
    return shares
