"""A study: methods side by side on one recipe, for every seed and learning rate, through the stages of the product.

A cell is one method with one rate and one seed, in a workspace of its own. Cells run in this process's children, one a
core; what two cells have in common is made once and linked, and what is made stays: a study that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock
from pydantic import Field

from tpaw_core import config, data, graph, owner, stages, workspace
from tpaw_core.config import Count, Params, Positive, Section
from tpaw_core.errors import TpawError
from tpaw_core.methods import find as find_methods
from tpaw_core.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

PLAN_FILE, FAILURE_FILE = "plan.json", Path("failure.txt")
RUN = {
    "sft": stages.sft,
    "generate": stages.generate,
    "team": stages.assemble_team,
    "weights": stages.weigh,
    "train": stages.train,
    "evaluate": stages.evaluate,
}


class Plan(Section):
    """What a study runs; <folder>/plan.json."""

    recipe: str
    methods: dict[str, list[str]]  # name -> overrides
    seeds: list[int]
    learning_rates: list[Positive]
    iterations: Count
    tuning_seeds: Count  # the first so many seeds run at every rate; the others at the rate that was best on them
    validation_rows: Count  # held-out rows that choose the rate, and are not reported
    overrides: list[str] = Field(default_factory=list)  # for all methods; {seed} stands for the seed

    def params(self, cell: Cell) -> Params:
        """The parameters of a cell, with absolute paths: its folder is not this one."""
        own = [
            *self.overrides,
            *self.methods[cell.method],
            f"seed={cell.seed}",
            f"training.learning_rate={cell.learning_rate}",
            f"data.validation_rows={self.validation_rows}",
            "evaluation.tasks=[heldout, validation]",
        ]
        late = tuple(f"iterations.{t}." for t in range(self.iterations + 1, 100))
        own = [entry.replace("{seed}", str(cell.seed)) for entry in own if not entry.startswith(late)]
        params, _ = config.resolve(self.recipe, own, self.iterations)
        kept = {key: entry for key, entry in params.iterations.items() if int(key) <= self.iterations}
        found = params.data.model_copy(
            update={name: _absolute(getattr(params.data, name)) for name in ("path", "heldout_path")}
        )
        model = params.model.model_copy(update={"model_name_or_path": _absolute(params.model.model_name_or_path)})
        return params.model_copy(update={"iterations": kept, "data": found, "model": model})


class Cell(NamedTuple):
    method: str
    learning_rate: float
    seed: int

    def folder(self, study: Path) -> Path:
        return study / "cells" / self.method / f"{self.learning_rate:g}" / str(self.seed)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def plan(
    recipe: str | None,
    overrides: list[str],
    *,
    methods: list[str] | None,
    seeds: str | None,
    learning_rates: str | None,
    folder: Path | None,
    **numbers: int | None,
) -> tuple[Path, Plan]:
    """The folder and the plan of a study: what is given, else what the folder's plan says, else a default.

    Raises TpawError for an unknown method, or text that is not seeds or rates.
    """
    if folder is None:
        folder = Path("studies") / (Path(recipe).stem if recipe else config.load().recipe)
    path = folder / PLAN_FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    name = recipe or known.get("recipe") or str(config.PARAMS_FILE)
    params, _ = config.resolve(name, [entry.replace("{seed}", "0") for entry in overrides])
    rate = params.training.learning_rate
    default = {
        "methods": find_methods(["tpaw", "spin", "sft"]),
        "seeds": [1, 2, 3],
        "learning_rates": [float(f"{rate * factor:.3g}") for factor in (1 / 3, 1, 3)],
        "iterations": len(params.iterations),
        "tuning_seeds": 2,
        "validation_rows": 500,
    }
    given = {
        "recipe": name,
        "overrides": overrides or None,
        "methods": find_methods(methods) if methods else None,
        "seeds": _seeds(seeds) if seeds else None,
        "learning_rates": _rates(learning_rates) if learning_rates else None,
        **numbers,
    }
    tree = {**default, **known, **{key: value for key, value in given.items() if value is not None}}
    tree["tuning_seeds"] = min(tree["tuning_seeds"], len(tree["seeds"]))
    return folder, Plan.model_validate(tree)


def _seeds(text: str) -> list[int]:
    """ "1-3,7" to [1, 2, 3, 7]."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise TpawError(f"--seeds {text!r}: write them as 1-5 or 1,2,7")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise TpawError(f"--rates {text!r}: write them as 1e-4,3e-4")
    return found


def run(plan: Plan, folder: Path) -> pd.DataFrame:
    """Run what is not yet made; gives `results`.

    Raises TpawError for a plan that no cell can follow. A cell whose training fails is kept as failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cell in _cells(plan, plan.learning_rates[:1], plan.seeds):
        plan.params(cell)
    with workspace.publish(folder / PLAN_FILE) as aside:
        aside.write_text(plan.model_dump_json(indent=2) + "\n")
    tuned, others = plan.seeds[: plan.tuning_seeds], plan.seeds[plan.tuning_seeds :]
    _run_cells(plan, folder, _cells(plan, plan.learning_rates, tuned), "comparing")
    best = best_rates(plan, folder)
    _run_cells(
        plan, folder, [Cell(method, best[method], seed) for seed in others for method in plan.methods], "other seeds"
    )
    return results(plan, folder)


def _cells(plan: Plan, rates: Iterable[float], seeds: Iterable[int]) -> list[Cell]:
    """Seeds first: what cells of one seed have in common is then made while others work."""
    return [Cell(method, rate, seed) for method in plan.methods for rate in rates for seed in seeds]


def _run_cells(plan: Plan, folder: Path, cells: list[Cell], what: str) -> None:
    import torch

    ticks: Any = multiprocessing.get_context("fork").SimpleQueue()
    total = sum(len(graph.read(plan.params(cell))) for cell in cells)
    progress = Progress(total, what)
    if torch.accelerator.is_available():  # it is not shared, and does not survive a fork
        for cell in cells:
            for _ in _run_cell(plan, folder, cell):
                progress.advance()
        return
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(cores, max(1, len(cells))), context, _alone, (ticks,)) as pool:
        jobs = [pool.submit(_work, plan, folder.resolve(), cell) for cell in cells]
        try:
            while not all(job.done() for job in jobs) or not ticks.empty():
                while not ticks.empty():
                    progress.advance(ticks.get())
                for job in jobs:
                    if job.done():
                        job.result()
                time.sleep(0.2)
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


def _work(plan: Plan, folder: Path, cell: Cell) -> None:
    for _ in _run_cell(plan, folder, cell):
        _ticks.put(1)


def _run_cell(plan: Plan, folder: Path, cell: Cell) -> Iterator[None]:
    """Bring a cell's stages up to date, one after the other; what stages print goes to its log."""
    params = plan.params(cell)
    order = graph.read(params)
    home = cell.folder(folder)
    home.mkdir(parents=True, exist_ok=True)
    done = 0
    with _inside(home):
        scores = workspace.SCORES
        scores.parent.mkdir(exist_ok=True)
        if not scores.is_symlink():
            (folder / "scores").mkdir(exist_ok=True)
            scores.symlink_to(folder / "scores")
        try:
            data.prepare(params.data, params.seed)
            for stage in order:
                _make(folder / "made", stage, params)
                done += 1
                yield
            FAILURE_FILE.unlink(missing_ok=True)
        except TpawError as error:
            FAILURE_FILE.write_text(f"{order[done].name if done < len(order) else 'data'}: {error}\n")
            for _ in order[done:]:
                yield


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
    seconds = Path("seconds") / stage.name
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
    """The current folder, and what is written to stdout and stderr, are the cell's."""
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


# What came out ------------------------------------------------------------------------------------------------------


def best_rates(plan: Plan, folder: Path) -> dict[str, float]:
    """Each method's learning rate: the best mean on the validation rows at the end, over the tuning seeds."""

    def score(method: str, rate: float) -> float:
        cells = [Cell(method, rate, seed) for seed in plan.seeds[: plan.tuning_seeds]]
        values = [_accuracy(cell.folder(folder), plan.iterations, "validation") for cell in cells]
        return sum(values) / len(values)

    return {method: max(sorted(plan.learning_rates), key=lambda rate: score(method, rate)) for method in plan.methods}


def _accuracy(home: Path, iteration: int, task: str) -> float:
    """0 for a checkpoint that was never made: a method that breaks is not the best one."""
    path = home / workspace.metrics(iteration)
    return _of(json.loads(path.read_text()), task)[0] if path.exists() else 0.0


def _of(metrics: Any, task: str) -> tuple[float, float]:
    """Value and standard error of a task of our own."""
    values = {name.split(",")[0]: value for name, value in metrics["benchmarks"][task].items()}
    return values["exact_match"], values["exact_match_stderr"]


def results(plan: Plan, folder: Path) -> pd.DataFrame:
    """One row a cell and checkpoint, with the columns of results.csv."""
    import pandas as pd

    best = best_rates(plan, folder)
    rows = []
    for cell in _cells(plan, plan.learning_rates, plan.seeds):
        home = cell.folder(folder)
        if not home.exists():
            continue
        spent = tokens = 0.0
        for iteration in range(plan.iterations + 1):
            path = home / workspace.metrics(iteration)
            if not path.exists():
                break
            metrics = json.loads(path.read_text())
            log = training_log(home, iteration)
            accuracy, stderr = _of(metrics, "heldout")
            validation, _ = _of(metrics, "validation")
            trained = metrics["training"]
            if iteration:
                spent += sum(float(p.read_text()) for p in _seconds(home, iteration))
                epochs = plan.params(cell).training.num_train_epochs
                tokens += log[-1]["tokens"] * epochs / log[-1]["epoch"] if log else 0.0  # the last entry may be early
            rows.append(
                {
                    "task": plan.recipe,
                    "method": cell.method,
                    "learning_rate": cell.learning_rate,
                    "chosen": cell.learning_rate == best[cell.method],
                    "seed": cell.seed,
                    "iteration": iteration,
                    "accuracy": accuracy,
                    "stderr": stderr,
                    "validation": validation,
                    "target_reward": trained.get("rewards_chosen"),
                    "answer_reward": trained.get("rewards_rejected"),
                    "target_logp": trained.get("logps_chosen"),
                    "answer_logp": trained.get("logps_rejected"),
                    "target_active": trained.get("target_active"),
                    "equal": data.equal_share(home / workspace.synthetic(iteration)),
                    "seconds": spent,
                    "tokens": tokens,
                }
            )
    return pd.DataFrame(rows)


def by_seed(results: pd.DataFrame, method: str, iteration: int, column: str = "accuracy") -> dict[int, float]:
    """One column of `results` for a method and an iteration, by seed."""
    found = results[(results["method"] == method) & (results["iteration"] == iteration)].dropna(subset=[column])
    return dict(zip(found["seed"], found[column], strict=True))


def failures(plan: Plan, folder: Path) -> dict[Cell, str]:
    """The cells that stopped, and why."""
    cells = _cells(plan, plan.learning_rates, plan.seeds)
    paths = {cell: cell.folder(folder) / FAILURE_FILE for cell in cells}
    return {cell: path.read_text().strip() for cell, path in paths.items() if path.exists()}


def training_log(home: Path, iteration: int) -> list[dict[str, float]]:
    path = home / workspace.training_log(iteration)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _seconds(home: Path, iteration: int) -> list[Path]:
    """What was spent on training a checkpoint: its stages but the evaluation, whichever cell ran them."""
    return [p for p in (home / "seconds").glob(f"*@{iteration}") if not p.name.startswith("evaluate")]
