"""The report: one row a checkpoint, and the plots that show what the iterations did.

Reads metrics/ and training/ only, so it can be made anywhere and at any time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpaw_core import alarms, data, records, workspace
from tpaw_core.evaluation import Metrics

COLUMNS = ["checkpoint", "benchmark", "score", "stderr", "n", "target reward", "generated reward", "alpha = eta"]
ACCENT, SECOND, THIRD = "#2a6f97", "#c8553d", "#6a994e"


def evaluated() -> dict[int, Metrics]:
    """metrics/<t>.json of the evaluated checkpoints, by iteration, up to the first with another parent."""
    found = _measured()
    ends = (t for t in found if t - 1 in found and found[t]["parent"] != found[t - 1]["checkpoint"])
    end = next(ends, None)
    return {t: metrics for t, metrics in found.items() if end is None or t < end}


def _measured() -> dict[int, Metrics]:
    return {t: records.read(workspace.metrics(t), Metrics) for t in workspace.iterations("metrics")}


def flow_seconds() -> dict[str, float]:
    """Seconds by stage of the last flow run; empty where none has ended."""
    path = workspace.FLOW_SECONDS
    return records.read(path, dict[str, float], "delete it") if path.exists() else {}


def samples(iteration: int) -> list[dict[str, Any]]:
    return records.lines(workspace.samples(iteration))


def rows() -> list[dict[str, Any]]:
    """The table's rows; rewards are means over the last quarter of an iteration's steps, None for checkpoint 0."""
    found = []
    for iteration, metrics in evaluated().items():
        primary, training = metrics["primary"], metrics["training"]
        found.append(
            {
                "checkpoint": iteration,
                "benchmark": f"{primary['benchmark']} {primary['metric']}",
                "score": primary["value"],
                "stderr": primary["stderr"],
                "n": primary["n"],
                "target reward": training.get("rewards_chosen"),
                "generated reward": training.get("rewards_rejected"),
                "alpha = eta": training.get("target_active"),
            }
        )
    return found


def table() -> str:
    """The rows as an aligned Markdown table, and which checkpoints are left out of it."""
    lines = aligned([COLUMNS] + [[_cell(row[name]) for name in COLUMNS] for row in rows()])
    if found := warnings():
        lines += ["", *found]
    if left_out := [str(t) for t in _measured() if t not in evaluated()]:
        lines += ["", f"Left out, as made from an earlier checkpoint {int(left_out[0]) - 1}: {', '.join(left_out)}."]
    return "\n".join(lines)


def warnings() -> list[str]:
    """The early warnings of the iterations made so far."""
    found = []
    for iteration in evaluated():
        equal = data.equal_share(workspace.synthetic(iteration))
        for text in (equal and alarms.of_answers(equal), alarms.of_training(_log(iteration))):
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


def write(folder: Path) -> None:
    """report.md and its plots into ``folder``."""
    plots = _plots(folder)
    text = ["# Result", "", table(), ""]
    text += ["Rewards and the share of alpha = eta are means over the last quarter of the iteration's steps.", ""]
    text += [line for name in plots for line in (f"![{name}]({name}.png)", "")]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _log(iteration: int) -> list[dict[str, float]]:
    return records.lines(workspace.training_log(iteration))


def _plots(folder: Path) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    found = rows()
    logs = {iteration: _log(iteration) for iteration in evaluated() if iteration > 0}
    ends, offset = {}, 0.0
    steps: dict[int, list[float]] = {}
    for iteration, log in logs.items():
        steps[iteration] = [offset + entry["step"] for entry in log]
        offset = steps[iteration][-1] if log else offset
        ends[iteration] = offset

    def figure(name: str, title: str, ylabel: str, xlabel: str) -> Any:
        made, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        made_plots[name] = made
        return axes

    def over_steps(axes: Any, metric: str, colour: str, label: str) -> None:
        for number, (iteration, log) in enumerate(logs.items()):
            points = [(x, e[metric]) for x, e in zip(steps[iteration], log, strict=True) if metric in e]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.5, label=label if number == 0 else None)

    def mark_iterations(axes: Any) -> None:
        start = 0.0
        for iteration, end in ends.items():
            axes.axvline(end, color="0.6", lw=0.8, ls=":")
            axes.text(
                (start + end) / 2,
                1.0,
                f"{iteration}",
                transform=axes.get_xaxis_transform(),
                va="bottom",
                ha="center",
                color="0.4",
            )
            start = end

    made_plots: dict[str, Any] = {}
    if found:
        axes = figure("accuracy", found[0]["benchmark"], "score, with its standard error", "checkpoint (0 = SFT)")
        axes.errorbar(
            [row["checkpoint"] for row in found],
            [row["score"] for row in found],
            yerr=[row["stderr"] for row in found],
            color=ACCENT, marker="o", capsize=4,
        )  # fmt: skip
        axes.set_xticks([row["checkpoint"] for row in found])
    if any(logs.values()):
        axes = figure("rewards", "Implicit rewards by iteration\n", "reward (lambda x log-ratio)", "optimiser step")
        axes.axhline(0, color="0.3", lw=0.8)
        over_steps(axes, "rewards/chosen", ACCENT, "target")
        over_steps(axes, "rewards/rejected", SECOND, "generated")
        mark_iterations(axes)
        axes.legend(frameon=False)
        axes = figure("target_active", "Share of (triplet, player) pairs with alpha = eta\n", "share", "optimiser step")
        over_steps(axes, "weights/target_active", ACCENT, "alpha = eta")
        axes.set_ylim(0, 1)
        mark_iterations(axes)
        axes = figure("player_weights", "Mean player weight beta by iteration", "mean beta", "iteration")
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
    for name, made in made_plots.items():
        made.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
        plt.close(made)
    return list(made_plots)
