"""training/<t>.jsonl: one entry per logging step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from tpaw_core.workspace import records
from tpaw_core.workspace.paths import Workspace


def write_log(workspace: Workspace, iteration: int, log: Iterable[Mapping[str, float]]) -> None:
    with workspace.publish(workspace.training_log(iteration)) as aside:
        aside.write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in log))


def read_log(workspace: Workspace, iteration: int) -> list[dict[str, float]]:
    """Empty where there is none."""
    return records.lines(workspace.training_log(iteration))


def last_quarter(workspace: Workspace, iteration: int) -> dict[str, float]:
    """Means over the last quarter of the log: where the iteration ended, not how it got there."""
    entries = read_log(workspace, iteration)
    entries = entries[-max(1, len(entries) // 4) :]
    names = sorted({name for entry in entries for name in entry} - {"step", "epoch", "learning_rate"})
    return {
        name.replace("weights/", "").replace("/", "_"): sum(e[name] for e in entries) / len(entries) for name in names
    }
