"""Running a study: methods on one recipe, for every seed and learning rate, through the stages of the product.

A cell is one method with one rate and one seed, in a workspace of its own. Cells run in child processes, one per core;
what two cells have in common is made once and linked. Finished stages are kept, so an interrupted study resumes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from tpaw_core import console
from tpaw_core.errors import Diverged, TpawError
from tpaw_core.processes import parent
from tpaw_core.progress import Progress
from tpaw_core.stages.context import Context
from tpaw_core.stages.data import data
from tpaw_core.stages.encode import encode
from tpaw_core.stages.evaluate import evaluate
from tpaw_core.stages.generate import generate
from tpaw_core.stages.sft import sft
from tpaw_core.stages.team import team
from tpaw_core.stages.train import train
from tpaw_core.stages.weights import weights
from tpaw_core.study import results, stage_graph
from tpaw_core.study.plan import PLAN_FILE, Cell, Plan
from tpaw_core.study.results import Results
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

RUN: dict[str, Callable[..., None]] = {
    "encode": encode,
    "sft": sft,
    "generate": generate,
    "team": team,
    "weights": weights,
    "train": train,
    "evaluate": evaluate,
}


def run(workspace: Workspace, plan: Plan, folder: Path) -> Results:
    """Run what is missing; the folder's CSV files hold the results too. ``workspace``: the project's.

    Raises TpawError for a plan that no cell can follow, and where a stage refuses. A cell whose numbers stop being
    finite is a result.
    """
    plan.cells(plan.learning_rates, plan.seeds)  # refused before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    with files.publish(folder / PLAN_FILE) as aside:
        aside.write_text(plan.model_dump_json(indent=2) + "\n")
    tuned, others = plan.seeds[: plan.tuning_seeds], plan.seeds[plan.tuning_seeds :]
    _run_cells(workspace, folder, plan.cells(plan.learning_rates, tuned), "tuning seeds")
    found = results.collect(plan, folder)
    results.write_csv(folder, found)  # enough to resume from elsewhere
    best = results.best_rates(plan, found.grid)
    _run_cells(workspace, folder, [plan.cell(m, best[m], seed) for m in plan.methods for seed in others], "other seeds")
    found = results.collect(plan, folder)
    results.write_csv(folder, found)
    return found


def _run_cells(workspace: Workspace, folder: Path, cells: list[Cell], what: str) -> None:
    import torch

    known = results.read_csv(folder, results.GRID_FILE)
    cells = [cell for cell in cells if not results.finished(cell, known)]
    if not cells:
        return
    os.environ["TQDM_DISABLE"] = "1"  # the bars of many cells would overwrite one another
    graph = workspace.root / stage_graph.GRAPH_FILE
    progress = Progress(sum(len(stage_graph.read_graph(graph, cell.params)) for cell in cells), what)
    if torch.accelerator.is_available():  # it is not shared, and does not survive a fork
        for cell in cells:
            _run_cell(workspace, folder, cell, progress.advance)
        progress.close()
        return
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    ticks: Any = context.SimpleQueue()
    with ProcessPoolExecutor(min(cores, len(cells)), context, _start, (ticks,)) as pool:
        left = {pool.submit(_work, workspace, folder, cell) for cell in cells}
        try:
            while left:
                ended, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                for job in ended:
                    job.result()
                while not ticks.empty():
                    progress.advance(ticks.get())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.close()


_ticks: Any = None


def _start(ticks: Any) -> None:
    """A child works on one core, and ends with its parent."""
    import torch

    global _ticks
    _ticks = ticks
    parent.exit_with_parent()
    torch.set_num_threads(1)


def _work(workspace: Workspace, folder: Path, cell: Cell) -> None:
    _run_cell(workspace, folder, cell, lambda: _ticks.put(1))


def _run_cell(workspace: Workspace, folder: Path, cell: Cell, tick: Callable[[], None]) -> None:
    """Bring a cell's stages up to date, one after the other."""
    source = workspace.source or workspace.root
    home = replace(cell.workspace(folder), source=source, shared_scores=folder / "scores")
    order = stage_graph.read_graph(workspace.root / stage_graph.GRAPH_FILE, cell.params)
    failure, done = home.root / results.FAILURE_FILE, 0
    home.root.mkdir(parents=True, exist_ok=True)
    context = Context(home, cell.params)
    try:
        with console.log_to(home.root / "log.txt"):
            data(context)
            for stage in order:
                _make(folder / "made", stage, context)
                done += 1
                tick()
        failure.unlink(missing_ok=True)
    except Diverged as error:
        failure.write_text(f"{order[done].name}: {error}\n")
        for _ in order[done:]:
            tick()
    except TpawError as error:
        raise TpawError(f"{cell.method}, learning rate {cell.learning_rate:g}, seed {cell.seed}: {error}") from None


def _make(made: Path, stage: stage_graph.Stage, context: Context) -> None:
    """The stage's outputs in the cell's workspace: linked where another cell has made them, else made and kept."""
    root = context.workspace.root
    kept = made / stage_graph.key(context.workspace, stage, context.params)
    made.mkdir(exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            started = time.monotonic()
            RUN[stage.command](context, *([] if stage.iteration is None else [stage.iteration]))
            with files.publish(kept) as aside:
                aside.mkdir()
                for out in stage.outs:
                    _link(root / out, aside / out)
                (aside / "seconds").write_text(f"{time.monotonic() - started:.3f}")
        else:
            for out in stage.outs:
                with files.publish(root / out) as aside:
                    _link(kept / out, aside)
    seconds = root / results.SECONDS / stage.name
    seconds.parent.mkdir(exist_ok=True)
    seconds.write_text((kept / "seconds").read_text())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)
