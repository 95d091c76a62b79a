"""The registry against a real MLflow on a local SQLite database; each test has an experiment and a model of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpaw_core.config import params_file
from tpaw_core.config.params import Params
from tpaw_core.tracking import ledger, registry
from tpaw_core.tracking.client import LOCAL, tracking_uri
from tpaw_core.tracking.registry import Registry
from tpaw_core.workspace import files


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: its migrations take seconds, so it is made once and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(database: Path, workspace_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose local database is ready."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("TPAW_SESSION", raising=False)
    LOCAL.mkdir(parents=True)
    shutil.copy(database, LOCAL / "mlflow.db")
    return workspace_folder


@pytest.fixture
def found(folder: Path, params: Params) -> Registry:
    return Registry(params)


@pytest.fixture
def make(make_model: Callable[[int], Any], save_checkpoint: Callable[..., Any]) -> Callable[[int], str]:
    """Make checkpoint t of the workspace; gives its digest."""
    digests: dict[int, str] = {}

    def checkpoint(iteration: int) -> str:
        parent = digests.get(iteration - 1)
        manifest = save_checkpoint(make_model(iteration), workspace.checkpoint(iteration), iteration, parent)
        digests[iteration] = manifest["digest"]
        return manifest["digest"]

    return checkpoint


def versions(found: Registry) -> list[Any]:
    listed = found.client.search_model_versions(f"name = '{registry.MODEL}'")
    return sorted(listed, key=lambda version: int(version.version))


def alias(found: Registry, name: str) -> int:
    return int(found.client.get_model_version_by_alias(registry.MODEL, name).version)


def metrics(value: float) -> dict[str, Any]:
    primary = {"benchmark": "heldout", "metric": "exact_match", "value": value, "stderr": 0.01, "n": 10}
    return {"primary": primary, "benchmarks": {"heldout": {"exact_match,answer": value, "n": 10}}, "training": {}}


SAMPLES = [{"prompt": "p", "target": "t", "completion": "c", "correct": 1.0}]


def test_a_version_says_what_checkpoint_it_is_and_holds_its_files(found: Registry, make: Callable[[int], str]) -> None:
    digests = [make(0), make(1)]
    assert [found.register(0), found.register(1)] == [1, 2]
    first, second = versions(found)
    parent = found.parent()
    assert second.tags == {
        "iteration": "1", "digest": digests[1], "parent": digests[0], "recipe": "demo", "run": parent.info.run_id,
        f"workspace.{registry.WORKSPACE_ID.read_text()}": "",
    }  # fmt: skip
    assert first.tags["parent"] == ""
    assert second.run_id == found.iteration(1).info.run_id == found.run_of(digests[1])
    assert second.source == f"runs:/{second.run_id}/model"
    held = {file.path for file in found.client.list_artifacts(second.run_id, "model")}
    assert held == {f"model/{path.name}" for path in workspace.checkpoint(1).iterdir()}
    assert alias(found, registry.NEWEST) == 2


def test_registering_again_changes_nothing(found: Registry, make: Callable[[int], str], params: Params) -> None:
    make(0)
    assert [found.register(0), found.register(0), Registry(params).register(0)] == [1, 1, 1]
    ledger.LEDGER.unlink()  # as in a fresh clone
    assert Registry(params).register(0) == 1
    assert len(versions(found)) == 1


def test_workspaces_with_an_equal_checkpoint_share_its_version_and_neither_prunes_it_from_the_other(
    found: Registry, make: Callable[[int], str], params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(0), make(1)
    found.register(0), found.register(1)
    found.client.delete_registered_model_alias(registry.MODEL, registry.NEWEST)
    assert sorted(removal.what[:9] for removal in found.removals(set())) == ["version 1", "version 2"]
    shutil.copytree(workspace.checkpoint(0), tmp_path / "elsewhere" / workspace.checkpoint(0))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Registry(params).register(0) == 1
    assert Registry(params).removals(set()) == []
    monkeypatch.chdir(tmp_path)
    assert [removal.what[:9] for removal in found.removals(set())] == ["version 2"]


def test_of_two_who_register_at_the_same_moment_the_later_one_joins_the_earlier(
    found: Registry, make: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, look, looked = make(0), Registry._versions, []

    def versions_seen(own: Registry) -> list[Any]:
        """The first look is just before the other workspace registers."""
        seen = look(own)
        if not looked:
            own.client.create_model_version(registry.MODEL, "elsewhere", tags={"digest": digest})
        looked.append(seen)
        return seen

    monkeypatch.setattr(Registry, "_versions", versions_seen)
    assert found.register(0) == 1
    assert [version.source for version in versions(found)] == ["elsewhere"]


def test_a_checkpoint_made_anew_is_a_new_version(
    found: Registry, make_model: Callable[[int], Any], save_checkpoint: Callable[..., Any], make: Callable[[int], str]
) -> None:
    make(0)
    found.register(0)
    shutil.rmtree(workspace.checkpoint(0))
    save_checkpoint(make_model(9), workspace.checkpoint(0))
    assert found.register(0) == 2
    assert [c.version for c in found.candidates(range(1))] == [2]
    assert alias(found, registry.NEWEST) == 2


def test_a_damaged_checkpoint_is_not_registered(found: Registry, make: Callable[[int], str]) -> None:
    make(0)
    (workspace.checkpoint(0) / "config.json").write_text("{}")
    with pytest.raises(Exception, match=r"config\.json: has changed"):
        found.register(0)
    assert versions(found) == []


def test_candidates_are_the_older_checkpoints_and_are_registered_where_nobody_did(
    found: Registry, make: Callable[[int], str]
) -> None:
    digests = [make(t) for t in range(3)]
    assert [(c.iteration, c.version, c.digest, c.vetoed) for c in found.candidates(range(2))] == [
        (0, 1, digests[0], False),
        (1, 2, digests[1], False),
    ]
    assert len(versions(found)) == 2


def test_a_deleted_version_does_not_play_until_it_is_brought_back(
    found: Registry, make: Callable[[int], str], params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    make(0), make(1)
    assert [c.version for c in found.candidates(range(2))] == [1, 2]
    found.client.delete_model_version(registry.MODEL, "1")
    assert [c.iteration for c in found.candidates(range(2))] == [1]
    assert "checkpoint 0: its version was deleted" in capsys.readouterr().out
    assert Registry(params).register(0) is None
    back = found.register(0, again=True)
    assert back not in (None, 2)
    assert [(c.iteration, c.version) for c in found.candidates(range(2))] == [(0, back), (1, 2)]


def test_what_another_server_has_never_seen_is_not_taken_for_deleted(
    found: Registry, make: Callable[[int], str], database: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace moves from its local database to another server."""
    make(0)
    found.register(0)
    shutil.copy(database, "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('other.db').resolve()}")
    other = Registry(params)
    assert [c.iteration for c in other.candidates(range(1))] == [0]
    assert len(versions(other)) == 1


@pytest.mark.parametrize(("value", "vetoed"), [("false", True), ("False", True), ("true", False), ("", False)])
def test_the_tag_team_member_false_is_a_veto(
    value: str, vetoed: bool, found: Registry, make: Callable[[int], str]
) -> None:
    make(0)
    found.register(0)
    found.client.set_model_version_tag(registry.MODEL, "1", "team_member", value)
    assert [c.vetoed for c in found.candidates(range(1))] == [vetoed]


def test_champion_is_the_best_of_its_recipe_and_newest_the_last(found: Registry, make: Callable[[int], str]) -> None:
    for iteration, value in enumerate((0.5, 0.7, 0.6)):
        make(iteration)
        found.register(iteration)
        found.record_evaluation(iteration, metrics(value), SAMPLES)
    assert (alias(found, registry.CHAMPION), alias(found, registry.NEWEST)) == (2, 3)
    other = params_file.resolve(str(Path(__file__).parents[1] / "recipes" / "demo.yaml"), ["recipe=other"])[0]
    make(3)
    another = Registry(other)
    another.register(3)
    another.record_evaluation(3, metrics(0.1), SAMPLES)
    assert alias(found, registry.CHAMPION) == 4, "a better checkpoint of another recipe is no rival"


def test_an_equal_score_does_not_dethrone_the_champion(found: Registry, make: Callable[[int], str]) -> None:
    for iteration in (0, 1):
        make(iteration)
        found.register(iteration)
        found.record_evaluation(iteration, metrics(0.5), [])
    assert alias(found, registry.CHAMPION) == 1


def test_an_evaluation_is_recorded_with_its_samples_and_may_be_repeated(
    found: Registry, make: Callable[[int], str]
) -> None:
    make(0)
    found.register(0)
    for _ in range(2):
        found.record_evaluation(0, metrics(0.25), SAMPLES)
    run = found.client.get_run(found.iteration(0).info.run_id)
    assert run.data.metrics == {"eval/heldout/exact_match": 0.25, "eval/heldout/n": 10, "eval/primary": 0.25}
    assert [a.path for a in found.client.list_artifacts(run.info.run_id)].count("samples.json") == 1
    (version,) = versions(found)
    assert version.tags["primary"] == "0.250000"
    assert run.info.status == "FINISHED"


def test_recording_again_after_the_run_ended_makes_no_new_run(found: Registry, make: Callable[[int], str]) -> None:
    """As `tpaw report` does when it is called again."""
    make(0)
    found.register(0)
    found.record_evaluation(0, metrics(0.25), SAMPLES)
    found.finish()
    before = {run.info.run_id for run in found.client.search_runs([found.experiment])}
    found.register(0)
    found.record_evaluation(0, metrics(0.25), SAMPLES)
    assert {run.info.run_id for run in found.client.search_runs([found.experiment])} == before


def test_iterations_are_child_runs_of_one_parent_with_their_parameters(found: Registry, params: Params) -> None:
    parent, children = found.parent(), [found.iteration(t) for t in (0, 1, 2)]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parent.info.run_id] * 3
    assert [run.info.run_name for run in children] == ["sft", "iteration 1", "iteration 2"]
    assert parent.data.tags["tpaw.recipe"] == "demo"
    read = found.client.get_run(children[1].info.run_id).data.params
    assert (read["lambda"], read["eta"], read["learning_rate"]) == ("0.1", "6.0", "0.0003")
    assert found.client.get_run(parent.info.run_id).data.params["model.scratch.hidden_size"] == "128"
    again = Registry(params)
    assert again.parent().info.run_id == parent.info.run_id
    assert again.iteration(2).info.run_id == children[2].info.run_id


def test_a_finished_run_is_closed_with_its_children_and_the_next_one_is_new(found: Registry) -> None:
    parent, child = found.parent().info.run_id, found.iteration(1).info.run_id
    assert found.finish() == parent
    assert [found.client.get_run(run).info.status for run in (parent, child)] == ["FINISHED", "FINISHED"]
    assert found.finish() is None
    assert found.parent().info.run_id != parent


def test_a_failed_run_is_continued(found: Registry) -> None:
    parent = found.parent().info.run_id
    found.finish("FAILED")
    assert found.parent().info.run_id == parent


@pytest.mark.parametrize("change", ["another workspace", "other parameters"])
def test_another_workspace_or_other_parameters_have_their_own_run(
    change: str, found: Registry, tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = found.parent().info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    if change == "another workspace":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        other = Registry(params)
    else:
        other = Registry(params.model_copy(update={"seed": 43}))
    assert other.parent().info.run_id != parent
    assert Registry(params).experiment == found.experiment


def test_a_data_set_is_an_input_of_the_run_with_its_digest(found: Registry) -> None:
    path = Path("data/train.jsonl")
    path.parent.mkdir()
    path.write_text("{}\n{}\n")
    run = found.iteration(0)
    for _ in range(2):
        found.log_dataset(run, path, rows=2, context="training")
    (entry,) = found.client.get_run(run.info.run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("data/train.jsonl", files.sha256(path)[:16])
    assert entry.dataset.profile == '{"num_rows": 2}'
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "training"}


def test_training_metrics_keep_their_steps_and_may_be_sent_twice(found: Registry) -> None:
    run = found.iteration(1)
    entries = [(step, {"loss": 1 / step, "rewards/chosen": 0.5}) for step in range(1, 700)]
    for _ in range(2):
        found.log_metrics(run, entries)
    history = found.client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / step) for step in range(1, 700)]


def test_the_flow_that_asked_is_named_in_the_run(found: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    run = found.parent().info.run_id
    monkeypatch.setenv("TPAW_SESSION", "flow-7")
    found.parent()
    assert found.client.get_run(run).data.tags["prefect.flow_run_id"] == "flow-7"
