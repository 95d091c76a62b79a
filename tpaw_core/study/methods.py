"""The methods that a study compares: each is a set of overrides to a recipe, with its source.

A recipe by itself is TPAW as published. All methods get the same prompts, the same number of optimiser steps, and the
same grid of learning rates.
"""

from __future__ import annotations

from typing import NamedTuple

from tpaw_core.errors import TpawError


class Method(NamedTuple):
    overrides: tuple[str, ...]
    source: str


ONE_PLAYER = ("team.size=1", "team.players=1")
METHODS = {
    "tpaw": Method((), "Li et al., ACL 2026, arXiv 2605.09922"),
    "spin": Method(
        ("objective.name=spin", "team.size=2", "team.players=1"),
        "arXiv 2401.01335; trains on the last two data sets, as its authors do",
    ),
    "sft": Method(("objective.name=sft", *ONE_PLAYER), "fine-tuning continues for the same number of steps"),
    "tpaw-no-target-weights": Method(("objective.target_weighting=false",), "TPAW with alpha = 1"),
    "tpaw-no-player-weights": Method(("objective.player_weighting=false",), "TPAW with equal beta"),
    "tpaw-team-1": Method(("team.size=1",), "TPAW without the team"),
    "tpaw-team-2": Method(("team.size=2",), "TPAW, N_max = 2"),
    "tpaw-team-4": Method(("team.size=4",), "TPAW, N_max = 4"),
    "tspin": Method(("objective.name=tspin", *ONE_PLAYER), "arXiv 2601.08198"),
    "space": Method(("objective.name=space", *ONE_PLAYER), "arXiv 2512.07175, mu = 1"),
    "dpo-nll": Method(
        ("objective.name=dpo_nll", *ONE_PLAYER), "arXiv 2404.19733, the model's own answer is the rejected one"
    ),
    # Variants of our own, beside the published method.
    "tpaw-distinct": Method(("objective.drop_equal=true",), "TPAW without responses that equal their target"),
    "tpaw-per-token": Method(("objective.per_token=true",), "TPAW with lambda by length"),
    "tpaw-annealed": Method(
        ("iterations.2.eta=4", "iterations.3.eta=2", "iterations.4.eta=1"), "TPAW with eta 6, 4, 2, 1"
    ),
}


def find(names: list[str]) -> dict[str, list[str]]:
    """The overrides of each method; "name:section.key=value,..." makes one of your own.

    Raises TpawError for a name that is neither known nor followed by overrides.
    """
    found = {}
    for entry in names:
        name, colon, overrides = entry.partition(":")
        if colon:
            found[name] = overrides.split(",")
        elif name in METHODS:
            found[name] = list(METHODS[name].overrides)
        else:
            raise TpawError(
                f"method {name!r}: unknown; available: {', '.join(METHODS)}; or define one: 'mine:objective.eta=2'"
            )
    return found
