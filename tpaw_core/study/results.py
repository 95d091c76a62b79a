"""What came out of a study: a row per cell and checkpoint, and what training did by step; kept as CSV files.

Cells that the files hold need not be run again, on whatever machine: a study grows by seeds. The same study gives the
same bytes, but for seconds.csv, which holds what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.artifacts.metrics import Metrics, read_metrics
from tpaw_core.artifacts.synthetic import equal_share
from tpaw_core.artifacts.training_log import read_log
from tpaw_core.study.plan import Cell, Plan
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    import pandas as pd


GRID_FILE, STEPS_FILE, SECONDS_FILE = "grid.csv", "steps.csv", "seconds.csv"
FAILURE_FILE, SECONDS = Path("failure.txt"), Path("seconds")
KEY = ["method", "learning_rate", "seed"]
ROW = [*KEY, "iteration", "params"]


class Results(NamedTuple):
    grid: pd.DataFrame  # a row per cell and checkpoint; "chosen" at the method's best learning rate
    steps: pd.DataFrame  # a row per logged step of the chosen cells

    @property
    def chosen(self) -> pd.DataFrame:
        return self.grid[self.grid["chosen"]]


def collect(plan: Plan, folder: Path) -> Results:
    """What the cells of the plan have reached, from their folders or else from the study's CSV files."""
    import pandas as pd

    cells = plan.cells(plan.learning_rates, plan.seeds)
    known = _read_grid(folder)
    grid = pd.concat([_cell(folder, cell, known) for cell in cells])
    best = best_rates(plan, grid)
    grid["chosen"] = [rate == best[method] for method, rate in zip(grid["method"], grid["learning_rate"], strict=True)]
    known = read_csv(folder, STEPS_FILE)
    steps = pd.concat([_steps(folder, cell, known) for cell in cells if cell.learning_rate == best[cell.method]])
    return Results(grid.reset_index(drop=True), steps.reset_index(drop=True))


def read_csv(folder: Path, name: str) -> pd.DataFrame:
    """One of the study's CSV files, empty where there is none."""
    import pandas as pd

    try:
        return pd.read_csv(folder / name, float_precision="round_trip")
    except (FileNotFoundError, pd.errors.EmptyDataError):  # no step was logged
        return pd.DataFrame()


def _read_grid(folder: Path) -> pd.DataFrame:
    """grid.csv with the seconds; earlier versions kept them in it."""
    grid, seconds = read_csv(folder, GRID_FILE), read_csv(folder, SECONDS_FILE)
    if grid.empty or "seconds" in grid:
        return grid
    return grid.assign(seconds=float("nan")) if seconds.empty else grid.merge(seconds, "left", ROW)


def finished(cell: Cell, known: pd.DataFrame) -> bool:
    """Whether grid.csv, as ``known``, holds all of a cell, made under the same parameters."""
    own = _known(cell, known)
    return len(own) > 0 and (own["iteration"].max() == len(cell.params.iterations) or own["stopped"].notna().any())


def write_csv(folder: Path, results: Results) -> None:
    """results.csv (each method at its best rate), and the others, which keep cells of earlier plans."""
    grid = _and_earlier(results.grid, _read_grid(folder))
    tables = {
        "results.csv": results.chosen.drop(columns=["chosen", "params", "stopped", "seconds"]),
        GRID_FILE: grid.drop(columns="seconds"),
        SECONDS_FILE: grid[[*ROW, "seconds"]],
        STEPS_FILE: _and_earlier(results.steps, read_csv(folder, STEPS_FILE)),
    }
    for name, table in tables.items():
        with files.publish(folder / name) as aside:
            table.to_csv(aside, index=False)


def _and_earlier(table: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """The rows, and below them those of cells that are not among them."""
    import pandas as pd

    if known.empty:
        return table
    if not table.empty:
        cell = [*KEY, "params"]
        known = known[~pd.MultiIndex.from_frame(known[cell]).isin(pd.MultiIndex.from_frame(table[cell]))]
    return pd.concat([table, known.assign(chosen=False) if "chosen" in known else known])


def best_rates(plan: Plan, grid: pd.DataFrame) -> dict[str, float]:
    """Each method's learning rate: the best mean on the validation rows at the end, over the tuning seeds.

    A cell that stopped counts as 0; of equals, the lowest rate.
    """
    tuned = grid[grid["seed"].isin(plan.seeds[: plan.tuning_seeds]) & (grid["iteration"] == plan.iterations)]
    sums = tuned.groupby(["method", "learning_rate"])["validation"].sum().to_dict()
    rates = sorted(plan.learning_rates)
    return {method: max(rates, key=lambda rate: sums.get((method, rate), 0.0)) for method in plan.methods}


def by_seed(grid: pd.DataFrame, method: str, iteration: int, column: str = "accuracy") -> dict[int, float]:
    """One column for a method and an iteration, by seed."""
    found = grid[(grid["method"] == method) & (grid["iteration"] == iteration)].dropna(subset=[column])
    return dict(zip(found["seed"], found[column], strict=True))


def failures(grid: pd.DataFrame) -> list[str]:
    """The cells that stopped, and why."""
    stopped = grid.dropna(subset=["stopped"]).drop_duplicates(KEY)
    rows = stopped[[*KEY, "stopped"]].itertuples(index=False)
    return [f"{method}, learning rate {rate:g}, seed {seed}: {why}" for method, rate, seed, why in rows]


def logged(workspace: Workspace, iterations: int) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Iteration, step and entry of a cell's training logs; steps are counted through all iterations."""
    offset = 0
    for iteration in range(1, iterations + 1):
        log = read_log(workspace, iteration)
        for entry in log:
            yield iteration, offset + int(entry["step"]), entry
        offset += int(log[-1]["step"]) if log else 0


def _cell(folder: Path, cell: Cell, known: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    workspace = cell.workspace(folder)
    if not workspace.metrics(0).exists():
        return _known(cell, known)
    failure = workspace.root / FAILURE_FILE
    rows: list[dict[str, Any]] = []
    spent = tokens = 0.0
    for iteration in range(len(cell.params.iterations) + 1):
        if not workspace.metrics(iteration).exists():
            break
        metrics = read_metrics(workspace, iteration, "delete the cell's folder, and `tpaw compare` recreates it")
        trained = metrics.training
        if iteration:
            log = read_log(workspace, iteration)
            spent += sum(float(path.read_text()) for path in _seconds(workspace.root, iteration))
            # The last entry may be some steps before the end.
            tokens += log[-1]["tokens"] * cell.params.training.num_train_epochs / log[-1]["epoch"] if log else 0.0
        accuracy, stderr = _score(metrics, "heldout")
        rows.append(
            {
                "task": cell.params.recipe,
                **dict(zip(KEY, cell.key, strict=True)),
                "iteration": iteration,
                "accuracy": accuracy,
                "stderr": stderr,
                "validation": _score(metrics, "validation")[0],
                "target_reward": trained.get("rewards_chosen"),
                "answer_reward": trained.get("rewards_rejected"),
                "target_logp": trained.get("logps_chosen"),
                "answer_logp": trained.get("logps_rejected"),
                "target_active": trained.get("target_active"),
                "equal": equal_share(workspace.synthetic(iteration)) if iteration else None,
                "tokens": round(tokens),
                "stopped": failure.read_text().strip() if failure.exists() else None,
                "params": cell.digest,
                "seconds": round(spent, 3),
            }
        )
    return pd.DataFrame(rows)


def _score(metrics: Metrics, task: str) -> tuple[float, float]:
    """Value and standard error of a task of our own."""
    values = {name.split(",")[0]: value for name, value in metrics.benchmarks[task].items()}
    return values["exact_match"], values["exact_match_stderr"]


def _seconds(home: Path, iteration: int) -> list[Path]:
    """What a checkpoint cost: its stages but the evaluation, whichever cell ran them."""
    return [path for path in (home / SECONDS).glob(f"*@{iteration}") if not path.name.startswith("evaluate")]


def _steps(folder: Path, cell: Cell, known: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    workspace = cell.workspace(folder)
    if not workspace.metrics(0).exists():
        return _known(cell, known)
    own = {**dict(zip(KEY, cell.key, strict=True)), "params": cell.digest}
    names = {"rewards/chosen": "target_reward", "weights/target_active": "target_active"}
    rows: list[dict[str, Any]] = []
    for iteration, step, entry in logged(workspace, len(cell.params.iterations)):
        players = {name: name.replace("weights/player/", "player_") for name in entry if "weights/player" in name}
        values = {kept: float(f"{entry[name]:.6g}") for name, kept in (names | players).items() if name in entry}
        rows.append({**own, "iteration": iteration, "step": step, **values})
    return pd.DataFrame(rows)


def _known(cell: Cell, table: pd.DataFrame) -> pd.DataFrame:
    """A cell's rows, if they were made under the same parameters."""
    if table.empty:
        return table
    same = (table[KEY] == list(cell.key)).all(axis=1) & (table["params"] == cell.digest)
    return table[same].drop(columns=["chosen"], errors="ignore")
