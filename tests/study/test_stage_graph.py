from __future__ import annotations

from pathlib import Path

import pytest

from tpaw_core.config.params import Objective, Params
from tpaw_core.errors import TpawError
from tpaw_core.study import stage_graph
from tpaw_core.workspace.paths import Workspace


def changed(params: Params, section: str, **values: object) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


@pytest.fixture
def stages(params: Params, root: Path) -> dict[str, stage_graph.Stage]:
    return {stage.name: stage for stage in stage_graph.read_graph(root / "dvc.yaml", params)}


def test_stages_come_in_the_order_of_running_with_what_they_read_and_write(
    stages: dict[str, stage_graph.Stage],
) -> None:
    assert list(stages)[:3] == ["encode", "sft", "evaluate-sft"]
    assert list(stages)[3:8] == ["generate@1", "team@1", "weights@1", "train@1", "evaluate@1"]
    encode = [str(path) for path in stages["encode"].outs]
    assert encode == ["encoded/tokenizer", *(f"encoded/{name}.parquet" for name in ("train", "heldout", "validation"))]
    assert list(stages)[-1] == "evaluate@4"
    train = stages["train@2"]
    assert (train.command, train.iteration) == ("train", 2)
    expected = ["checkpoints/1", "teams/2.json", "weights/2.parquet", "encoded/tokenizer", "encoded/train.parquet"]
    assert [str(path) for path in train.deps] == expected
    assert [str(path) for path in train.outs] == ["checkpoints/2", "training/2.jsonl"]
    assert "iterations.2" in train.params
    assert [str(path) for path in stages["evaluate-sft"].outs] == ["samples/0.jsonl", "metrics/0.json"]


def test_every_output_that_a_stage_reads_was_made_before_it(stages: dict[str, stage_graph.Stage]) -> None:
    made = {Path("data/train.jsonl"), Path("data/heldout.jsonl")}
    for stage in stages.values():
        assert set(stage.deps) <= made, stage.name
        made |= set(stage.outs)


def test_fine_tuning_that_goes_on_needs_rows_and_a_checkpoint_only(params: Params, root: Path) -> None:
    found = stage_graph.read_graph(root / "dvc.yaml", changed(params, "objective", name="sft"))
    assert [stage.name for stage in found][:5] == ["encode", "sft", "evaluate-sft", "train@1", "evaluate@1"]
    assert [str(path) for path in found[3].deps] == ["checkpoints/0", "encoded/tokenizer", "encoded/train.parquet"]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    made.data.mkdir()
    made.train_rows.write_text("rows")
    made.heldout_rows.write_text("held-out rows")
    made.tokenizer.mkdir(parents=True)
    (made.tokenizer / "tokenizer.json").write_text("tokenizer")
    made.encoded("train").write_text("encoded rows")
    return made


def test_a_key_changes_with_what_decides_the_outputs_and_with_nothing_else(
    workspace: Workspace, params: Params, stages: dict[str, stage_graph.Stage]
) -> None:
    stage = stages["sft"]
    key = stage_graph.key(workspace, stage, params)
    assert stage_graph.key(workspace, stage, params) == key
    assert stage_graph.key(workspace, stage, changed(params, "objective", eta=2.0)) == key
    assert stage_graph.key(workspace, stage, changed(params, "sft", learning_rate=1.0)) != key
    assert stage_graph.key(workspace, stage, params.model_copy(update={"seed": 43})) != key
    workspace.encoded("train").write_text("other rows")
    assert (other := stage_graph.key(workspace, stage, params)) != key
    (workspace.tokenizer / "tokenizer.json").write_text("another")
    assert stage_graph.key(workspace, stage, params) not in (key, other)


def test_the_encoding_is_made_again_where_the_rows_or_the_model_change(
    workspace: Workspace, params: Params, stages: dict[str, stage_graph.Stage]
) -> None:
    stage = stages["encode"]
    key = stage_graph.key(workspace, stage, params)
    assert stage_graph.key(workspace, stage, changed(params, "sft", learning_rate=1.0)) == key
    assert stage_graph.key(workspace, stage, changed(params, "model", max_length=64)) != key
    workspace.train_rows.write_text("other rows")
    assert stage_graph.key(workspace, stage, params) != key


def test_player_weights_decide_the_weights_and_not_the_training_that_reads_them(
    params: Params, stages: dict[str, stage_graph.Stage]
) -> None:
    names = stages["train@1"].params
    assert "objective.gamma" not in names
    assert "objective.player_weighting" not in names
    known = set(Objective.model_json_schema()["properties"])
    read = {
        name.removeprefix("objective.") for stage in stages.values() for name in stage.params if "objective." in name
    }
    assert read == known  # a new field must be read by some stage


def test_a_missing_input_is_named(workspace: Workspace, params: Params, stages: dict[str, stage_graph.Stage]) -> None:
    workspace.train_rows.unlink()
    with pytest.raises(TpawError, match=r"data/train.jsonl: does not exist"):
        stage_graph.key(workspace, stages["encode"], params)
    workspace.encoded("train").unlink()
    with pytest.raises(TpawError, match=r"encoded/train.parquet: does not exist"):
        stage_graph.key(workspace, stages["sft"], params)
