"""A study in MLflow: experiment `tpaw-compare`, a run per study with its report, under it a run per cell to compare.

Idempotent: a run is found by its tags, and a cell that has not changed is left as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from tpaw_core.study.plan import PLAN_FILE, Cell, Plan
from tpaw_core.study.results import KEY, Results, logged
from tpaw_core.tracking.client import connect, find_run
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    import pandas as pd


EXPERIMENT = "tpaw-compare"
FILES = ("report.html", "report.md", "results.csv", "grid.csv", PLAN_FILE)


def record(workspace: Workspace, plan: Plan, folder: Path, results: Results) -> str:
    """Bring the study's runs up to date. Returns the id of its run."""
    client, found = connect(workspace, EXPERIMENT)
    experiment = found.experiment_id
    parent = _run(client, experiment, {"tpaw.study": str(folder.resolve())}, folder.name)
    run_id = parent.info.run_id
    for (method, rate, seed), rows in results.grid.groupby(KEY):
        _record_cell(client, experiment, run_id, folder, plan.cell(method, rate, seed), rows)
    for name in FILES:
        client.log_artifact(run_id, str(folder / name))
    client.log_artifacts(run_id, str(folder / "plots"), "plots")
    client.set_terminated(run_id)
    return run_id


def _record_cell(
    client: MlflowClient, experiment: str, parent: str, folder: Path, cell: Cell, rows: pd.DataFrame
) -> None:
    name = f"{cell.method}, rate {cell.learning_rate:g}, seed {cell.seed}"
    tags = {"mlflow.parentRunId": parent, "tpaw.cell": name, "tpaw.params": cell.digest}
    run = _run(client, experiment, tags, name)
    run_id, digest = run.info.run_id, files.digest(rows.to_json())
    if run.data.tags.get("tpaw.results") == digest:
        return
    settings = dict(zip(KEY, cell.key, strict=True))
    settings |= {f"objective.{k}": v for k, v in cell.params.objective.model_dump(by_alias=True).items()}
    settings |= {f"team.{k}": v for k, v in cell.params.team.model_dump().items()}
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in settings.items()])
    columns = rows.drop(columns=["task", *KEY, "iteration", "chosen", "stopped", "params"])
    metrics = [
        Metric(f"iterations/{column}", float(value), 0, int(iteration))
        for iteration, row in zip(rows["iteration"], columns.to_dict("records"), strict=True)
        for column, value in row.items()
        if value is not None and value == value
    ]
    for _, step, entry in logged(cell.workspace(folder), len(cell.params.iterations)):
        metrics += [Metric(key, value, 0, step) for key, value in entry.items() if key not in ("step", "epoch")]
    client.log_batch(run_id, metrics)
    client.set_tag(run_id, "tpaw.chosen", str(bool(rows["chosen"].iloc[0])).lower())
    client.set_tag(run_id, "tpaw.results", digest)
    client.set_terminated(run_id)


def _run(client: MlflowClient, experiment: str, tags: dict[str, str], name: str) -> Run:
    """The run with these tags, or a new one."""
    return find_run(client, experiment, tags) or client.create_run(experiment, tags=tags, run_name=name)
