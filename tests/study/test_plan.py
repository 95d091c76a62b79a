from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tpaw_core.errors import TpawError
from tpaw_core.study import plan

NOTHING = {"methods": None, "seeds": None, "learning_rates": None, "folder": None}


@pytest.fixture(autouse=True)
def in_project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project where no study has been run."""
    shutil.copytree(root / "recipes", tmp_path / "project" / "recipes")
    monkeypatch.chdir(tmp_path / "project")


def test_left_out_options_have_defaults_from_the_recipe() -> None:
    folder, made = plan.make("demo", [], **NOTHING)
    assert folder == Path("studies/demo")
    assert list(made.methods) == ["tpaw", "spin", "sft"]
    assert made.seeds == [1, 2, 3]
    assert made.learning_rates == [1e-4, 3e-4, 9e-4]
    assert made.iterations == 4


def test_a_plan_that_was_begun_is_kept_but_for_what_is_given(tmp_path: Path) -> None:
    _, first = plan.make("demo", ["seed=1"], **{**NOTHING, "seeds": "1-2", "folder": tmp_path})
    (tmp_path / plan.PLAN_FILE).write_text(first.model_dump_json())
    folder, then = plan.make(None, [], **{**NOTHING, "seeds": "1-4,9", "folder": tmp_path})
    assert folder == tmp_path
    assert then == first.model_copy(update={"seeds": [1, 2, 3, 4, 9]})


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "1.5"])
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(TpawError, match="--seeds"):
        plan.make("demo", [], **{**NOTHING, "seeds": text})


@pytest.mark.parametrize("text", ["fast", "0", "-1e-3", "inf", "nan", "1e-3,"])
def test_what_is_no_list_of_rates_is_refused(text: str) -> None:
    with pytest.raises(TpawError, match="--rates"):
        plan.make("demo", [], **{**NOTHING, "learning_rates": text})


def test_a_cells_parameters_are_the_recipes_with_its_method_rate_and_seed() -> None:
    _, made = plan.make("demo", ["data.max_train_rows={seed}00"], **{**NOTHING, "methods": ["spin"], "iterations": 2})
    cell = made.cell("spin", 1e-3, 7)
    params = cell.params
    assert (params.objective.name, params.team.size, params.team.players) == ("spin", 2, 1)
    assert (params.training.learning_rate, params.seed, params.data.max_train_rows) == (1e-3, 7, 700)
    assert (params.data.validation_rows, params.evaluation.tasks) == (500, ["heldout", "validation"])
    assert list(params.iterations) == ["1", "2"]


def test_overrides_of_iterations_beyond_the_plans_are_left_out() -> None:
    _, made = plan.make("demo", [], **{**NOTHING, "methods": ["tpaw-annealed"], "iterations": 2})
    params = made.cell("tpaw-annealed", 1e-3, 1).params
    assert [params.objective_at(t).eta for t in (1, 2)] == [6.0, 4.0]


def test_a_plan_may_go_further_than_its_recipe() -> None:
    _, made = plan.make("mawps", [], **{**NOTHING, "methods": ["tpaw-annealed"], "iterations": 4})
    params = made.cell("tpaw-annealed", 1e-3, 1).params
    assert [params.objective_at(t).eta for t in (1, 2, 3, 4)] == [6.0, 4.0, 2.0, 1.0]


def test_a_cells_folder_is_its_parameters_own(tmp_path: Path) -> None:
    _, one = plan.make("demo", [], **NOTHING)
    _, other = plan.make("demo", ["sft.num_train_epochs=6"], **NOTHING)
    folders = [made.cell("tpaw", 1e-3, seed).folder(tmp_path) for made in (one, other) for seed in (1, 2)]
    assert len(set(folders)) == 4
    assert one.cell("tpaw", 1e-3, 1).folder(tmp_path) == folders[0]
