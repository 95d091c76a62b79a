"""How `tpaw lineage` reports where a checkpoint comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.workspace import Project
from tpaw_core.artifacts import checkpoint, code
from tpaw_core.errors import TpawError
from tpaw_core.upkeep import lineage
from tpaw_core.workspace.paths import Workspace


@pytest.fixture
def workspace(
    tmp_path: Path, make_model: Callable[[int], Any], save_checkpoint: Callable[..., checkpoint.Manifest]
) -> Workspace:
    """Two checkpoints, without anything else."""
    made = Workspace(tmp_path)
    first = save_checkpoint(make_model(0), made.checkpoint(0), 0)
    save_checkpoint(make_model(1), made.checkpoint(1), 1, first.digest)
    return made


def change(workspace: Workspace, iteration: int, **values: Any) -> None:
    path = workspace.checkpoint(iteration) / checkpoint.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_it_leads_back_through_every_parent(workspace: Workspace) -> None:
    found = list(lineage.ancestors(workspace, 1))
    assert [manifest.iteration for manifest in found] == [1, 0]
    assert found[0].parent == found[1].digest
    text = lineage.text(workspace, 1)
    assert "code digests: method " in text
    assert "differs" not in text


def test_it_reports_in_which_part_the_code_differs_from_todays(workspace: Workspace) -> None:
    change(workspace, 0, code={**code.digests(), "engine": "0" * 64, "encoding": "1" * 64})
    later, earlier = lineage.text(workspace, 1).split("checkpoint 0 ")
    assert "differs" not in later
    assert "    differs from the installed code in: engine, encoding" in earlier.splitlines()
    assert "engine 000000000000" in earlier


def test_a_manifest_of_an_earlier_version_has_no_code_to_differ(workspace: Workspace) -> None:
    change(workspace, 0, code={})
    _, earlier = lineage.text(workspace, 1).split("checkpoint 0 ")
    assert "code" not in earlier


def test_another_parent_ends_it(workspace: Workspace) -> None:
    change(workspace, 1, parent="0" * 64)
    with pytest.raises(TpawError, match=r"checkpoints/0: is not what checkpoints/1 was trained from .*, not 0{12}\)"):
        lineage.text(workspace, 1)


def test_a_pruned_ancestor_has_left_its_manifest(workspace: Workspace) -> None:
    before = lineage.text(workspace, 1)
    workspace.pruned(0).parent.mkdir(parents=True)
    workspace.checkpoint(0).rename(workspace.root / "aside")
    (workspace.root / "aside" / checkpoint.MANIFEST).rename(workspace.pruned(0))
    assert lineage.text(workspace, 1) == before
    workspace.pruned(0).unlink()
    with pytest.raises(TpawError, match=r"checkpoints/0/manifest\.json: does not exist"):
        lineage.text(workspace, 1)


@pytest.mark.slow
def test_the_lineage_of_a_real_loop_leads_back_to_the_base_model(longer_project: Project) -> None:
    said = longer_project.run("tpaw", "lineage", "-t", "4").stdout
    lines = [line.split() for line in said.splitlines() if line.startswith("checkpoint ")]
    assert [(line[1], line[2]) for line in lines] == [(str(t), longer_project.digest(t)) for t in (4, 3, 2, 1, 0)]
    team = ", ".join(longer_project.digest(t)[:12] for t in (3, 2, 1))
    assert f"team: {team}" in said
    assert "objective.eta=6.0" in said
    assert "seed=42" in said
    assert "torch 2." in said
    assert said.count("read encoded/train.parquet: ") == 5
    change(longer_project.workspace, 2, parent="0" * 64)
    done = longer_project.run("tpaw", "lineage", "-t", "4", check=False)
    assert done.returncode == 1
    assert "checkpoints/1: is not what checkpoints/2 was trained from" in done.stderr
