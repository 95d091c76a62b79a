"""report/report.md with its plots, and what `tpaw table` prints."""

from __future__ import annotations

from pathlib import Path

from tpaw_core.report.answers import beside
from tpaw_core.report.plots import draw
from tpaw_core.report.table import durations, table
from tpaw_core.workspace.paths import Workspace


def write(workspace: Workspace, folder: Path) -> None:
    """report.md and its plots into ``folder``."""
    plots = draw(workspace, folder)
    text = ["# Result", "", table(workspace), ""]
    text += [
        "Rewards and the share of active target weights (alpha = eta) are means over the last quarter of the "
        "iteration's steps.",
        "",
    ]
    text += [line for name in plots for line in (f"![{name}]({name}.png)", "")]
    if shown := beside(workspace, 20):
        text += ["## Sample answers", "", shown[1], *(f"    {line}".rstrip() for line in shown[2:]), ""]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")


def summary(workspace: Workspace) -> str:
    """The table, sample answers from before and after self-play, and how long the stages of the last flow run took."""
    return "\n".join([table(workspace), *beside(workspace, 3), *durations(workspace)])
