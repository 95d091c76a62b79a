"""The flow `tpaw-compare`: a study of methods side by side. Deployment: `tpaw-compare/compare`.

Knows how to start a study and to show its report; must not know what a study does.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows import dvc
from tpaw_core.study import plan
from tpaw_core.workspace.paths import Workspace


@task
def run_study(arguments: list[str]) -> None:
    dvc.run("tpaw", "compare", *arguments)


@task
def show_report(folder: Path) -> None:
    """The report as a Markdown artifact, with a link to the page that has the plots."""
    text, _, _ = (folder / "report.md").read_text(encoding="utf-8").partition("## Plots")
    page = (folder / "report.html").resolve()
    create_markdown_artifact(f"{text}\n\nWith plots: {page.as_uri()}, and in MLflow's experiment `tpaw-compare`.",
                             key="tpaw-compare", description="Methods side by side")  # fmt: skip


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
    run_study([*arguments, *(overrides or [])])
    show_report(home)
