"""The command line: one sub-command per stage, and commands that look after a workspace and its services.

Heavy imports happen inside the commands, so that `tpaw --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpaw_core import console
from tpaw_core.errors import TpawError
from tpaw_core.processes import direct, fork_server
from tpaw_core.workspace.files import explanation
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    from tpaw_core.stages.context import Context

app = typer.Typer(
    help="Team-based self-play with dual adaptive weighting (TPAW).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AtIteration = Annotated[int, typer.Option("--iteration", "-t", min=1, help="Iteration number t.")]
AtCheckpoint = Annotated[int, typer.Option("--iteration", "-t", min=0, help="Checkpoint number t (0: SFT).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]
_workspace = Workspace()


def main() -> None:
    """Run a command; an error is one message on stderr and exit status 1, with a traceback only on request."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of a job that this stage is no part of: torch would wait for it
        os.environ.pop(name, None)
    if (status := fork_server.ask("tpaw", sys.argv[1:])) is not None:
        sys.exit(status)
    show = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    try:
        app(prog_name="tpaw")
    except Exception as error:
        if show or (message := explanation(error, _workspace.root)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, TpawError) else 1)


@app.callback(epilog="Add --traceback to any command for the full traceback.")
def _options(
    folder: Annotated[Path, typer.Option("-C", metavar="FOLDER", help="Work in FOLDER.", file_okay=False)] = Path(),
) -> None:
    global _workspace
    if not folder.is_dir():
        raise TpawError(f"-C {folder}: not a folder")
    _workspace = Workspace(folder)
    direct.reach_this_machine()
    console.quieten_libraries()
    console.show()


@app.command()
def use(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name; omit it to keep the current one.")] = None,
    overrides: Overrides = None,
) -> None:
    """Switch params.yaml to a recipe, with overrides."""
    from tpaw_core.config import params_file

    recipe, given = _apart(recipe, overrides)
    with _workspace.exclusive("use", "flow"):  # a running flow has read the params
        params = params_file.switch(_workspace, recipe, given)
    print(f"params.yaml: recipe {params.recipe}{', ' + ', '.join(given) if given else ''}")


@app.command()
def data() -> None:
    """Build data/ from the rows that params.yaml names."""
    from tpaw_core.stages import data as stage

    counts = stage.data(_context())
    print(f"data/: {counts['train']} train rows, {counts['heldout']} held-out rows")


@app.command()
def check() -> None:
    """Check rows, model, benchmarks, memory and disk, and list every problem. Replaces data/."""
    _run("check")


@app.command()
def encode() -> None:
    """Render and tokenise the rows, once for all stages."""
    _run("encode")


@app.command()
def sft() -> None:
    """Fine-tune the base model: checkpoint 0."""
    _run("sft")


@app.command()
def generate(iteration: AtIteration) -> None:
    """Answer the training prompts with checkpoint t-1, for iteration t."""
    _run("generate", iteration)


@app.command()
def team(iteration: AtIteration) -> None:
    """Choose the team of iteration t from the registered checkpoints."""
    _run("team", iteration)


@app.command()
def weights(iteration: AtIteration) -> None:
    """Score the triplets of iteration t and compute the player weights."""
    _run("weights", iteration)


@app.command()
def train(iteration: AtIteration) -> None:
    """Train checkpoint t against the team of iteration t."""
    _run("train", iteration)


@app.command()
def evaluate(iteration: AtCheckpoint) -> None:
    """Run the benchmarks on checkpoint t."""
    _run("evaluate", iteration)


@app.command()
def report() -> None:
    """Write report/ from the results, and print its table."""
    from tpaw_core.report import table as rows

    _run("report")
    print(rows.table(_workspace))


@app.command()
def table() -> None:
    """Print one row per checkpoint, sample answers from before and after self-play, and how long each stage took."""
    from tpaw_core.report import page

    print(page.summary(_workspace))


@app.command()
def compare(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; default: the study's, else params.yaml's.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ..., for all methods.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="A method's name, or 'mine:objective.eta=2'; repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 1-5 or 1,2,7.")] = None,
    rates: Annotated[str | None, typer.Option(help="Learning rates to try with every method, e.g. 1e-4,3e-4.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Number of iterations.")] = None,
    tuning_seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds used to choose the learning rate.")
    ] = None,
    validation_rows: Annotated[
        int | None, typer.Option(min=1, help="Number of held-out rows used to choose the learning rate.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="The study's folder; default: studies/RECIPE.")] = None,
) -> None:
    """Compare methods over several seeds, with 95% intervals. The same command, run on several machines that share
    this folder, divides the work among them; finished work is reused."""
    from tpaw_core.processes import parent
    from tpaw_core.study import mlflow_runs, page, plan, results
    from tpaw_core.study.run import one_writer, run

    parent.exit_with_parent()
    recipe, given = _apart(recipe, overrides)
    home, planned = plan.make(
        _workspace, recipe, given,
        methods=methods, seeds=seeds, learning_rates=rates, iterations=iterations, tuning_seeds=tuning_seeds,
        validation_rows=validation_rows, folder=folder,
    )  # fmt: skip
    found = run(_workspace, planned, home)
    print("\n".join([page.table(planned, found), *(f"stopped: {why}" for why in results.failures(found.grid))]))
    with one_writer(home):
        page.write(planned, home, found)
        print(f"report: {home / 'report.html'}, MLflow run {mlflow_runs.record(_workspace, planned, home, found)}")


@app.command()
def register(
    again: Annotated[bool, typer.Option("--again", help="Bring back versions that were deleted.")] = False,
) -> None:
    """Register in MLflow any checkpoint that is not registered yet."""
    for iteration, version in _context().register(again=again):
        print(f"checkpoint {iteration}: {f'version {version}' if version else 'was deleted; --again restores it'}")


@app.command()
def verify() -> None:
    """Check all recorded digests and references in the workspace, DVC's cache and MLflow."""
    from tpaw_core.upkeep import verify as upkeep

    found = upkeep.check(_context())
    checked = "checked: " + (", ".join(f"{kind} {count}" for kind, count in found.checked.items()) or "nothing is here")
    print("\n".join([*(f"note: {note}" for note in found.notes), *found.disagreements, checked]))
    if found.disagreements:
        raise TpawError(f"problems: {len(found.disagreements)}, listed above")
    print("no problems found")


@app.command()
def lineage(iteration: AtCheckpoint) -> None:
    """Print where checkpoint t comes from, back to the base model."""
    from tpaw_core.upkeep import lineage as upkeep

    print(upkeep.text(_workspace, iteration))


@app.command()
def export(iteration: AtCheckpoint, folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Merge the LoRA adapter of checkpoint t into its base, in float32, as a whole model in FOLDER."""
    import_module("tpaw_core.upkeep.export").export(_context(), iteration, folder)


@app.command()
def prune(yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False) -> None:
    """List checkpoints and caches that no team or alias still needs; with --yes, delete them."""
    from tpaw_core.upkeep import prune as upkeep

    with _workspace.exclusive("prune"):
        found = upkeep.deletions(_context())
        for deletion in found:
            print(f"{deletion.bytes / 1e6:.1f} MB: {deletion.what}")
            if yes:
                deletion.delete()
    done = "deleted" if yes else "can be deleted with `tpaw prune --yes`"
    print(f"{sum(deletion.bytes for deletion in found) / 1e6:.1f} MB {done}" if found else "nothing can be deleted")


@app.command()
def up() -> None:
    """Start Prefect, MLflow and the worker on this machine."""
    from tpaw_core.processes import services

    services.up(_workspace)


@app.command()
def down() -> None:
    """Stop what `tpaw up` started."""
    from tpaw_core.processes import services

    services.down(_workspace)


@app.command()
def status() -> None:
    """Show which services are running."""
    from tpaw_core.processes import services

    print(*services.status(_workspace), sep="\n")


@app.command("preload", hidden=True)
def serve(address: str) -> None:
    """Import what stages need, and fork for each command that asks at this socket."""
    fork_server.serve(address)


def _apart(recipe: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """A first argument with "=" is an override: the recipe was omitted."""
    given = list(overrides or [])
    return (None, [recipe, *given]) if recipe is not None and "=" in recipe else (recipe, given)


def _context() -> Context:
    from tpaw_core.config import params_file
    from tpaw_core.stages.context import open_context

    return open_context(_workspace, params_file.load(_workspace.params_file))


def _run(name: str, iteration: int | None = None) -> None:
    """The stage ``name``: the function of this name in the module of this name."""
    from tpaw_core.processes import parent

    context = _context()
    if iteration is not None and iteration > (known := len(context.params.iterations)):
        raise TpawError(f"--iteration {iteration}: params.yaml ends with iteration {known}; add {iteration} there")
    parent.exit_with_parent()
    stage: Callable[..., None] = getattr(import_module(f"tpaw_core.stages.{name}"), name)
    started = time.monotonic()
    stage(context, *([] if iteration is None else [iteration]))
    print(f"{name}{'' if iteration is None else f' {iteration}'}: {time.monotonic() - started:.1f} s", flush=True)
