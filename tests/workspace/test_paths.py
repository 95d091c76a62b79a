from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine

from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace


def test_everything_lies_below_the_root() -> None:
    workspace = Workspace(Path("/w"))
    places = {
        "params_file": "params.yaml",
        "recipes": "recipes",
        "data": "data",
        "train_rows": "data/train.jsonl",
        "heldout_rows": "data/heldout.jsonl",
        "validation_rows": "data/validation.jsonl",
        "state": ".tpaw",
        "scores": ".tpaw/scores",
        "sums": ".tpaw/sums.json",
        "training_state": ".tpaw/training",
        "flow_seconds": ".tpaw/flow_seconds.json",
        "mlflow": ".tpaw/mlflow",
        "report": "report",
    }
    assert {name: workspace.name(getattr(workspace, name)) for name in places} == places
    of_an_iteration = {
        "checkpoint": "checkpoints/3",
        "synthetic": "synthetic/3.parquet",
        "team": "teams/3.json",
        "weights": "weights/3.parquet",
        "training_log": "training/3.jsonl",
        "metrics": "metrics/3.json",
        "samples": "samples/3.jsonl",
        "pruned": ".tpaw/pruned/3.json",
    }
    assert {name: workspace.name(getattr(workspace, name)(3)) for name in of_an_iteration} == of_an_iteration


def test_an_output_behind_a_link_is_refused(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    workspace.refuse_links()
    (workspace.root / "checkpoints").symlink_to(tmp_path_factory.mktemp("disk"))
    with pytest.raises(TpawError, match=r"checkpoints: is a link, which DVC does not follow; .* \(mount --bind\), or"):
        workspace.refuse_links()


@pytest.mark.parametrize("name", ["plain", "a b", "a%2Fb", "c?d", "e#f", "100%"])
def test_mlflows_database_lies_in_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / name)
    workspace.mlflow.mkdir(parents=True)
    engine = create_engine(workspace.mlflow_database)
    with engine.connect():
        assert (workspace.mlflow / "mlflow.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_is_the_same_wherever_the_workspace_lies() -> None:
    here, there = Workspace(), Workspace(Path("/somewhere/else"))
    assert here.name(here.checkpoint(1)) == there.name(there.checkpoint(1)) == "checkpoints/1"
    assert there.place("checkpoints/1") == there.checkpoint(1)
    assert here.place("checkpoints/1") == here.checkpoint(1)
    with pytest.raises(ValueError, match="is not in the subpath"):
        there.name(Path("/somewhere/checkpoints/1"))


def test_what_the_user_wrote_starts_at_the_source() -> None:
    assert Workspace(Path("/w")).input("rows.jsonl") == Path("/w/rows.jsonl")
    assert Workspace(Path("/w"), source=Path("/u")).input("rows.jsonl") == Path("/u/rows.jsonl")
    assert Workspace(Path("/w"), source=Path("/u")).input("/data/rows.jsonl") == Path("/data/rows.jsonl")


def test_scores_can_be_shared() -> None:
    assert Workspace(Path("/w"), shared_scores=Path("/s")).scores == Path("/s")


def test_iterations_are_the_numbers_in_a_folder(workspace: Workspace) -> None:
    assert workspace.iterations("teams") == []
    (workspace.root / "teams").mkdir()
    for name in ("10.json", "2.json", ".2.json-aside", "notes.txt", "2b.json"):
        (workspace.root / "teams" / name).write_text("")
    for number in (0, 1):
        workspace.checkpoint(number).mkdir(parents=True)
    assert workspace.iterations("teams") == [2, 10]
    assert workspace.iterations("checkpoints") == [0, 1]
