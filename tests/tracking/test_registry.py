"""Versions of checkpoints, aliases, vetoes and deletions in a real MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpaw_core.artifacts.metrics import Metrics, Primary
from tpaw_core.config.params import Params
from tpaw_core.tracking import ledger
from tpaw_core.tracking.registry import CHAMPION, HOLDER, MODEL, NEWEST, Registry
from tpaw_core.workspace.paths import Workspace


@pytest.fixture
def make(
    workspace: Workspace, make_model: Callable[[int], Any], save_checkpoint: Callable[..., Any]
) -> Callable[[int], str]:
    """Make checkpoint t of the workspace; gives its digest."""
    digests: dict[int, str] = {}

    def checkpoint(iteration: int) -> str:
        parent = digests.get(iteration - 1)
        manifest = save_checkpoint(make_model(iteration), workspace.checkpoint(iteration), iteration, parent)
        digests[iteration] = manifest.digest
        return manifest.digest

    return checkpoint


def versions(registry: Registry) -> list[Any]:
    listed = registry.client.search_model_versions(f"name = '{MODEL}'")
    return sorted(listed, key=lambda version: int(version.version))


def alias(registry: Registry, name: str) -> int:
    return int(registry.client.get_model_version_by_alias(MODEL, name).version)


def metrics(value: float) -> Metrics:
    return Metrics(
        primary=Primary(benchmark="heldout", metric="exact_match", value=value, stderr=0.01, n=10),
        benchmarks={"heldout": {"exact_match,answer": value, "n": 10}},
        training={},
        checkpoint="a digest",
        parent=None,
    )


SAMPLES = [{"prompt": "p", "target": "t", "completion": "c", "correct": 1.0}]


def test_a_version_says_what_checkpoint_it_is_and_holds_its_files(
    registry: Registry, make: Callable[[int], str], workspace: Workspace
) -> None:
    digests = [make(0), make(1)]
    assert [registry.register(0), registry.register(1)] == [1, 2]
    first, second = versions(registry)
    parent = registry.runs.workspace_run()
    assert second.tags == {
        "iteration": "1", "digest": digests[1], "parent": digests[0], "recipe": "demo", "run": parent.info.run_id,
        f"{HOLDER}{ledger.workspace_id(workspace)}": "",
    }  # fmt: skip
    assert first.tags["parent"] == ""
    assert second.run_id == registry.runs.iteration_run(1).info.run_id == registry.run_of(digests[1])
    assert second.source == f"runs:/{second.run_id}/model"
    held = {file.path for file in registry.client.list_artifacts(second.run_id, "model")}
    assert held == {f"model/{path.name}" for path in workspace.checkpoint(1).iterdir()}
    assert alias(registry, NEWEST) == 2


def test_registering_again_changes_nothing(
    registry: Registry, make: Callable[[int], str], params: Params, workspace: Workspace
) -> None:
    make(0)
    assert [registry.register(0), registry.register(0), Registry(workspace, params).register(0)] == [1, 1, 1]
    (workspace.state / "registered.json").unlink()  # as in a fresh clone
    assert Registry(workspace, params).register(0) == 1
    assert len(versions(registry)) == 1


def test_workspaces_with_an_equal_checkpoint_share_its_version_and_neither_prunes_it_from_the_other(
    registry: Registry, make: Callable[[int], str], params: Params, workspace: Workspace, elsewhere: Workspace
) -> None:
    make(0), make(1)
    registry.register(0), registry.register(1)
    registry.client.delete_registered_model_alias(MODEL, NEWEST)
    assert sorted(deletion.what[:9] for deletion in registry.deletions(set())) == ["version 1", "version 2"]
    shutil.copytree(workspace.checkpoint(0), elsewhere.checkpoint(0))
    assert Registry(elsewhere, params).register(0) == 1
    assert Registry(elsewhere, params).deletions(set()) == []
    assert [deletion.what[:9] for deletion in registry.deletions(set())] == ["version 2"]


def test_of_two_who_register_at_the_same_moment_the_later_one_joins_the_earlier(
    registry: Registry, make: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, look, looked = make(0), Registry._versions, []

    def versions_seen(own: Registry) -> list[Any]:
        """The first look is just before the other workspace registers."""
        seen = look(own)
        if not looked:
            own.client.create_model_version(MODEL, "elsewhere", tags={"digest": digest})
        looked.append(seen)
        return seen

    monkeypatch.setattr(Registry, "_versions", versions_seen)
    assert registry.register(0) == 1
    assert [version.source for version in versions(registry)] == ["elsewhere"]


def test_a_checkpoint_made_anew_is_a_new_version(
    registry: Registry,
    workspace: Workspace,
    make_model: Callable[[int], Any],
    save_checkpoint: Callable[..., Any],
    make: Callable[[int], str],
) -> None:
    make(0)
    registry.register(0)
    shutil.rmtree(workspace.checkpoint(0))
    save_checkpoint(make_model(9), workspace.checkpoint(0))
    assert registry.register(0) == 2
    assert [c.version for c in registry.candidates(range(1))] == [2]
    assert alias(registry, NEWEST) == 2


def test_a_damaged_checkpoint_is_not_registered(
    registry: Registry, make: Callable[[int], str], workspace: Workspace
) -> None:
    make(0)
    (workspace.checkpoint(0) / "config.json").write_text("{}")
    with pytest.raises(Exception, match=r"config\.json: has changed"):
        registry.register(0)
    assert versions(registry) == []


def test_candidates_are_the_older_checkpoints_and_are_registered_where_nobody_did(
    registry: Registry, make: Callable[[int], str]
) -> None:
    digests = [make(t) for t in range(3)]
    assert [(c.iteration, c.version, c.digest, c.vetoed) for c in registry.candidates(range(2))] == [
        (0, 1, digests[0], False),
        (1, 2, digests[1], False),
    ]
    assert len(versions(registry)) == 2


def test_a_deleted_version_does_not_play_until_it_is_brought_back(
    registry: Registry,
    make: Callable[[int], str],
    params: Params,
    workspace: Workspace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(0), make(1)
    assert [c.version for c in registry.candidates(range(2))] == [1, 2]
    registry.client.delete_model_version(MODEL, "1")
    assert [c.iteration for c in registry.candidates(range(2))] == [1]
    assert "checkpoint 0: its version was deleted" in caplog.text
    assert Registry(workspace, params).register(0) is None
    back = registry.register(0, again=True)
    assert back not in (None, 2)
    assert [(c.iteration, c.version) for c in registry.candidates(range(2))] == [(0, back), (1, 2)]


def test_what_another_server_has_never_seen_is_not_taken_for_deleted(
    registry: Registry,
    make: Callable[[int], str],
    database: Path,
    params: Params,
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workspace moves from its local database to another server."""
    make(0)
    registry.register(0)
    shutil.copy(database, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    other = Registry(workspace, params)
    assert [c.iteration for c in other.candidates(range(1))] == [0]
    assert len(versions(other)) == 1


@pytest.mark.parametrize(("value", "vetoed"), [("false", True), ("False", True), ("true", False), ("", False)])
def test_the_tag_team_member_false_is_a_veto(
    value: str, vetoed: bool, registry: Registry, make: Callable[[int], str]
) -> None:
    make(0)
    registry.register(0)
    registry.client.set_model_version_tag(MODEL, "1", "team_member", value)
    assert [c.vetoed for c in registry.candidates(range(1))] == [vetoed]


def test_champion_is_the_best_of_its_recipe_and_newest_the_last(
    registry: Registry, make: Callable[[int], str], params: Params, workspace: Workspace
) -> None:
    for iteration, value in enumerate((0.5, 0.7, 0.6)):
        make(iteration)
        registry.register(iteration)
        registry.record_evaluation(iteration, metrics(value), SAMPLES)
    assert (alias(registry, CHAMPION), alias(registry, NEWEST)) == (2, 3)
    make(3)
    another = Registry(workspace, params.model_copy(update={"recipe": "other"}))
    another.register(3)
    another.record_evaluation(3, metrics(0.1), SAMPLES)
    assert alias(registry, CHAMPION) == 4, "a better checkpoint of another recipe is no rival"


def test_an_equal_score_does_not_dethrone_the_champion(registry: Registry, make: Callable[[int], str]) -> None:
    for iteration in (0, 1):
        make(iteration)
        registry.register(iteration)
        registry.record_evaluation(iteration, metrics(0.5), [])
    assert alias(registry, CHAMPION) == 1


def test_an_evaluation_is_recorded_with_its_samples_and_may_be_repeated(
    registry: Registry, make: Callable[[int], str]
) -> None:
    make(0)
    registry.register(0)
    for _ in range(2):
        registry.record_evaluation(0, metrics(0.25), SAMPLES)
    run = registry.client.get_run(registry.runs.iteration_run(0).info.run_id)
    assert run.data.metrics == {"eval/heldout/exact_match": 0.25, "eval/heldout/n": 10, "eval/primary": 0.25}
    assert [a.path for a in registry.client.list_artifacts(run.info.run_id)].count("samples.json") == 1
    (version,) = versions(registry)
    assert version.tags["primary"] == "0.250000"
    assert run.info.status == "FINISHED"


def test_recording_again_after_the_run_ended_makes_no_new_run(registry: Registry, make: Callable[[int], str]) -> None:
    """As `tpaw report` does when it is called again."""
    make(0)
    registry.register(0)
    registry.record_evaluation(0, metrics(0.25), SAMPLES)
    registry.runs.finish()
    before = {run.info.run_id for run in registry.client.search_runs([registry.runs.experiment])}
    registry.register(0)
    registry.record_evaluation(0, metrics(0.25), SAMPLES)
    assert {run.info.run_id for run in registry.client.search_runs([registry.runs.experiment])} == before
