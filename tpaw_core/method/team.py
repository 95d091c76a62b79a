"""Who plays: the last checkpoints that nobody vetoed, as opponents and as main players.

Knows candidates by iteration and digest; must not know where they come from (a registry, a folder).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A registered checkpoint. ``vetoed`` is the registry's tag team_member=false."""

    iteration: int
    version: int
    digest: str
    vetoed: bool = False


def assemble(
    candidates: Iterable[Candidate], *, iteration: int, size: int, exclude: Collection[int | str] = ()
) -> list[Candidate]:
    """The team of ``iteration``: at most ``size`` members, newest first (policy "latest", N_max in the paper).

    Of several candidates with one iteration number, the caller passes the one that is in use. A candidate plays when
    its iteration lies before ``iteration``, it is not vetoed, and neither its iteration nor its digest (or a prefix of
    8 characters or more) is in ``exclude``.

    Raises:
        ValueError: nobody is left to play, or two candidates share an iteration.
    """

    def excluded(candidate: Candidate) -> bool:
        return any(
            entry == candidate.iteration
            or (isinstance(entry, str) and len(entry) >= 8 and candidate.digest.startswith(entry))
            for entry in exclude
        )

    eligible = [c for c in candidates if c.iteration < iteration and not c.vetoed and not excluded(c)]
    if len({c.iteration for c in eligible}) < len(eligible):
        raise ValueError("two candidates share an iteration")
    if not eligible:
        raise ValueError(f"no checkpoint before iteration {iteration} is eligible: all are vetoed, excluded or missing")
    return sorted(eligible, key=lambda c: c.iteration, reverse=True)[:size]
