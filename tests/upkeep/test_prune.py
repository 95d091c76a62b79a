"""What `tpaw prune` deletes and what it leaves; each test has a copy of one workspace that `dvc repro` made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.workspace import COMMANDS, Project
from tpaw_core.artifacts import checkpoint
from tpaw_core.tracking.registry import CHAMPION, MODEL

pytestmark = pytest.mark.slow


@pytest.fixture
def champion(longer_project: Project) -> str:
    """The alias on a checkpoint that is kept anyway, so that checkpoint 1 can be deleted."""
    client = longer_project.client()
    (version,) = [v for v in client.search_model_versions(f"name='{MODEL}'") if v.tags["iteration"] == "4"]
    client.set_registered_model_alias(MODEL, CHAMPION, version.version)
    return "4"


@pytest.fixture
def pruned(longer_project: Project, champion: str) -> Project:
    longer_project.run("tpaw", "prune", "--yes")
    return longer_project


def versions(project: Project) -> set[str]:
    return {v.tags["iteration"] for v in project.client().search_model_versions(f"name='{MODEL}'")}


def checkpoints(project: Project) -> set[str]:
    return {path.name for path in (project.folder / "checkpoints").iterdir()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_lists_first_and_deletes_nothing(longer_project: Project, champion: str) -> None:
    said = longer_project.run("tpaw", "prune").stdout
    assert "can be deleted with `tpaw prune --yes`" in said
    assert "checkpoints/1" in said
    assert versions(longer_project) == checkpoints(longer_project) == {"0", "1", "2", "3", "4"}


def test_it_keeps_what_a_team_an_alias_or_a_lineage_needs(longer_project: Project, champion: str) -> None:
    kept = {"0", "2", "3", "4"}
    folder = longer_project.folder
    sizes = {name: size(folder / name) for name in (".dvc/cache", ".tpaw/mlflow/artifacts", ".tpaw/scores")}
    (left := folder / "checkpoints" / ".7-going").mkdir()  # by a prune that was killed
    longer_project.run("tpaw", "prune", "--yes")
    assert not left.exists()
    assert checkpoints(longer_project) == kept
    assert versions(longer_project) == kept
    for name, before in sizes.items():
        assert size(folder / name) < before, name
    assert "nothing can be deleted" in longer_project.run("tpaw", "prune").stdout
    assert "no problems found" in longer_project.run("tpaw", "verify").stdout
    assert longer_project.run("tpaw", "lineage", "-t", "4").stdout.count("checkpoint ") >= 5


def test_what_an_alias_names_is_kept(longer_project: Project) -> None:
    client = longer_project.client()
    (version,) = [v for v in client.search_model_versions(f"name='{MODEL}'") if v.tags["iteration"] == "1"]
    client.set_registered_model_alias(MODEL, CHAMPION, version.version)
    assert "checkpoint" not in longer_project.run("tpaw", "prune", "--yes").stdout
    assert versions(longer_project) == checkpoints(longer_project) == {"0", "1", "2", "3", "4"}
    assert "nothing can be deleted" in longer_project.run("tpaw", "prune").stdout


def test_what_is_left_continues_and_nothing_that_was_pruned_is_made_again(pruned: Project) -> None:
    """The fifth iteration has its team."""
    pruned.run("tpaw", "use", "iterations.5.previous=4")
    said = pruned.run(*COMMANDS["repro"], "--allow-missing", "train@5").stdout
    assert "Running stage 'train@5'" in said
    assert "Running stage 'train@1'" not in said
    assert pruned.team(5) == [4, 3, 2]


def test_a_pruned_checkpoint_is_refused_with_the_way_to_get_it_back(pruned: Project) -> None:
    assert not pruned.workspace.checkpoint(1).exists()
    done = pruned.run("tpaw", "generate", "-t", "2", check=False)
    assert done.returncode == 1
    assert "checkpoints/1" in done.stderr


def test_a_pruned_checkpoint_is_made_again_with_the_same_bytes(pruned: Project) -> None:
    workspace = pruned.workspace
    digest = json.loads(workspace.pruned(1).read_text())["digest"]
    assert checkpoint.manifest(workspace, 1).digest == digest
    shutil.rmtree(workspace.scores)
    pruned.run(*COMMANDS["repro"], "train@1")
    assert pruned.digest(1) == digest
    assert not workspace.pruned(1).exists()
