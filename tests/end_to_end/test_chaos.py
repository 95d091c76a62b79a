"""A short campaign: a fault of each sort, on a workspace of its own; `make chaos` tries more.

Each fault begins with setting the pipeline back, and ends with the outputs of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos import faults
from chaos.campaign import Campaign
from tests.support.workspace import Project

pytestmark = pytest.mark.slow


@pytest.fixture
def campaign(project: Project, host: Project, kind: str) -> Iterator[Campaign]:
    shared = faults.KINDS[kind].strike is not faults.server
    project.server = host.server if shared else None
    yield Campaign(project, seed=1)
    if shared:
        project.server = None  # it stays for other tests


@pytest.mark.parametrize(
    "kind",
    [
        "kill -9, the stage",
        "SIGTERM, dvc",
        "kill -9, the preloaded process",
        "flipped bit, checkpoint",
        "flipped bit, encoded rows",
        "truncated, encoded rows",
        "truncated, synthetic data",
        "flipped bit, team",
        "truncated, scores",
    ],
)
def test_nothing_is_lost_wrong_twice_or_left_over(campaign: Campaign, kind: str) -> None:
    found = campaign.suffer(kind)
    assert (found.lost, found.wrong, found.duplicates, found.orphans) == ("", "", 0, 0)
