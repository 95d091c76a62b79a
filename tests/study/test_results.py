"""What a study's cells have reached, from their folders or from the CSV files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpaw_core.errors import TpawError
from tpaw_core.study import methods, results
from tpaw_core.study.plan import Cell, Plan
from tpaw_core.workspace.paths import Workspace

FILES = ("results.csv", results.GRID_FILE, results.SECONDS_FILE, results.STEPS_FILE)
RATES = [1e-4, 1e-3]


@pytest.fixture
def plan(root: Path) -> Plan:
    made = Plan(
        recipe="demo", methods=methods.find(["tpaw", "sft"]), seeds=[1, 2], learning_rates=RATES,
        iterations=2, tuning_seeds=1, validation_rows=8,
    )  # fmt: skip
    made._workspace = Workspace(root)
    return made


def measure(study: Path, cell: Cell, iteration: int, accuracy: float, validation: float = 0.5, **training: Any) -> None:
    """What the evaluation of a checkpoint leaves behind."""
    workspace = cell.workspace(study)
    workspace.metrics(iteration).parent.mkdir(parents=True, exist_ok=True)
    tasks = {
        task: {"exact_match,answer": value, "exact_match_stderr,answer": 0.01, "n": 8}
        for task, value in (("heldout", accuracy), ("validation", validation))
    }
    primary = {"benchmark": "heldout", "metric": "exact_match", "value": accuracy, "stderr": 0.01, "n": 8}
    found = {"primary": primary, "benchmarks": tasks, "training": training, "checkpoint": "c", "parent": None}
    workspace.metrics(iteration).write_text(json.dumps(found))


def train(study: Path, cell: Cell, iteration: int, entries: list[dict[str, float]], seconds: float) -> None:
    """What training leaves behind, and what its stages cost."""
    workspace = cell.workspace(study)
    workspace.training_log(iteration).parent.mkdir(parents=True, exist_ok=True)
    workspace.training_log(iteration).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (workspace.root / results.SECONDS).mkdir(exist_ok=True)
    for stage in ("generate", "train", "evaluate"):
        (workspace.root / results.SECONDS / f"{stage}@{iteration}").write_text(str(seconds))


def complete(study: Path, plan: Plan, accuracy: dict[tuple[str, float], float]) -> None:
    """Every cell measured after both iterations; ``accuracy`` on validation rows by method and rate."""
    for cell in plan.cells(plan.learning_rates, plan.seeds):
        for iteration in (0, 1, 2):
            measure(study, cell, iteration, 0.1 * iteration, accuracy.get((cell.method, cell.learning_rate), 0.5))


def test_a_cell_gives_one_row_per_checkpoint_with_its_figures(plan: Plan, tmp_path: Path) -> None:
    cell = plan.cell("tpaw", 1e-3, 1)
    measure(tmp_path, cell, 0, 0.25, 0.125)
    measure(
        tmp_path, cell, 1, 0.5, 0.375,
        rewards_chosen=0.1, rewards_rejected=-0.2, logps_chosen=-3.0, logps_rejected=-4.0, target_active=0.75,
    )  # fmt: skip
    train(tmp_path, cell, 1, [{"step": 2, "epoch": 0.5, "tokens": 100}], seconds=1.25)
    workspace = cell.workspace(tmp_path)
    workspace.synthetic(1).parent.mkdir()
    pq.write_table(pa.table({"equal": [True, False]}), workspace.synthetic(1))
    found = results.collect(plan, tmp_path).grid
    assert found["iteration"].tolist() == [0, 1]
    first, second = found.to_dict("records")
    assert first["accuracy"] == 0.25
    assert pd.isna(first["equal"])
    expected = {
        "task": "demo", "method": "tpaw", "learning_rate": 1e-3, "seed": 1, "iteration": 1, "accuracy": 0.5,
        "stderr": 0.01, "validation": 0.375, "target_reward": 0.1, "answer_reward": -0.2, "target_logp": -3.0,
        "answer_logp": -4.0, "target_active": 0.75, "equal": 0.5,
        "seconds": 2.5,  # without the evaluation
        "tokens": 100 * cell.params.training.num_train_epochs / 0.5,
        "stopped": None, "params": cell.digest,
    }  # fmt: skip
    assert {name: second[name] for name in expected} == expected


def test_seconds_and_tokens_add_up_over_the_iterations(plan: Plan, tmp_path: Path) -> None:
    cell = plan.cell("sft", 1e-3, 1)
    for iteration in (0, 1, 2):
        measure(tmp_path, cell, iteration, 0.5)
        if iteration:
            train(tmp_path, cell, iteration, [{"step": 4, "epoch": 1.0, "tokens": 10}], seconds=iteration)
    found = results.collect(plan, tmp_path).grid
    assert found["seconds"].tolist() == [0.0, 2.0, 6.0]
    epochs = cell.params.training.num_train_epochs
    assert found["tokens"].tolist() == [0, 10 * epochs, 20 * epochs]


def test_a_cell_that_stopped_says_why_in_each_of_its_rows(plan: Plan, tmp_path: Path) -> None:
    cell = plan.cell("tpaw", 1e-3, 2)
    measure(tmp_path, cell, 0, 0.5)
    (cell.folder(tmp_path) / results.FAILURE_FILE).write_text("train@1: not finite\n")
    found = results.collect(plan, tmp_path).grid
    assert found["stopped"].tolist() == ["train@1: not finite"]
    assert results.failures(found) == ["tpaw, learning rate 0.001, seed 2: train@1: not finite"]
    assert results.finished(cell, found)


def test_damaged_figures_are_named_with_the_remedy(plan: Plan, tmp_path: Path) -> None:
    cell = plan.cell("tpaw", 1e-3, 1)
    measure(tmp_path, cell, 0, 0.5)
    cell.workspace(tmp_path).metrics(0).write_text("{")
    with pytest.raises(TpawError, match=r"metrics/0\.json: is damaged; delete the cell's folder"):
        results.collect(plan, tmp_path)


@pytest.mark.parametrize(
    ("validation", "best"),
    [
        ({("tpaw", 1e-4): 0.6, ("sft", 1e-3): 0.7}, {"tpaw": 1e-4, "sft": 1e-3}),
        ({("tpaw", 1e-4): 0.4, ("sft", 1e-3): 0.4}, {"tpaw": 1e-3, "sft": 1e-4}),
        ({}, {"tpaw": 1e-4, "sft": 1e-4}),  # of equals, the lowest
    ],
)
def test_the_best_rate_is_that_of_the_validation_rows(
    validation: dict[tuple[str, float], float], best: dict[str, float], plan: Plan, tmp_path: Path
) -> None:
    complete(tmp_path, plan, validation)
    found = results.collect(plan, tmp_path)
    assert results.best_rates(plan, found.grid) == best
    assert set(found.chosen[["method", "learning_rate"]].itertuples(index=False, name=None)) == set(best.items())


def test_only_the_tuning_seeds_choose_the_rate(plan: Plan, tmp_path: Path) -> None:
    complete(tmp_path, plan, {("tpaw", 1e-4): 0.6})
    for iteration in (0, 1, 2):
        measure(tmp_path, plan.cell("tpaw", 1e-3, 2), iteration, 0.5, 1.0)
    assert results.best_rates(plan, results.collect(plan, tmp_path).grid)["tpaw"] == 1e-4


def test_a_rate_at_which_a_cell_stopped_counts_as_nothing(plan: Plan, tmp_path: Path) -> None:
    complete(tmp_path, plan, {("tpaw", 1e-3): 0.9, ("tpaw", 1e-4): 0.1})
    cell = plan.cell("tpaw", 1e-3, 1)
    cell.workspace(tmp_path).metrics(2).unlink()
    (cell.folder(tmp_path) / results.FAILURE_FILE).write_text("train@2: not finite\n")
    assert results.best_rates(plan, results.collect(plan, tmp_path).grid)["tpaw"] == 1e-4


def test_the_csv_files_give_back_what_was_written(plan: Plan, tmp_path: Path) -> None:
    complete(tmp_path / "one", plan, {("tpaw", 1e-3): 0.7})
    cell = plan.cell("tpaw", 1e-3, 1)
    entries = [{"step": s, "rewards/chosen": s / 3, "weights/player/0": 1 / 3} for s in (1, 2)]
    for iteration in (1, 2):
        train(tmp_path / "one", cell, iteration, [{**e, "tokens": 1, "epoch": 1} for e in entries], 0.5)
    found = results.collect(plan, tmp_path / "one")
    assert found.steps["step"].tolist() == [1, 2, 3, 4], "counted through all iterations"
    assert found.steps["target_reward"].tolist() == [0.333333, 0.666667] * 2
    results.write_csv(tmp_path / "one", found)
    (tmp_path / "two").mkdir()
    for name in (results.GRID_FILE, results.SECONDS_FILE, results.STEPS_FILE):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    again = results.collect(plan, tmp_path / "two")
    pd.testing.assert_frame_equal(again.grid.fillna("-"), found.grid.fillna("-"), check_dtype=False)
    pd.testing.assert_frame_equal(again.steps, found.steps, check_dtype=False)
    results.write_csv(tmp_path / "two", again)
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_what_was_measured_stands_in_a_file_of_its_own(plan: Plan, tmp_path: Path) -> None:
    """So that the other files have the same bytes wherever a study runs."""
    for name, seconds in (("one", 1.5), ("two", 2.5)):
        complete(tmp_path / name, plan, {})
        for cell in plan.cells(plan.learning_rates, plan.seeds):
            train(tmp_path / name, cell, 1, [{"step": 2, "epoch": 1, "tokens": 1}], seconds)
        results.write_csv(tmp_path / name, results.collect(plan, tmp_path / name))
    for name in FILES:
        same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert same == (name != results.SECONDS_FILE), name


def test_the_seconds_of_an_earlier_version_are_found_in_the_grid(plan: Plan, tmp_path: Path) -> None:
    complete(tmp_path, plan, {})
    grid = results.collect(plan, tmp_path).grid
    shutil.rmtree(tmp_path / "cells")
    grid.assign(seconds=1.5).to_csv(tmp_path / results.GRID_FILE, index=False)
    found = results.collect(plan, tmp_path)
    assert set(found.grid["seconds"]) == {1.5}
    results.write_csv(tmp_path, found)
    assert "seconds" not in results.read_csv(tmp_path, results.GRID_FILE)
    assert set(results.collect(plan, tmp_path).grid["seconds"]) == {1.5}
    (tmp_path / results.SECONDS_FILE).unlink()
    assert results.collect(plan, tmp_path).grid["seconds"].isna().all()


def test_rows_of_other_parameters_are_kept_and_not_used(plan: Plan, tmp_path: Path) -> None:
    complete(tmp_path, plan, {})
    results.write_csv(tmp_path, results.collect(plan, tmp_path))
    before = results.read_csv(tmp_path, results.GRID_FILE)
    other = plan.model_copy(update={"overrides": ["sft.num_train_epochs=7"], "seeds": [1]})
    other._workspace, other._made = plan._workspace, {}
    cell = other.cell("tpaw", 1e-3, 1)
    assert results.finished(plan.cell("tpaw", 1e-3, 1), before)
    assert not results.finished(cell, before)
    complete(tmp_path, other, {})
    results.write_csv(tmp_path, results.collect(other, tmp_path))
    after = results.read_csv(tmp_path, results.GRID_FILE)
    assert len(after) == len(before) + 2 * 2 * 3
    assert after[after["params"].isin(before["params"])]["chosen"].eq(False).all()
    assert set(pd.read_csv(tmp_path / "results.csv")["seed"]) == {1}


def test_a_cell_is_finished_with_its_last_iteration(plan: Plan, tmp_path: Path) -> None:
    cell = plan.cell("tpaw", 1e-3, 1)
    for iteration, finished in ((0, False), (1, False), (2, True)):
        measure(tmp_path, cell, iteration, 0.5)
        assert results.finished(cell, results.collect(plan, tmp_path).grid) == finished
    assert not results.finished(cell, pd.DataFrame())


def test_by_seed_leaves_out_what_is_missing() -> None:
    rows = [("a", 1, 0, 0.5), ("a", 2, 0, None), ("a", 3, 1, 0.7), ("b", 1, 0, 0.9)]
    grid = pd.DataFrame(rows, columns=["method", "seed", "iteration", "accuracy"])
    assert results.by_seed(grid, "a", 0) == {1: 0.5}


def test_a_study_without_a_logged_step_can_be_read_again(plan: Plan, tmp_path: Path) -> None:
    complete(tmp_path, plan, {})
    results.write_csv(tmp_path, results.collect(plan, tmp_path))
    assert results.read_csv(tmp_path, results.STEPS_FILE).empty
    train(tmp_path, plan.cell("tpaw", 1e-4, 1), 1, [{"step": 1, "epoch": 1, "tokens": 1, "rewards/chosen": 0.5}], 0.5)
    results.write_csv(tmp_path, results.collect(plan, tmp_path))
    assert results.read_csv(tmp_path, results.STEPS_FILE)["target_reward"].tolist() == [0.5]
    plan.cell("tpaw", 1e-4, 1).workspace(tmp_path).training_log(1).unlink()
    results.write_csv(tmp_path, results.collect(plan, tmp_path))
    assert len(results.read_csv(tmp_path, results.STEPS_FILE)) == 1, "an earlier row stays"
