"""Running a study: methods on one recipe, for every seed and learning rate, through the stages of the product.

A cell is one method with one rate and one seed, in a workspace of its own. Cells run in child processes, one per core;
what two cells have in common is made once and linked. Finished stages are kept, so an interrupted study resumes.

Any number of runs, on any machines that share the study's folder, may work on one study: each goes through all cells,
does what is missing, and leaves to the others what they are doing. A run that dies gives its cells back.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

from tpaw_core import console
from tpaw_core.errors import Diverged, TpawError, Unavailable
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
from tpaw_core.workspace import files, lease
from tpaw_core.workspace.paths import Workspace

logger = logging.getLogger(__name__)
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
    with one_writer(folder), files.publish(folder / PLAN_FILE) as aside:
        aside.write_text(plan.model_dump_json(indent=2) + "\n")
    tuned, others = plan.seeds[: plan.tuning_seeds], plan.seeds[plan.tuning_seeds :]
    _run_cells(workspace, folder, plan.cells(plan.learning_rates, tuned), "tuning seeds")
    best = results.best_rates(plan, _write(plan, folder).grid)  # written: enough to resume from elsewhere
    _run_cells(workspace, folder, [plan.cell(m, best[m], seed) for m in plan.methods for seed in others], "other seeds")
    return _write(plan, folder)


def one_writer(folder: Path) -> SoftFileLease:
    """Hold this while you write the study's results or reports: every run of the study does."""
    return lease.of(folder / "results.lease")


def _write(plan: Plan, folder: Path) -> Results:
    with one_writer(folder):
        found = results.collect(plan, folder)
        results.write_csv(folder, found)
    return found


def _run_cells(workspace: Workspace, folder: Path, cells: list[Cell], what: str) -> None:
    import torch

    known = results.read_csv(folder, results.GRID_FILE)
    cells = [cell for cell in cells if not results.finished(cell, known)]
    if not cells:
        return
    cells.sort(key=partial(_has_ended, folder))  # what is left to do comes first
    os.environ["TQDM_DISABLE"] = "1"  # the bars of many cells would overwrite one another
    graph = workspace.root / stage_graph.GRAPH_FILE
    progress = Progress(sum(len(stage_graph.read_graph(graph, cell.params)) for cell in cells), what)
    if torch.accelerator.is_available():  # it is not shared, and does not survive a fork
        while cells:
            if other := _run_cell(workspace, folder, cell := cells.pop(0), progress.advance):
                _say(f"{cell.name}: {other} works on it")
                cells.append(cell)
        progress.close()
        return
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    ticks: Any = context.SimpleQueue()
    with ProcessPoolExecutor(min(cores, len(cells)), context, _start, (ticks,)) as pool:
        left = {pool.submit(_work, workspace, folder, cell): cell for cell in cells}
        try:
            while left:
                ended, _ = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
                for job in ended:
                    cell = left.pop(job)
                    if other := job.result():
                        _say(f"{cell.name}: {other} works on it")
                        left[pool.submit(_work, workspace, folder, cell)] = cell
                while not ticks.empty():
                    progress.advance(ticks.get())
        except BrokenProcessPool:
            raise Unavailable(
                "a process that ran a cell was killed, perhaps because memory ran out; run the same command again, "
                "finished stages are kept"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.close()


@cache
def _say(line: str) -> None:
    """Once."""
    logger.info(line)


_ticks: Any = None


def _start(ticks: Any) -> None:
    """A child works on one core, and ends with its parent."""
    import torch

    global _ticks
    _ticks = ticks
    parent.exit_with_parent()
    torch.set_num_threads(1)


def _work(workspace: Workspace, folder: Path, cell: Cell) -> str | None:
    return _run_cell(workspace, folder, cell, lambda: _ticks.put(1))


def _run_cell(workspace: Workspace, folder: Path, cell: Cell, tick: Callable[[], None]) -> str | None:
    """Bring a cell's stages up to date; where another process does so, wait a second and say which."""
    claim = _claim(cell.workspace(folder).state / "cell.lease")
    before = claim.owner
    try:
        held = claim.acquire(blocking=False)
    except Timeout:
        time.sleep(1)
        return lease.name(before)
    with held:
        if before and not _has_ended(folder, cell):
            logger.info("%s: taken over from %s, which has died", cell.name, lease.name(before))
            lease.free(folder / "made", before)
        _bring_up_to_date(workspace, folder, cell, tick)
    return None


def _has_ended(folder: Path, cell: Cell) -> bool:
    home = cell.workspace(folder)
    return home.metrics(len(cell.params.iterations)).exists() or (home.root / results.FAILURE_FILE).exists()


@cache  # the same object each time: it remembers when it saw a sign of life
def _claim(path: Path) -> SoftFileLease:
    return lease.of(path)


def _bring_up_to_date(workspace: Workspace, folder: Path, cell: Cell, tick: Callable[[], None]) -> None:
    """One stage after the other."""
    source = workspace.source or workspace.root
    home = replace(cell.workspace(folder), source=source, shared_scores=folder / "scores")
    order = stage_graph.read_graph(workspace.root / stage_graph.GRAPH_FILE, cell.params)
    failure, done = home.root / results.FAILURE_FILE, 0
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
        with files.publish(failure) as aside:
            aside.write_text(f"{order[done].name}: {error}\n")
        for _ in order[done:]:
            tick()
    except TpawError as error:
        raise TpawError(f"{cell.name}: {error}") from None


def _make(made: Path, stage: stage_graph.Stage, context: Context) -> None:
    """The stage's outputs in the cell's workspace: linked where another cell has made them, else made and kept.

    Raises Diverged also where that is what another cell has found.
    """
    root = context.workspace.root
    kept = made / stage_graph.key(context.workspace, stage, context.params)
    with nullcontext() if kept.exists() else lease.of(Path(f"{kept}.lease")):
        if not kept.exists():
            _make_and_keep(kept, stage, context)
    if (diverged := kept / results.FAILURE_FILE).exists():
        raise Diverged(diverged.read_text())
    links = {root / out: kept / out for out in stage.outs}
    for target, source in (links | {root / results.SECONDS / stage.name: kept / results.SECONDS}).items():
        with files.publish(target) as aside:
            _link(source, aside)


def _make_and_keep(kept: Path, stage: stage_graph.Stage, context: Context) -> None:
    started, failure = time.monotonic(), None
    try:
        RUN[stage.command](context, *([] if stage.iteration is None else [stage.iteration]))
    except Diverged as error:
        failure = str(error)
    with files.publish(kept) as aside:
        aside.mkdir()
        if failure is None:
            for out in stage.outs:
                _link(context.workspace.root / out, aside / out)
        else:
            (aside / results.FAILURE_FILE).write_text(failure)
        (aside / results.SECONDS).write_text(f"{time.monotonic() - started:.3f}")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)
