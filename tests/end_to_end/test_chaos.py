"""A short campaign: a fault of each sort, on a workspace of its own; `make chaos` tries more.

Each fault begins with setting the pipeline back, and ends with the outputs of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos.campaign import Campaign
from tests.support.workspace import Project
from tpaw_core.processes import fork_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Has the preloaded process from which every test's commands are forked."""
    made = Project.bare(tmp_path_factory.mktemp("host") / "project")
    yield made
    made.close()


@pytest.fixture
def campaign(project: Project, host: Project) -> Iterator[Campaign]:
    host.preload()  # a test may have killed it
    project.server, project.environment[fork_server.ADDRESS] = host.server, host.environment[fork_server.ADDRESS]
    yield Campaign(project, seed=1)
    if project.server is host.server:
        project.server = None


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
