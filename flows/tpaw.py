"""The flow `tpaw`: SFT, then iterations of generate, team, weights, train, evaluate. Deployment: `tpaw/iterate`.

A task runs one stage through DVC, so what is up to date is skipped and a failed flow goes on where it broke.
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
from tpaw_core import config, report, workspace
from tpaw_core.config import Params


def can_help(task: Any, run: Any, state: Any) -> bool:
    """Retry where the failure may pass: not where the stage refused its input."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, dvc.StageFailed) or error.temporary


RETRY: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [5, 30], "retry_condition_fn": can_help}


@task
def configure(recipe: str | None, overrides: list[str], iterations: int | None) -> Params:
    """params.yaml says what runs: switch the recipe, apply the overrides, add iterations where there are too few."""
    return config.switch(recipe, overrides, iterations)


@task(**RETRY)
def prepare_data() -> None:
    dvc.run("tpaw", "data")
    dvc.add(workspace.DATA)


@task(**RETRY)
def fine_tune() -> bool:
    return dvc.repro("sft")


@task(**RETRY, task_run_name="generate-{iteration}")
def generate(iteration: int) -> bool:
    return dvc.repro(f"generate@{iteration}", iteration)


@task(**RETRY, task_run_name="assemble-team-{iteration}")
def assemble_team(iteration: int) -> bool:
    return dvc.repro(f"team@{iteration}", iteration)


@task(**RETRY, task_run_name="compute-adaptive-weights-{iteration}")
def compute_adaptive_weights(iteration: int) -> bool:
    return dvc.repro(f"weights@{iteration}", iteration)


@task(**RETRY, task_run_name="train-{iteration}")
def train(iteration: int) -> bool:
    return dvc.repro(f"train@{iteration}", iteration)


@task(**RETRY, task_run_name="evaluate-{iteration}")
def evaluate(iteration: int) -> bool:
    return dvc.repro(f"evaluate@{iteration}" if iteration else "evaluate-sft", iteration)


@task(**RETRY)
def write_report() -> bool:
    return dvc.repro("report")


@task(**RETRY)
def prune() -> None:
    dvc.run("tpaw", "prune", "--yes")


@task
def show_results(params: Params, seconds: dict[str, float]) -> None:
    """The result so far as a Markdown artifact, each checkpoint with a link to its MLflow run."""
    from tpaw_core import checkpoint
    from tpaw_core.registry import EXPERIMENT, Registry, tracking_uri

    registry = Registry(params)
    lines = [report.table(), "", "| checkpoint | MLflow run |", "|---|---|"]
    for iteration in report.evaluated():
        run = registry.run_of(checkpoint.manifest(workspace.checkpoint(iteration))["digest"])
        link = f"[{run}]({tracking_uri()}/#/experiments/{registry.experiment}/runs/{run})"
        lines.append(f"| {iteration} | {link if run and tracking_uri().startswith('http') else run or 'pruned'} |")
    lines += ["", f"Registered model `tpaw-policy`, experiment `{EXPERIMENT}`.", "", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {value:.1f} |" for stage, value in seconds.items()]
    create_markdown_artifact("\n".join(lines), key="tpaw-result", description="One row a checkpoint")
    get_run_logger().info("\n%s", report.table())


@flow(name="tpaw", log_prints=True)
def tpaw(
    iterations: int | None = None,
    recipe: str | None = None,
    overrides: list[str] | None = None,
    prune_after: bool = False,
) -> None:
    """Improve a model from its own fine-tuning rows.

    Args:
        iterations: how far to go; left out, all that params.yaml lists.
        recipe: switch params.yaml to this recipe first; left out, params.yaml stays.
        overrides: "section.key=value" entries, written to params.yaml.
        prune_after: after each iteration remove what no team, alias or lineage needs any more (`tpaw prune`).
    """
    with workspace.exclusive(f"flow run {flow_run.name}", "flow"):
        iterate(configure(recipe, overrides or [], iterations), iterations, prune_after)


def iterate(params: Params, iterations: int | None, prune_after: bool) -> None:
    """All stages in their order."""
    last = len(params.iterations) if iterations is None else iterations
    seconds: dict[str, float] = {}
    done, total = 0, 4 + 5 * last
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
        step(prepare_data)
        step(fine_tune)
        step(evaluate, 0)
        for iteration in range(1, last + 1):
            step(generate, iteration)
            step(assemble_team, iteration)
            step(compute_adaptive_weights, iteration)
            step(train, iteration)
            step(evaluate, iteration)
            if prune_after:
                prune()
            show_results(params, seconds)
        step(write_report)
        show_results(params, seconds)
    with workspace.publish(workspace.FLOW_SECONDS) as aside:
        aside.write_text(json.dumps(seconds))


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    tpaw()
