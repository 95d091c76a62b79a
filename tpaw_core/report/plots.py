"""The report's plots, one PNG file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpaw_core.artifacts.metrics import evaluated
from tpaw_core.artifacts.training_log import read_log
from tpaw_core.report.table import rows
from tpaw_core.workspace.paths import Workspace

ACCENT, SECOND, THIRD = "#2a6f97", "#c8553d", "#6a994e"
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
Logs = dict[int, list[dict[str, float]]]


def draw(workspace: Workspace, folder: Path) -> list[str]:
    """Writes NAME.png for each plot that there are figures for, and returns the names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = rows(workspace)
    logs = {iteration: read_log(workspace, iteration) for iteration in evaluated(workspace) if iteration > 0}
    figures: dict[str, Any] = {}
    with plt.rc_context(STYLE):

        def axes_of(name: str, title: str, ylabel: str, xlabel: str) -> Any:
            figures[name], axes = plt.subplots(figsize=(7, 4), layout="constrained")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            return axes

        if measured:
            _accuracy(
                axes_of("accuracy", measured[0]["benchmark"], "score, with its standard error", "checkpoint (0 = SFT)"),
                measured,
            )
        if any(logs.values()):
            step = "optimiser step"
            _rewards(axes_of("rewards", "Implicit rewards by iteration\n", "reward (lambda x log-ratio)", step), logs)
            title = "Target weight active (alpha = eta), share of (triplet, player) pairs\n"
            _target_active(axes_of("target_active", title, "share", step), logs)
            title = "Mean player weight beta by iteration"
            _player_weights(axes_of("player_weights", title, "mean beta", "iteration"), logs)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
            plt.close(figure)
    return list(figures)


def _accuracy(axes: Any, measured: list[dict[str, Any]]) -> None:
    checkpoints = [row["checkpoint"] for row in measured]
    scores, errors = ([row[name] for row in measured] for name in ("score", "stderr"))
    axes.errorbar(checkpoints, scores, yerr=errors, color=ACCENT, marker="o", capsize=4)
    axes.set_xticks(checkpoints)


def _rewards(axes: Any, logs: Logs) -> None:
    axes.axhline(0, color="0.3", lw=0.8)
    _over_steps(axes, logs, "rewards/chosen", ACCENT, "target")
    _over_steps(axes, logs, "rewards/rejected", SECOND, "generated")
    _mark_iterations(axes, logs)
    axes.legend(frameon=False)


def _target_active(axes: Any, logs: Logs) -> None:
    _over_steps(axes, logs, "weights/target_active", ACCENT, "alpha = eta")
    axes.set_ylim(0, 1)
    _mark_iterations(axes, logs)


def _player_weights(axes: Any, logs: Logs) -> None:
    names = sorted({name for log in logs.values() for e in log for name in e if name.startswith("weights/player/")})
    for k, name in enumerate(names):
        means = {t: [e[name] for e in log if name in e] for t, log in logs.items()}
        points = [(t, sum(values) / len(values)) for t, values in means.items() if values]
        colour = (ACCENT, SECOND, THIRD)[k] if k < 3 else None
        label = "newest player (0)" if k == 0 else f"player {k}"
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.set_xticks(list(logs))
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)


def _over_steps(axes: Any, logs: Logs, metric: str, colour: str, label: str) -> None:
    """Steps are counted through all iterations."""
    offset, name = 0.0, label
    for log in logs.values():
        points = [(offset + entry["step"], entry[metric]) for entry in log if metric in entry]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.5, label=name)
            name = "_"  # one entry in the legend
        offset += log[-1]["step"] if log else 0.0


def _mark_iterations(axes: Any, logs: Logs) -> None:
    start = 0.0
    for iteration, log in logs.items():
        end = start + (log[-1]["step"] if log else 0.0)
        axes.axvline(end, color="0.6", lw=0.8, ls=":")
        place = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "center"}
        axes.text((start + end) / 2, 1.0, f"{iteration}", color="0.4", **place)
        start = end
