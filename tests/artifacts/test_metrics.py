from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tpaw_core.artifacts.metrics import Metrics, Primary, Sample, evaluated, read_metrics, read_samples, write_metrics
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

SAMPLE = Sample(prompt="What is «2 + 2»?", target="4", completion="5", correct=0.0)


def metrics(iteration: int, parent: int | None = None) -> Metrics:
    return Metrics(
        primary=Primary(benchmark="heldout", metric="exact_match", value=0.5, stderr=0.01, n=1000),
        benchmarks={"heldout": {"exact_match": 0.5, "n": 1000}},
        training={"loss": 0.25},
        checkpoint=f"{iteration}" * 64,
        parent=None if parent is None else f"{parent}" * 64,
    )


def test_metrics_and_samples_come_back_as_they_were_written(workspace: Workspace) -> None:
    write_metrics(workspace, 1, metrics(1, 0), [SAMPLE, SAMPLE])
    assert read_metrics(workspace, 1) == metrics(1, 0)
    assert read_samples(workspace, 1) == [SAMPLE.model_dump()] * 2
    assert "«2 + 2»" in workspace.samples(1).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: {**found, "checkpoint": None},
        lambda found: {**found, "primary": {**found["primary"], "value": "0.5"}},
        lambda found: {**found, "primary": {**found["primary"], "n": 1.5}},
        lambda found: {k: v for k, v in found.items() if k != "parent"},
        lambda found: {**found, "benchmarks": {"heldout": 0.5}},
    ],
)
def test_damaged_metrics_are_refused(damage: Callable[[Any], Any], workspace: Workspace) -> None:
    write_metrics(workspace, 1, metrics(1, 0), [])
    path = workspace.metrics(1)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(TpawError, match=rf"{path}: is damaged"):
        read_metrics(workspace, 1)


def test_the_evaluated_checkpoints_end_where_one_has_another_parent(workspace: Workspace) -> None:
    """Checkpoint 2 was made again since 3 was evaluated: 3 belongs to another history."""
    for iteration, parent in ((0, None), (1, 0), (2, 1), (3, 7), (4, 3)):
        write_metrics(workspace, iteration, metrics(iteration, parent), [])
    assert list(evaluated(workspace)) == [0, 1, 2]
    write_metrics(workspace, 3, metrics(3, 2), [])
    assert list(evaluated(workspace)) == [0, 1, 2, 3, 4]
