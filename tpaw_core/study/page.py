"""The report of a study: one page in HTML with everything in it, the same in Markdown with its plots, and CSV files.

Reads a study's results; must not run anything.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tpaw_core.report.table import aligned
from tpaw_core.study import claims, intervals, plots
from tpaw_core.study.intervals import Interval
from tpaw_core.study.methods import METHODS
from tpaw_core.study.plan import Plan
from tpaw_core.study.results import Results, by_seed, failures

if TYPE_CHECKING:
    import pandas as pd


BASELINES = ("spin", "sft")


class Row(NamedTuple):
    """A method's line in the table: accuracy by iteration, and its paired differences at the end."""

    method: str
    learning_rate: str  # "*": at an end of the grid
    accuracy: list[Interval]
    differences: dict[str, Interval | None]


def write(plan: Plan, folder: Path, results: Results) -> None:
    """report.html, report.md and plots/ into the study's folder."""
    drawn = plots.draw(plan, results)
    (folder / "plots").mkdir(exist_ok=True)
    for name, plot in drawn.items():
        (folder / "plots" / f"{name}.svg").write_text(plot.svg, encoding="utf-8")
    for kind in ("html", "md"):
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=kind == "html",
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"points": points, "signed": signed, "number": number}
        text = environment.get_template(f"page.{kind}").render(
            plan=plan,
            rows=rows(plan, results.chosen),
            baselines=[name for name in BASELINES if name in plan.methods],
            claims=claims.judge(results.grid),
            plots=drawn,
            failures=failures(results.grid),
            sources={name: METHODS[name].source if name in METHODS else "" for name in plan.methods},
            stderr=f"{100 * results.chosen['stderr'].mean():.2f}",
        )
        (folder / f"report.{kind}").write_text(text, encoding="utf-8")


def table(plan: Plan, results: Results) -> str:
    """The headline table as text."""
    names = [name for name in BASELINES if name in plan.methods]
    head = ["method", "rate", "SFT", *(f"iteration {t}" for t in range(1, plan.iterations + 1))]
    lines = [[*head, *(f"minus {name}" for name in names)]]
    for row in rows(plan, results.chosen):
        accuracy = [points(interval) for interval in row.accuracy]
        accuracy += ["-"] * (plan.iterations + 1 - len(accuracy))
        lines.append([row.method, row.learning_rate, *accuracy, *(signed(row.differences[n]) for n in names)])
    return "\n".join(aligned(lines))


def rows(plan: Plan, chosen: pd.DataFrame) -> list[Row]:
    """One row a method, in the plan's order; a method that never reached an iteration ends before it."""
    ends = {name: by_seed(chosen, name, plan.iterations) for name in BASELINES if name in plan.methods}
    found = []
    for method in plan.methods:
        own = chosen[chosen["method"] == method]
        if own.empty:
            continue
        by_iteration = [by_seed(chosen, method, t) for t in range(plan.iterations + 1)]
        last = by_iteration[-1]
        differences = {
            name: intervals.difference(last, other) if name != method and last.keys() & other.keys() else None
            for name, other in ends.items()
        }
        accuracy = [intervals.mean(list(values.values())) for values in by_iteration if values]
        rate, rates = float(own["learning_rate"].iloc[0]), plan.learning_rates
        end = "*" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        found.append(Row(method, number(rate) + end, accuracy, differences))
    return found


def points(interval: Interval | None) -> str:
    """An accuracy in percent with its interval."""
    return _shown(interval, 100.0, ".1f")


def signed(interval: Interval | None, scale: float = 100.0) -> str:
    """A difference with its interval, in points where ``scale`` is 100."""
    return _shown(interval, scale, "+.1f" if scale == 100 else "+.4f")


def _shown(interval: Interval | None, scale: float, form: str) -> str:
    if interval is None:
        return "-"
    mean, low, high = (format(scale * value, form) for value in interval[:3])
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def number(value: float) -> str:
    return f"{value:g}"
