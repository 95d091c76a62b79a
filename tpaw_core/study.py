"""A study: methods side by side on one recipe, for every seed and learning rate, through the stages of the product.

A cell is one method with one rate and one seed, in a workspace of its own. Cells run in this process's children, one a
core; what two cells have in common is made once and linked, and what is made stays: a study that was stopped goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tpaw_core import data, graph, owner, results, stages, workspace
from tpaw_core.config import Params
from tpaw_core.errors import Diverged, TpawError
from tpaw_core.plan import PLAN_FILE, Cell, Plan
from tpaw_core.progress import Progress
from tpaw_core.results import Results

RUN = {
    "sft": stages.sft,
    "generate": stages.generate,
    "team": stages.assemble_team,
    "weights": stages.weigh,
    "train": stages.train,
    "evaluate": stages.evaluate,
}


def run(plan: Plan, folder: Path) -> Results:
    """Run what is not yet made; what came out is in the folder's CSV files too.

    Raises TpawError for a plan that no cell can follow, and where a stage refuses; what is made is kept. A cell whose
    numbers stop being finite is a result.
    """
    plan.cells(plan.learning_rates, plan.seeds)  # refused before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    with workspace.publish(folder / PLAN_FILE) as aside:
        aside.write_text(plan.model_dump_json(indent=2) + "\n")
    tuned, others = plan.seeds[: plan.tuning_seeds], plan.seeds[plan.tuning_seeds :]
    _run_cells(folder, plan.cells(plan.learning_rates, tuned), "tuning seeds")
    found = results.collect(plan, folder)
    results.write(folder, found)  # enough to go on with elsewhere
    best = results.best_rates(plan, found.grid)
    _run_cells(folder, [plan.cell(m, best[m], seed) for m in plan.methods for seed in others], "other seeds")
    found = results.collect(plan, folder)
    results.write(folder, found)
    return found


def _run_cells(folder: Path, cells: list[Cell], what: str) -> None:
    import torch

    known = results.read(folder, results.GRID_FILE)
    cells = [cell for cell in cells if not results.finished(cell, known)]
    if not cells:
        return
    total = sum(len(graph.read(cell.params)) for cell in cells)
    progress = Progress(total, what)
    if torch.accelerator.is_available():  # it is not shared, and does not survive a fork
        for cell in cells:
            _run_cell(folder.resolve(), cell, progress.advance)
        progress.close()
        return
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    ticks: Any = context.SimpleQueue()
    with ProcessPoolExecutor(min(cores, len(cells)), context, _alone, (ticks,)) as pool:
        jobs = [pool.submit(_work, folder.resolve(), cell) for cell in cells]
        try:
            left = jobs
            while left:
                time.sleep(0.2)
                ended = [job for job in left if job.done()]
                left = [job for job in left if job not in ended]
                for job in ended:
                    job.result()
                while not ticks.empty():
                    progress.advance(ticks.get())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.close()


_ticks: Any = None


def _alone(ticks: Any) -> None:
    """A child works on one core, and ends with its parent."""
    import torch

    global _ticks
    _ticks = ticks
    owner.die_with_it()
    torch.set_num_threads(1)


def _work(folder: Path, cell: Cell) -> None:
    _run_cell(folder, cell, lambda: _ticks.put(1))


def _run_cell(folder: Path, cell: Cell, tick: Callable[[], None]) -> None:
    """Bring a cell's stages up to date, one after the other."""
    params, home = _placed(cell.params), cell.folder(folder)
    order = graph.read(params)
    scores, failure = home / workspace.SCORES, home / results.FAILURE_FILE
    scores.parent.mkdir(parents=True, exist_ok=True)
    if not scores.is_symlink():
        (folder / "scores").mkdir(exist_ok=True)
        scores.symlink_to(folder / "scores")
    done = 0
    try:
        with _inside(home):
            data.prepare(params.data, params.seed)
        for stage in order:
            with _inside(home):
                _make(folder / "made", stage, params)
            done += 1
            tick()
        failure.unlink(missing_ok=True)
    except Diverged as error:
        failure.write_text(f"{order[done].name}: {error}\n")
        for _ in order[done:]:
            tick()
    except TpawError as error:
        raise TpawError(f"{cell.method}, learning rate {cell.learning_rate:g}, seed {cell.seed}: {error}") from None


def _placed(params: Params) -> Params:
    """With absolute paths, as a cell's folder is not this one."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    rows = {name: absolute(getattr(params.data, name)) for name in ("path", "heldout_path")}
    model = {"model_name_or_path": absolute(params.model.model_name_or_path)}
    changes = {"data": params.data.model_copy(update=rows), "model": params.model.model_copy(update=model)}
    return params.model_copy(update=changes)


def _make(made: Path, stage: graph.Stage, params: Params) -> None:
    """The stage's outputs, in the current workspace: linked where some cell has made them, else made and kept."""
    kept = made / graph.key(stage, params)
    made.mkdir(exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            started = time.monotonic()
            arguments = [params] if stage.iteration is None else [params, stage.iteration]
            RUN[stage.command](*arguments, None)  # type: ignore[operator]
            with workspace.publish(kept) as aside:
                aside.mkdir()
                for out in stage.outs:
                    _link(out, aside / out)
                (aside / "seconds").write_text(f"{time.monotonic() - started:.3f}")
        else:
            for out in stage.outs:
                with workspace.publish(out) as aside:
                    _link(kept / out, aside)
    seconds = results.SECONDS / stage.name
    seconds.parent.mkdir(exist_ok=True)
    seconds.write_text((kept / "seconds").read_text())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)


@contextmanager
def _inside(home: Path) -> Iterator[None]:
    """The current folder is the cell's, and what is written to stdout and stderr goes to its log."""
    before, streams = os.getcwd(), [os.dup(1), os.dup(2)]
    with (home / "log.txt").open("ab") as log:
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(home)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.chdir(before)
        for stream, copy in enumerate(streams, start=1):
            os.dup2(copy, stream)
            os.close(copy)
