"""The command line: one sub-command a stage, plus what looks after a workspace and its services.

Heavy imports happen inside the stages, so that `tpaw --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from tpaw_core import preload
from tpaw_core.errors import TpawError

app = typer.Typer(
    help="Team-based self-play with dual adaptive weighting (TPAW).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AtIteration = Annotated[int, typer.Option("--iteration", "-t", min=1, help="The iteration; t makes checkpoint t.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


def main() -> None:
    """Run a command; an error is one message on stderr and exit status 1, with a traceback only where asked for."""
    if (status := preload.ask("tpaw", sys.argv[1:])) is not None:
        sys.exit(status)
    show = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    try:
        app()
    except Exception as error:
        if show or (message := _explanation(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, TpawError) else 1)


def _explanation(error: Exception) -> str | None:
    """What to tell the user instead of a traceback; None where only a traceback can help."""
    from tpaw_core import workspace

    if isinstance(error, TpawError):
        return str(error)
    if said := workspace.disk_full(error):
        return str(said)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; free space or mend the file's rights"
    return None


@app.callback()
def _callback() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
def use(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name; left out, the active params are changed.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
) -> None:
    """Switch params.yaml to a recipe, with overrides."""
    from tpaw_core import config, workspace

    recipe, given = _apart(recipe, overrides)
    with workspace.exclusive("use", "flow"):  # a flow that runs has read the params
        params = config.switch(recipe, given)
    print(f"params.yaml: recipe {params.recipe}{', ' + ', '.join(given) if given else ''}")


@app.command()
def data() -> None:
    """Make data/ from the recipe's rows."""
    from tpaw_core import config, stages

    counts = stages.prepare_data(config.load())
    print(f"data/: {counts['train']} train rows, {counts['heldout']} held-out rows")


@app.command()
def sft() -> None:
    """Make checkpoint 0."""
    _stage("sft")


@app.command()
def generate(iteration: AtIteration) -> None:
    """Let checkpoint t-1 answer the training prompts."""
    _stage("generate", iteration)


@app.command()
def team(iteration: AtIteration) -> None:
    """Choose the team from the registry."""
    _stage("assemble_team", iteration)


@app.command()
def weights(iteration: AtIteration) -> None:
    """Score the triplets and compute the player weights."""
    _stage("weigh", iteration)


@app.command()
def train(iteration: AtIteration) -> None:
    """Make checkpoint t."""
    _stage("train", iteration)


@app.command()
def evaluate(iteration: Annotated[int, typer.Option("--iteration", "-t", min=0, help="The checkpoint.")]) -> None:
    """Run the benchmarks on checkpoint t."""
    _stage("evaluate", iteration)


@app.command()
def report() -> None:
    """Write report/ from what was measured, and print its table."""
    from tpaw_core import report as pages

    _stage("report")
    print(pages.table())


@app.command()
def table() -> None:
    """Print one row a checkpoint, and where the last flow run spent its time."""
    from tpaw_core import report as pages

    print(pages.table())
    if seconds := pages.flow_seconds():
        print("\nseconds of the last flow run by stage: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()))
        print(f"in all: {sum(seconds.values()):.0f} s")


@app.command()
def compare(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe's name; left out, the study's own, or the active params.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ..., for all methods.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="A method's name, or 'mine:objective.eta=2'; repeat it.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="1-5, or 1,2,7.")] = None,
    rates: Annotated[str | None, typer.Option(help="Learning rates that every method tries: 1e-4,3e-4.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="How far to go.")] = None,
    tuning_seeds: Annotated[int | None, typer.Option(min=1, help="Seeds that choose the rate.")] = None,
    validation_rows: Annotated[int | None, typer.Option(min=1, help="Held-out rows that choose the rate.")] = None,
    folder: Annotated[str | None, typer.Option(help="Where the study lies; default studies/RECIPE.")] = None,
) -> None:
    """Compare methods on a recipe, with seeds and intervals; what is made already is not made again."""
    from pathlib import Path

    from tpaw_core import comparison, owner, plan, study, study_record
    from tpaw_core.results import failures

    recipe, given = _apart(recipe, overrides)
    owner.die_with_it()
    home, planned = plan.make(
        recipe,
        given,
        methods=methods,
        seeds=seeds,
        learning_rates=rates,
        iterations=iterations,
        tuning_seeds=tuning_seeds,
        validation_rows=validation_rows,
        folder=Path(folder) if folder else None,
    )
    results = study.run(planned, home)
    comparison.write(planned, home, results)
    print(comparison.table(planned, results))
    for failure in failures(results.grid):
        print(f"stopped: {failure}")
    print(f"report: {home / 'report.html'}, MLflow run {study_record.record(planned, home, results)}")


@app.command()
def register(
    again: Annotated[bool, typer.Option("--again", help="Bring back versions that were deleted.")] = False,
) -> None:
    """Make sure that every checkpoint is registered in MLflow."""
    from tpaw_core import config, stages

    params = config.load()
    for iteration, version in stages.register(params, stages.open_registry(params), again=again):
        print(f"checkpoint {iteration}: {f'version {version}' if version else 'deleted from the registry (--again)'}")


@app.command()
def verify() -> None:
    """Check every digest, name and number that one file holds of another, here, in DVC's cache and in MLflow."""
    from tpaw_core import config, integrity, stages

    found = integrity.check(stages.open_registry(config.load()))
    for line in found.disagreements:
        print(line)
    print("checked: " + ", ".join(f"{count} {kind}" for kind, count in found.checked.items()))
    if found.disagreements:
        raise TpawError(f"{len(found.disagreements)} disagree, as said above")
    print("nothing disagrees")


@app.command()
def lineage(iteration: Annotated[int, typer.Option("--iteration", "-t", min=0, help="The checkpoint.")]) -> None:
    """Print where checkpoint t comes from, back to the base model."""
    from tpaw_core import lineage as origins

    print(origins.text(iteration))


@app.command()
def prune(yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False) -> None:
    """Say what no team, alias or lineage needs any more; with --yes, remove it."""
    from tpaw_core import config, retention, stages, workspace

    params = config.load()
    with workspace.exclusive("prune"):
        found = retention.removals(params, stages.open_registry(params))
        for removal in found:
            print(f"{removal.bytes / 1e6:.1f} MB: {removal.what}")
        for removal in found if yes else []:
            removal.remove()
    said = "removed" if yes else "would go; `tpaw prune --yes` removes it"
    print(f"{sum(removal.bytes for removal in found) / 1e6:.1f} MB {said}" if found else "nothing can go")


@app.command()
def up() -> None:
    """Start Prefect, MLflow and the worker on this machine."""
    from tpaw_core import services

    services.up()


@app.command()
def down() -> None:
    """Stop what `tpaw up` started."""
    from tpaw_core import services

    services.down()


@app.command()
def status() -> None:
    """Say which services run."""
    from tpaw_core import services

    for service in services.status():
        where = f", {service.url}, process {service.pid}" if service.pid else ""
        print(f"{service.name}: {service.state}{where}")


@app.command("preload", hidden=True)
def serve(address: str) -> None:
    """Import what stages need, and fork for each command that asks at this socket."""
    preload.serve(address)


def _apart(recipe: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """A first argument with "=" is an override, and the recipe was left out."""
    given = list(overrides or [])
    return (None, [recipe, *given]) if recipe is not None and "=" in recipe else (recipe, given)


def _stage(name: str, iteration: int | None = None) -> None:
    from tpaw_core import config

    params = config.load()
    if iteration is not None and iteration > len(params.iterations):
        raise TpawError(f"--iteration {iteration}: params.yaml has {len(params.iterations)} iterations; add it there")
    from tpaw_core import owner, stages

    owner.die_with_it()

    started = time.monotonic()
    arguments = [params] if iteration is None else [params, iteration]
    getattr(stages, name)(*arguments, stages.open_registry(params))
    print(f"{name}{'' if iteration is None else f' {iteration}'}: {time.monotonic() - started:.1f} s", flush=True)
