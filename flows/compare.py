"""The flow `tpaw-compare`: a study of methods side by side. Deployment: `tpaw-compare/compare`.

Knows how to start a study, on one worker or several, and to show its report; must not know what a study does.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from filelock import Timeout
from prefect import flow, get_client, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed, State

from flows import dvc
from flows.dvc import RETRY
from tpaw_core.study import plan
from tpaw_core.workspace import lease
from tpaw_core.workspace.paths import Workspace

DEPLOYMENT = "tpaw-compare/compare"


@task(**RETRY)
def run_study(arguments: list[str]) -> None:
    dvc.run("tpaw", "compare", *arguments)


@task
def show_report(folder: Path) -> None:
    """The report as a Markdown artifact, with a link to the page that has the plots."""
    text, _, _ = (folder / "report.md").read_text(encoding="utf-8").partition("## Plots")
    page = (folder / "report.html").resolve()
    create_markdown_artifact(f"{text}\n\nWith plots: {page.as_uri()}, and in MLflow's experiment `tpaw-compare`.",
                             key="tpaw-compare", description="Methods side by side")  # fmt: skip


def share(workers: int) -> list[FlowRun]:
    """Start the same flow for every other worker: runs of one study divide its cells by themselves."""
    given = {**flow_run.parameters, "workers": 1}
    names = [f"{flow_run.name}, worker {n} of {workers}" for n in range(2, workers + 1)]
    return [run_deployment(DEPLOYMENT, parameters=given, timeout=0, flow_run_name=name) for name in names]  # type: ignore


def cancel_waiting(runs: list[FlowRun]) -> None:
    """Those that no worker has begun."""
    with get_client(sync_client=True) as client:
        for run in runs:
            if (state := client.read_flow_run(run.id).state) and state.is_scheduled():
                client.set_flow_run_state(run.id, Cancelled(message="the study has ended"))


def call_crashed(runs: Path) -> None:
    """The study is finished: runs that live end soon. Those that died with their worker would be shown as running.

    Each run holds a lease in ``runs``, named after it.
    """
    state: State[None] = Crashed(message="its worker died; other runs finished the study")
    leases = {path: lease.of(path) for path in runs.glob("*.lease")}
    deadline = time.monotonic() + 1.5 * lease.SECONDS
    with get_client(sync_client=True) as client:
        while any(path.exists() for path in leases) and time.monotonic() < deadline:
            for path, claim in leases.items():
                if path.exists():
                    with suppress(Timeout, ObjectNotFound), claim.acquire(blocking=False):
                        client.set_flow_run_state(UUID(path.stem), state)
            time.sleep(1)


@flow(name="tpaw-compare", log_prints=True)
def compare(
    recipe: str | None = None,
    methods: list[str] | None = None,
    seeds: str | None = None,
    rates: str | None = None,
    iterations: int | None = None,
    tuning_seeds: int | None = None,
    validation_rows: int | None = None,
    overrides: list[str] | None = None,
    folder: str | None = None,
    workers: int = 1,
) -> None:
    """Compare self-play methods on a recipe.

    Args:
        recipe: a recipe's name; by default params.yaml's.
        methods: names that `tpaw compare` knows, or "mine:objective.eta=2"; by default tpaw, spin and sft.
        seeds: "1-5" or "1,2,7".
        rates: learning rates to try with every method, e.g. "1e-4,3e-4".
        iterations: how many.
        tuning_seeds: number of seeds used to choose the rate.
        validation_rows: number of held-out rows used to choose the rate; they are not reported.
        overrides: "section.key=value" entries for all methods.
        folder: the study's folder; by default studies/RECIPE.
        workers: how many of the pool's workers divide the work; all must have this folder at the same path.
    """
    home = plan.home(Workspace(), recipe, Path(folder) if folder else None)
    options = {
        "--seeds": seeds,
        "--rates": rates,
        "--iterations": iterations,
        "--tuning-seeds": tuning_seeds,
        "--validation-rows": validation_rows,
        "--folder": home,
    }
    arguments = [recipe] if recipe else []
    arguments += [part for name, value in options.items() if value is not None for part in (name, str(value))]
    arguments += [part for method in methods or [] for part in ("--method", method)]
    others, runs = share(workers), home / "runs"
    try:
        with lease.of(runs / f"{flow_run.id}.lease"):
            run_study([*arguments, *(overrides or [])])
            show_report(home)
    finally:
        cancel_waiting(others)
    call_crashed(runs)
