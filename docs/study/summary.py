"""All tasks side by side: writes the tables of docs/study/README.md from the tasks' results.

python docs/study/summary.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tpaw_core.report.table import aligned
from tpaw_core.study import claims, page, results
from tpaw_core.study.plan import PLAN_FILE, Plan

HOME = Path(__file__).parent
TASKS = ("latent-skill", "mawps", "demo")
BEGIN, END = "<!-- made by summary.py -->\n", "<!-- until here -->"


def main() -> None:
    plans = {task: Plan.model_validate_json((HOME / task / PLAN_FILE).read_text()) for task in TASKS}
    grids = {task: results.read_csv(HOME / task, results.GRID_FILE) for task in TASKS}
    text = "\n\n".join(
        (
            "Held-out accuracy after the last iteration, in percent: mean over seeds with its 95% interval, and the "
            "difference to SFT that goes on, paired by seed.",
            _accuracy(plans, grids),
            "The highest rate of the grid, 3e-4, where methods come apart: after the last iteration, means over the "
            "two tuning seeds. No intervals, as two seeds give none worth the name.",
            _steep(plans, grids),
            "The paper's claims, each method at its own best rate; each difference should be above zero:",
            _claims(grids),
        )
    )
    readme = HOME / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{rest.partition(END)[2]}")


def _accuracy(plans: dict[str, Plan], grids: dict[str, pd.DataFrame]) -> str:
    rows = {
        task: {row.method: row for row in page.rows(plan, grids[task][grids[task]["chosen"]])}
        for task, plan in plans.items()
    }
    lines = [["method", *(f"{task}, rate" for task in TASKS)]]
    lines.append(["SFT, the start", *(page.points(rows[task]["tpaw"].accuracy[0]) for task in TASKS)])
    for method in dict.fromkeys(name for task in TASKS for name in rows[task]):
        cells = []
        for task in TASKS:
            row = rows[task].get(method)
            minus = row.differences.get("sft") if row else None
            end = f" ({page.signed(minus)})" if minus else ""
            cells.append(f"{page.points(row.accuracy[-1])}{end}, {row.learning_rate}" if row else "-")
        lines.append([method, *cells])
    return "\n".join(aligned(lines))


def _steep(plans: dict[str, Plan], grids: dict[str, pd.DataFrame]) -> str:
    found = {}
    for task, plan in plans.items():
        grid = grids[task]
        tuned = grid["seed"].isin(plan.seeds[: plan.tuning_seeds]) & (grid["iteration"] == plan.iterations)
        steep = grid[tuned & (grid["learning_rate"] == max(plan.learning_rates))]
        found[task] = steep.groupby("method")[["accuracy", "target_reward"]].mean()
    lines = [["method", *(f"{task}: accuracy, target reward" for task in TASKS)]]
    for method in dict.fromkeys(name for task in TASKS for name in plans[task].methods):
        cells = []
        for task in TASKS:
            if method in found[task].index:
                accuracy, reward = found[task].loc[method]
                cells.append(f"{100 * accuracy:.1f}" + ("" if pd.isna(reward) else f", {reward:+.4f}"))
            else:
                cells.append("-")
        lines.append([method, *cells])
    return "\n".join(aligned(lines))


def _claims(grids: dict[str, pd.DataFrame]) -> str:
    judged = {task: claims.judge(grid) for task, grid in grids.items()}
    lines = []
    for number, claim in enumerate(judged[TASKS[0]]):
        lines.append(f"- **{claim.name}. {claim.text}.**")
        for task in TASKS:
            own = judged[task][number]
            said = "; ".join(f"{s.text} {page.signed(s.interval, s.scale)}" for s in own.statements)
            lines.append(f"  - {task}: **{own.verdict}.** {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
