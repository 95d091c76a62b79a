"""A short campaign: a fault of each sort, on a workspace of its own; `make chaos` tries more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos.campaign import Campaign
from chaos.workspace import Workspace


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Workspace.make(tmp_path_factory.mktemp("chaos") / "workspace", "sft.num_train_epochs=2")
    made.preload()
    made.run("dvc", "repro")
    yield Campaign(made, seed=1)
    made.close()


@pytest.mark.parametrize(
    "kind",
    [
        "kill -9, the stage",
        "SIGTERM, dvc",
        "kill -9, the preloaded process",
        "flipped bit, checkpoint",
        "truncated, synthetic data",
        "flipped bit, team",
        "truncated, scores",
    ],
)
def test_nothing_is_lost_wrong_twice_or_left_over(campaign: Campaign, kind: str) -> None:
    found = campaign.suffer(kind)
    assert (found.lost, found.wrong, found.duplicates, found.orphans) == ("", "", 0, 0)
