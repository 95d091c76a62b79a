"""One row per checkpoint, with the early warnings."""

from __future__ import annotations

from typing import Any

from tpaw_core.artifacts.metrics import evaluated
from tpaw_core.artifacts.synthetic import equal_share
from tpaw_core.artifacts.training_log import read_log
from tpaw_core.method import early_warnings
from tpaw_core.workspace import records
from tpaw_core.workspace.paths import Workspace

COLUMNS = [
    "checkpoint",
    "benchmark",
    "score",
    "stderr",
    "n",
    "target reward",
    "generated reward",
    "target weight active",
]


def flow_seconds(workspace: Workspace) -> dict[str, float]:
    """Seconds by stage of the last flow run; empty where none has ended."""
    path = workspace.flow_seconds
    return records.read(path, dict[str, float], "delete it") if path.exists() else {}


def durations(workspace: Workspace) -> list[str]:
    """Lines on how long the stages of the last flow run took; none where none has ended."""
    if not (seconds := flow_seconds(workspace)):
        return []
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return ["", f"seconds per stage in the last flow run: {stages}", f"total: {sum(seconds.values()):.0f} s"]


def rows(workspace: Workspace) -> list[dict[str, Any]]:
    """The table's rows; rewards are means over the last quarter of an iteration's steps, None for checkpoint 0."""
    found = []
    for iteration, metrics in evaluated(workspace).items():
        primary, training = metrics.primary, metrics.training
        found.append(
            {
                "checkpoint": iteration,
                "benchmark": f"{primary.benchmark} {primary.metric}",
                "score": primary.value,
                "stderr": primary.stderr,
                "n": primary.n,
                "target reward": training.get("rewards_chosen"),
                "generated reward": training.get("rewards_rejected"),
                "target weight active": training.get("target_active"),
            }
        )
    return found


def table(workspace: Workspace) -> str:
    """The rows as an aligned Markdown table, and which checkpoints are left out of it."""
    lines = aligned([COLUMNS] + [[_cell(row[name]) for name in COLUMNS] for row in rows(workspace)])
    if found := warnings(workspace):
        lines += ["", *found]
    if left_out := [str(t) for t in workspace.iterations("metrics") if t not in evaluated(workspace)]:
        lines += [
            "",
            f"Not shown: {', '.join(left_out)}, made from an earlier version of checkpoint {int(left_out[0]) - 1}.",
        ]
    return "\n".join(lines)


def warnings(workspace: Workspace) -> list[str]:
    """The early warnings of the iterations made so far."""
    found = []
    for iteration in evaluated(workspace):
        equal = equal_share(workspace.synthetic(iteration))
        for text in (
            equal and early_warnings.of_answers(equal),
            early_warnings.of_training(read_log(workspace, iteration)),
        ):
            if text:
                found.append(f"Warning, iteration {iteration}: {text}.")
    return found


def aligned(cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table that also reads well as plain text; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
