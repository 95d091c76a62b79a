"""The plots of a study, as SVG: what a method reached, what its training did, what it cost.

Reads a study's results; must not run anything.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tpaw_core.study import intervals
from tpaw_core.study.intervals import Interval
from tpaw_core.study.plan import Plan
from tpaw_core.study.results import Results, by_seed

COLOURS = ["#2a6f97", "#c8553d", "#6a994e", "#8a5a9e", "#b8860b", "#4d4d4d", "#3aa6a0", "#d17a9c", "#7b5e42", "#5b7fd1"]
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "tpaw",  # the same bytes for the same lines
    "font.size": 9,
}
ITERATION, STEP, ACCURACY = "iteration", "optimiser step", "accuracy, %"
TITLES = {  # name: title, what to see in it, axes
    "accuracy": (
        "Accuracy on held-out rows",
        "Mean over seeds; bands are 95% intervals. Iteration 0 is the SFT model.",
        (ITERATION, ACCURACY),
    ),
    "rates": (
        "Accuracy on validation rows, by learning rate",
        "After the last iteration, on the tuning seeds; each method is reported at its best rate.",
        ("learning rate", ACCURACY),
    ),
    "target_reward": (
        "Target reward",
        "Lambda times the log-ratio of policy and players; below zero, targets have become less likely.",
        (STEP, "reward"),
    ),
    "target_logp": ("Log-probability of targets", "At the end of an iteration, in training.", (ITERATION, "nats")),
    "answer_logp": ("Log-probability of answers", "At the end of an iteration, in training.", (ITERATION, "nats")),
    "equal": (
        "Answers that equal their target",
        "Share of the newest answers; such pairs carry no preference signal.",
        (ITERATION, "share"),
    ),
    "target_active": (
        "Share of targets with a reward that is not positive",
        "Target weighting applies to these.",
        (STEP, "share"),
    ),
    "players": ("Player weights", "Mean beta by player.", (STEP, "beta")),
    "cost_tokens": (
        "Cost: tokens",
        "One point per iteration; tokens that training computes, with a shared prompt counted once.",
        ("tokens", ACCURACY),
    ),
    "cost_seconds": (
        "Cost: seconds",
        "One point per iteration; generation, scoring and training of one run.",
        ("seconds", ACCURACY),
    ),
}


class Plot(NamedTuple):
    title: str
    text: str
    svg: str


def draw(plan: Plan, results: Results) -> dict[str, Plot]:
    """Those of TITLES that the results have figures for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing = _Drawing(plan, results)
    draws: dict[str, Callable[[Any], None]] = {
        "accuracy": lambda axes: drawing.by_iteration(axes, "accuracy", 100),
        "rates": drawing.by_rate,
        "target_reward": lambda axes: drawing.over_steps(axes, "target_reward"),
        "target_logp": lambda axes: drawing.by_iteration(axes, "target_logp", first=1),
        "answer_logp": lambda axes: drawing.by_iteration(axes, "answer_logp", first=1),
        "equal": lambda axes: drawing.by_iteration(axes, "equal", first=1),
        "target_active": lambda axes: drawing.over_steps(axes, "target_active"),
        "players": drawing.players,
        "cost_tokens": lambda axes: drawing.cost(axes, "tokens"),
        "cost_seconds": lambda axes: drawing.cost(axes, "seconds"),
    }
    made = {}
    with plt.rc_context(STYLE):
        for name, (title, text, (x, y)) in TITLES.items():
            figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
            axes.set(xlabel=x, ylabel=y)
            draws[name](axes)
            if axes.lines:
                figure.legend(loc="outside right upper", frameon=False)
                file = io.StringIO()
                figure.savefig(file, format="svg", metadata={"Date": None})
                svg = file.getvalue()
                made[name] = Plot(title, text, svg[svg.index("<svg") :])
            plt.close(figure)
    return made


class _Drawing:
    """Lines of each method, in one colour everywhere."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan, self.grid, self.chosen, self.steps = plan, results.grid, results.chosen, results.steps
        self.look: dict[str, dict[str, Any]] = {
            method: {"color": COLOURS[n % len(COLOURS)], "ls": "-" if n < len(COLOURS) else "--", "label": method}
            for n, method in enumerate(plan.methods)
        }

    def by_iteration(self, axes: Any, column: str, scale: float = 1.0, first: int = 0) -> None:
        iterations = range(first, self.plan.iterations + 1)
        for method in self.plan.methods:
            values = [(t, by_seed(self.chosen, method, t, column)) for t in iterations]
            self._band(axes, [(t, intervals.mean([*v.values()])) for t, v in values if v], scale, method)
        axes.set_xticks(iterations)

    def by_rate(self, axes: Any) -> None:
        tuned = self.grid[self.grid["seed"].isin(self.plan.seeds[: self.plan.tuning_seeds])]
        for method in self.plan.methods:
            line = []
            for rate in sorted(self.plan.learning_rates):
                own = tuned[tuned["learning_rate"] == rate]
                if values := by_seed(own, method, self.plan.iterations, "validation"):
                    line.append((rate, intervals.mean([*values.values()])))
            self._band(axes, line, 100, method, marker="o", ms=3)
        rates = sorted(self.plan.learning_rates)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()

    def over_steps(self, axes: Any, name: str) -> None:
        for method in self.plan.methods:
            if any(line := self._steps(method, name)):
                axes.plot(*line, lw=1.3, **self.look[method])

    def players(self, axes: Any) -> None:
        method = next((method for method in self.plan.methods if method.startswith("tpaw")), None)
        for k in range(len(COLOURS) if method else 0):
            if any(line := self._steps(str(method), f"player_{k}")):
                label = f"{method}, player {k}{' (newest)' if k == 0 else ''}"
                axes.plot(*line, lw=1.3, color=COLOURS[k], label=label)

    def cost(self, axes: Any, column: str) -> None:
        for method in self.plan.methods:
            own = self.chosen[self.chosen["method"] == method].groupby("iteration")[[column, "accuracy"]].mean()
            if len(own):
                axes.plot(own[column], 100 * own["accuracy"], marker="o", ms=3, **self.look[method])

    def _band(self, axes: Any, line: Iterable[tuple[float, Interval]], scale: float, method: str, **look: Any) -> None:
        xs, found = zip(*line, strict=True) if line else ((), ())
        if xs:
            axes.plot(xs, [scale * i.mean for i in found], lw=1.5, **self.look[method], **look)
        if xs and min(i.n for i in found) > 2:  # the interval of two values is wider than any plot
            low, high = [scale * i.low for i in found], [scale * i.high for i in found]
            axes.fill_between(xs, low, high, color=self.look[method]["color"], alpha=0.1, lw=0)

    def _steps(self, method: str, name: str) -> tuple[list[float], list[float]]:
        """What training logged, the mean over seeds."""
        if name not in self.steps:
            return [], []
        own = self.steps[self.steps["method"] == method].dropna(subset=[name]).groupby("step")[name].mean()
        return list(own.index), list(own)
