"""The runs of a workspace in a real MLflow."""

from __future__ import annotations

import pytest

from tpaw_core.config.params import Params
from tpaw_core.tracking.runs import Runs
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace


def test_iterations_are_child_runs_of_one_parent_with_their_parameters(
    runs: Runs, params: Params, workspace: Workspace
) -> None:
    parent, children = runs.workspace_run(), [runs.iteration_run(t) for t in (0, 1, 2)]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * 3
    assert [run.info.run_name for run in children] == ["sft", "iteration 1", "iteration 2"]
    assert parent.data.tags["tpaw.recipe"] == "demo"
    read = runs.client.get_run(children[1].info.run_id).data.params
    assert (read["lambda"], read["eta"], read["learning_rate"]) == ("0.1", "6.0", "0.0003")
    assert runs.client.get_run(parent.info.run_id).data.params["model.scratch.hidden_size"] == "128"
    again = Runs(workspace, params)
    assert again.workspace_run().info.run_id == parent.info.run_id
    assert again.iteration_run(2).info.run_id == children[2].info.run_id


def test_a_finished_run_is_closed_with_its_children_and_the_next_one_is_new(runs: Runs) -> None:
    parent, child = runs.workspace_run().info.run_id, runs.iteration_run(1).info.run_id
    assert runs.finish() == parent
    assert [runs.client.get_run(run).info.status for run in (parent, child)] == ["FINISHED", "FINISHED"]
    assert runs.finish() is None
    assert runs.workspace_run().info.run_id != parent


def test_a_failed_run_is_continued(runs: Runs) -> None:
    parent = runs.workspace_run().info.run_id
    runs.finish("FAILED")
    assert runs.workspace_run().info.run_id == parent


@pytest.mark.parametrize("change", ["another workspace", "other parameters"])
def test_another_workspace_or_other_parameters_have_their_own_run(
    change: str, runs: Runs, params: Params, workspace: Workspace, elsewhere: Workspace
) -> None:
    parent = runs.workspace_run().info.run_id
    if change == "another workspace":
        other = Runs(elsewhere, params)
    else:
        other = Runs(workspace, params.model_copy(update={"seed": 43}))
    assert other.workspace_run().info.run_id != parent
    assert other.experiment == runs.experiment


def test_a_data_set_is_an_input_of_the_run_with_its_digest(runs: Runs, workspace: Workspace) -> None:
    path = workspace.train_rows
    path.parent.mkdir()
    path.write_text("{}\n{}\n")
    run = runs.iteration_run(0)
    for _ in range(2):
        runs.log_dataset(run, path, rows=2, context="training")
    (entry,) = runs.client.get_run(run.info.run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("data/train.jsonl", files.sha256(path)[:16])
    assert entry.dataset.profile == '{"num_rows": 2}'
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "training"}


def test_training_metrics_keep_their_steps_and_may_be_sent_twice(runs: Runs) -> None:
    run = runs.iteration_run(1)
    entries = [(step, {"loss": 1 / step, "rewards/chosen": 0.5}) for step in range(1, 700)]
    for _ in range(2):
        runs.log_metrics(run, entries)
    history = runs.client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / step) for step in range(1, 700)]


def test_every_warning_of_an_iteration_is_kept_once(runs: Runs) -> None:
    for warning in ("fell", "rose", "fell"):
        runs.warn(1, warning)
    assert runs.iteration_run(1).data.tags["tpaw.warning"] == "fell\nrose"
    assert runs.workspace_run().data.tags["tpaw.warning.1"] == "fell\nrose"


def test_the_flow_that_asked_is_named_in_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.workspace_run().info.run_id
    monkeypatch.setenv("TPAW_SESSION", "flow-7")
    runs.workspace_run()
    assert runs.client.get_run(run).data.tags["prefect.flow_run_id"] == "flow-7"
