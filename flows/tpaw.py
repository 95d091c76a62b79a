"""The flow `tpaw`: SFT, then iterations of generate, team, weights, train, evaluate. Deployment: `tpaw/iterate`.

A task runs one stage through DVC, so what is up to date is skipped and a failed flow resumes where it broke.
Knows the order of the stages; must not know what they do.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any
from uuid import UUID

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows import dvc
from flows.dvc import RETRY
from tpaw_core import console
from tpaw_core.artifacts.metrics import evaluated
from tpaw_core.config import params_file
from tpaw_core.config.params import Params
from tpaw_core.processes import direct
from tpaw_core.report import table
from tpaw_core.workspace.paths import Workspace

WORKSPACE = Workspace()  # a flow run starts in its folder


@task
def configure(recipe: str | None, overrides: list[str], iterations: int | None) -> Params:
    """params.yaml decides what runs: switch the recipe, apply the overrides, add iterations where there are too few."""
    return params_file.switch(WORKSPACE, recipe, overrides, iterations)


@task(**RETRY)
def check() -> None:
    dvc.run("tpaw", "check")


@task(**RETRY)
def data() -> None:
    dvc.run("tpaw", "data")
    dvc.add(WORKSPACE.data)


@task(**RETRY)
def encode() -> bool:
    return dvc.repro("encode")


@task(**RETRY)
def sft(force: bool = False) -> bool:
    return dvc.repro("sft", force=force)


@task(**RETRY, task_run_name="generate-{iteration}")
def generate(iteration: int, force: bool = False) -> bool:
    return dvc.repro(f"generate@{iteration}", iteration, force=force)


@task(**RETRY, task_run_name="team-{iteration}")
def team(iteration: int) -> bool:
    return dvc.repro(f"team@{iteration}", iteration)


@task(**RETRY, task_run_name="weights-{iteration}")
def weights(iteration: int, force: bool = False) -> bool:
    return dvc.repro(f"weights@{iteration}", iteration, force=force)


@task(**RETRY, task_run_name="train-{iteration}")
def train(iteration: int, force: bool = False) -> bool:
    return dvc.repro(f"train@{iteration}", iteration, force=force)


@task(**RETRY, task_run_name="evaluate-{iteration}")
def evaluate(iteration: int, force: bool = False) -> bool:
    return dvc.repro(f"evaluate@{iteration}" if iteration else "evaluate-sft", iteration, force=force)


@task(**RETRY)
def report() -> bool:
    return dvc.repro("report")


@task(**RETRY)
def prune() -> None:
    dvc.run("tpaw", "prune", "--yes")


@task
def show_results(params: Params, seconds: dict[str, float]) -> None:
    """The result so far as a Markdown artifact, each checkpoint with a link to its MLflow run."""
    from tpaw_core.artifacts import checkpoint
    from tpaw_core.tracking.client import tracking_uri
    from tpaw_core.tracking.registry import MODEL, Registry
    from tpaw_core.tracking.runs import EXPERIMENT

    registry, uri = Registry(WORKSPACE, params), tracking_uri(WORKSPACE)
    lines = [table.table(WORKSPACE), "", "| checkpoint | MLflow run |", "|---|---|"]
    for iteration in evaluated(WORKSPACE):
        run = registry.run_of(checkpoint.manifest(WORKSPACE, iteration).digest)
        link = f"[{run}]({uri}/#/experiments/{registry.runs.experiment}/runs/{run})"
        lines.append(f"| {iteration} | {link if run and uri.startswith('http') else run or 'pruned'} |")
    lines += ["", f"Registered model `{MODEL}`, experiment `{EXPERIMENT}`.", "", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {value:.1f} |" for stage, value in seconds.items()]
    create_markdown_artifact("\n".join(lines), key="tpaw-result", description="One row per checkpoint")
    get_run_logger().info("\n%s", table.table(WORKSPACE))


@flow(name="tpaw", log_prints=True)
def tpaw(
    iterations: int | None = None,
    recipe: str | None = None,
    overrides: list[str] | None = None,
    prune_after: bool = False,
    rerun_other_code: bool = False,
) -> None:
    """Improve a model using its own fine-tuning rows.

    Args:
        iterations: how many; by default all that params.yaml lists.
        recipe: switch params.yaml to this recipe first; by default params.yaml is left unchanged.
        overrides: "section.key=value" entries, written to params.yaml.
        prune_after: after each iteration delete what no team or alias still needs (`tpaw prune`).
        rerun_other_code: rerun the checkpoints that a different version of the code made (`tpaw lineage` shows which).
    """
    console.show()
    with WORKSPACE.exclusive(f"flow run {flow_run.name}", "flow"):
        params = configure(recipe, overrides or [], iterations)
        iterate(params, iterations, prune_after, _by_other_code() if rerun_other_code else set())


def _by_other_code() -> set[int]:
    """The checkpoints whose manifest names other code than is installed."""
    from tpaw_core.artifacts import checkpoint, code

    made = WORKSPACE.iterations("checkpoints")
    return {t for t in made if code.changed(checkpoint.manifest(WORKSPACE, t).code)}


def iterate(params: Params, iterations: int | None, prune_after: bool, rerun: set[int]) -> None:
    """All stages in their order; those of the checkpoints in ``rerun`` run in any case."""
    last = len(params.iterations) if iterations is None else iterations
    seconds: dict[str, float] = {}
    done, total = 0, 6 + 5 * last
    progress = create_progress_artifact(0.0, key="tpaw-progress", description="Share of the stages that are done")
    assert isinstance(progress, UUID)

    def step(stage: Any, *arguments: Any) -> None:
        nonlocal done
        started = time.monotonic()
        stage(*arguments)
        seconds[stage.name] = seconds.get(stage.name, 0.0) + time.monotonic() - started
        done += 1
        update_progress_artifact(progress, 100 * done / total)

    with dvc.preloaded():
        step(check)
        step(data)
        step(encode)
        step(sft, 0 in rerun)
        step(evaluate, 0, 0 in rerun)
        for iteration in range(1, last + 1):
            force = iteration in rerun
            step(generate, iteration, force)
            step(team, iteration)
            step(weights, iteration, force)
            step(train, iteration, force)
            step(evaluate, iteration, force)
            if prune_after:
                prune()
            show_results(params, seconds)
        step(report)
        show_results(params, seconds)
    with WORKSPACE.publish(WORKSPACE.flow_seconds) as aside:
        aside.write_text(json.dumps(seconds))


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    direct.reach_this_machine()
    tpaw()
