from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tpaw_core.errors import TpawError
from tpaw_core.study import plan
from tpaw_core.study.plan import Plan
from tpaw_core.workspace.paths import Workspace

NOTHING = {"methods": None, "seeds": None, "learning_rates": None, "folder": None}


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Workspace:
    """A project where no study has been run."""
    shutil.copytree(root / "recipes", tmp_path / "project" / "recipes")
    return Workspace(tmp_path / "project")


def make(project: Workspace, recipe: str | None, overrides: list[str] | None = None, **given: Any) -> tuple[Path, Plan]:
    return plan.make(project, recipe, overrides or [], **{**NOTHING, **given})


def test_left_out_options_have_defaults_from_the_recipe(project: Workspace) -> None:
    folder, made = make(project, "demo")
    assert folder == project.root / "studies" / "demo"
    assert list(made.methods) == ["tpaw", "spin", "sft"]
    assert made.seeds == [1, 2, 3]
    assert made.learning_rates == [1e-4, 3e-4, 9e-4]
    assert made.iterations == 4


def test_a_plan_that_was_begun_is_kept_but_for_what_is_given(project: Workspace, tmp_path: Path) -> None:
    _, first = make(project, "demo", ["seed=1"], seeds="1-2", folder=tmp_path)
    (tmp_path / plan.PLAN_FILE).write_text(first.model_dump_json())
    folder, then = make(project, None, seeds="1-4,9", folder=tmp_path)
    assert folder == tmp_path
    assert then.model_dump() == first.model_copy(update={"seeds": [1, 2, 3, 4, 9]}).model_dump()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"plan\.json: is damaged"),
        ({"seeds": "1"}, r"plan\.json: seeds: .*valid list"),
        ({"learning_rates": [-1.0]}, r"plan\.json: learning_rates\.0: .*greater than 0"),
        ({"method": {}}, r"plan\.json: method: .*not permitted"),
    ],
)
def test_a_damaged_plan_is_named_with_the_remedy(
    change: dict[str, Any] | None, message: str, project: Workspace, tmp_path: Path
) -> None:
    _, begun = make(project, "demo", folder=tmp_path)
    text = begun.model_dump_json()
    broken = text[:-10] if change is None else json.dumps({**json.loads(text), **change})
    (tmp_path / plan.PLAN_FILE).write_text(broken)
    with pytest.raises(TpawError, match=rf"{message}.*; delete it, and `tpaw compare` recreates it"):
        make(project, None, folder=tmp_path)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "1.5"])
def test_what_is_no_list_of_seeds_is_refused(text: str, project: Workspace) -> None:
    with pytest.raises(TpawError, match="--seeds"):
        make(project, "demo", seeds=text)


@pytest.mark.parametrize("text", ["fast", "0", "-1e-3", "inf", "nan", "1e-3,"])
def test_what_is_no_list_of_rates_is_refused(text: str, project: Workspace) -> None:
    with pytest.raises(TpawError, match="--rates"):
        make(project, "demo", learning_rates=text)


def test_a_cells_parameters_are_the_recipes_with_its_method_rate_and_seed(project: Workspace) -> None:
    _, made = make(project, "demo", ["data.max_train_rows={seed}00"], methods=["spin"], iterations=2)
    cell = made.cell("spin", 1e-3, 7)
    params = cell.params
    assert (params.objective.name, params.team.size, params.team.players) == ("spin", 2, 1)
    assert (params.training.learning_rate, params.seed, params.data.max_train_rows) == (1e-3, 7, 700)
    assert (params.data.validation_rows, params.evaluation.tasks) == (500, ["heldout", "validation"])
    assert list(params.iterations) == ["1", "2"]


def test_overrides_of_iterations_beyond_the_plans_are_left_out(project: Workspace) -> None:
    _, made = make(project, "demo", methods=["tpaw-annealed"], iterations=2)
    params = made.cell("tpaw-annealed", 1e-3, 1).params
    assert [params.objective_at(t).eta for t in (1, 2)] == [6.0, 4.0]


def test_a_plan_may_go_further_than_its_recipe(project: Workspace) -> None:
    _, made = make(project, "mawps", methods=["tpaw-annealed"], iterations=4)
    params = made.cell("tpaw-annealed", 1e-3, 1).params
    assert [params.objective_at(t).eta for t in (1, 2, 3, 4)] == [6.0, 4.0, 2.0, 1.0]


def test_a_cells_folder_is_its_parameters_own(project: Workspace, tmp_path: Path) -> None:
    _, one = make(project, "demo")
    _, other = make(project, "demo", ["sft.num_train_epochs=6"])
    folders = [made.cell("tpaw", 1e-3, seed).folder(tmp_path) for made in (one, other) for seed in (1, 2)]
    assert len(set(folders)) == 4
    assert one.cell("tpaw", 1e-3, 1).folder(tmp_path) == folders[0]
