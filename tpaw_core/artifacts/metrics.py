"""metrics/<t>.json and samples/<t>.jsonl: what a checkpoint scored, and some of its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tpaw_core.workspace import records
from tpaw_core.workspace.paths import Workspace
from tpaw_core.workspace.records import Record


class Primary(Record):
    """The headline figure."""

    benchmark: str
    metric: str
    value: float
    stderr: float
    n: int


class Metrics(Record):
    primary: Primary
    benchmarks: dict[str, dict[str, int | float]]
    training: dict[str, float]  # means over the last quarter of the training log
    checkpoint: str  # its digest
    parent: str | None


class Sample(Record):
    """One held-out row as the checkpoint answered it."""

    prompt: str  # its messages' texts, without the template
    target: str
    completion: str
    correct: float


def write_metrics(workspace: Workspace, iteration: int, metrics: Metrics, samples: Iterable[Sample]) -> None:
    lines = [json.dumps(sample.model_dump(), ensure_ascii=False) + "\n" for sample in samples]
    with workspace.publish(workspace.samples(iteration)) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
    with workspace.publish(workspace.metrics(iteration)) as aside:
        aside.write_text(metrics.text())


def read_metrics(workspace: Workspace, iteration: int, remedy: str = records.RESTORE) -> Metrics:
    return records.read(workspace.metrics(iteration), Metrics, remedy)


def read_samples(workspace: Workspace, iteration: int) -> list[dict[str, Any]]:
    return records.lines(workspace.samples(iteration))


def evaluated(workspace: Workspace) -> dict[int, Metrics]:
    """Metrics of the evaluated checkpoints by iteration, up to the first that has another parent."""
    found = {t: read_metrics(workspace, t) for t in workspace.iterations("metrics")}
    ends = (t for t in found if t - 1 in found and found[t].parent != found[t - 1].checkpoint)
    end = next(ends, None)
    return {t: metrics for t, metrics in found.items() if end is None or t < end}
