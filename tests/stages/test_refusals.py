"""What each stage refuses: inputs that are missing, damaged or do not belong together; nothing existing is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.workspace import ROOT, TINY
from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.checkpoint import Origin
from tpaw_core.artifacts.weights import read_weights, write_weights
from tpaw_core.config import params_file
from tpaw_core.config.params import Params
from tpaw_core.engine import scoring
from tpaw_core.errors import Diverged, TpawError
from tpaw_core.stages.context import Context
from tpaw_core.stages.data import data
from tpaw_core.stages.encode import encode
from tpaw_core.stages.evaluate import evaluate
from tpaw_core.stages.generate import generate
from tpaw_core.stages.sft import sft
from tpaw_core.stages.team import team
from tpaw_core.stages.train import train
from tpaw_core.stages.weights import weights
from tpaw_core.workspace import records, sums
from tpaw_core.workspace.paths import Workspace

SETTINGS = [*TINY, "data.max_train_rows=8", "data.max_heldout_rows=4", "sft.num_train_epochs=1"]
SETTINGS += ["training.save_steps=100", "generation.max_new_tokens=8", "evaluation.max_new_tokens=8"]


def resolved(*overrides: str) -> Params:
    return params_file.resolve(Workspace(ROOT), "demo", [*SETTINGS, *overrides])[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two iterations up to the weights of the second one; no registry."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    context = Context(workspace, resolved())
    data(context)
    encode(context)
    sft(context)
    for iteration in (1, 2):
        generate(context, iteration)
        team(context, iteration)
        weights(context, iteration)
        if iteration == 1:
            train(context, iteration)
    return workspace


@pytest.fixture
def workspace(made: Workspace, tmp_path: Path) -> Iterator[Workspace]:
    shutil.copytree(made.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def files(workspace: Workspace) -> dict[str, bytes]:
    """Every file's bytes but those of locks."""
    paths = [path for path in workspace.root.rglob("*") if path.is_file() and path.parent != workspace.state]
    return {workspace.name(path): path.read_bytes() for path in paths}


def refused(message: str, workspace: Workspace, stage: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
    """The stage refuses with this message, a regular expression, and leaves every file as it was."""
    before = files(workspace)
    context = Context(workspace, resolved(*settings.pop("overrides", ())))
    with pytest.raises(TpawError, match=message):
        stage(context, *arguments)
    assert files(workspace) == before


def digest(workspace: Workspace) -> str:
    """Of the encoded training rows."""
    return Context(workspace, resolved()).encoded_digest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remade(workspace: Workspace, iteration: int) -> None:
    """A sound checkpoint with another digest in the place of this one."""
    folder = workspace.checkpoint(iteration)
    model = checkpoint.load_model(folder)
    model.lm_head.weight.data.add_(0.01)
    model.save_pretrained(folder)
    checkpoint.seal(folder, iteration, Origin(checkpoint.manifest(workspace, iteration).parent))


# encode and sft -------------------------------------------------------------------------------------------------------


def test_encode_refuses_missing_rows(workspace: Workspace) -> None:
    shutil.rmtree(workspace.data)
    refused(r"data/train\.jsonl: does not exist", workspace, encode)


def test_encode_refuses_rows_that_were_edited(workspace: Workspace) -> None:
    workspace.train_rows.write_text(workspace.train_rows.read_text().replace("####", "###", 1))
    refused(r"data/train\.jsonl: has changed since `tpaw data` made it", workspace, encode)


def test_sft_refuses_missing_rows(workspace: Workspace) -> None:
    workspace.encoded("train").unlink()
    refused(r"encoded/train\.parquet: does not exist; make it with `tpaw encode`", workspace, sft)


def test_sft_asks_for_encode_where_it_never_ran(workspace: Workspace) -> None:
    shutil.rmtree(workspace.tokenizer.parent)
    refused(r"encoded/\S+: does not exist; make it with `tpaw encode`", workspace, sft)


@pytest.mark.parametrize("stage", [encode, sft])
def test_a_model_that_cannot_be_loaded_is_refused(stage: Callable[..., None], workspace: Workspace) -> None:
    refused(
        r"model 'nobody/nothing': cannot be loaded",
        workspace,
        stage,
        overrides=["model.model_name_or_path=nobody/nothing", "model.scratch=null"],
    )


# generate, and whatever else starts from a checkpoint -----------------------------------------------------------------


@pytest.mark.parametrize("stage", [generate, team, train])
@pytest.mark.parametrize(("iteration", "remedy"), [(1, "tpaw sft"), (2, "tpaw train --iteration 1")])
def test_a_missing_parent_is_named_with_the_command_that_makes_it(
    stage: Callable[..., None], iteration: int, remedy: str, workspace: Workspace
) -> None:
    shutil.rmtree(workspace.checkpoint(iteration - 1))
    message = rf"checkpoints/{iteration - 1}: does not exist, but iteration {iteration} starts from it; make it with `"
    refused(message + remedy, workspace, stage, iteration)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (lambda folder: flip(folder / "model.safetensors"), r"model\.safetensors: has changed since it was made"),
    "a file that is gone": (lambda folder: (folder / "config.json").unlink(), r"config\.json: is missing"),
    "a file too many": (lambda folder: (folder / "x.json").write_text("{}"), r"x\.json: is not in the manifest"),
    "a pickle": (lambda folder: (folder / "model.bin").write_bytes(b""), r"model\.bin: is a pickle file"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"iteration": 0'),
        r"manifest\.json: is damaged; restore it with `dvc checkout",
    ),
    "another digest": (
        lambda folder: edit(folder / "manifest.json", digest="0" * 64),
        r"manifest\.json: is damaged",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: does not exist"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize(("stage", "iteration"), [(generate, 1), (weights, 1), (train, 1), (evaluate, 0)])
def test_a_damaged_checkpoint_is_named(
    stage: Callable[..., None], iteration: int, damage: str, workspace: Workspace
) -> None:
    spoil, message = DAMAGES[damage]
    spoil(workspace.checkpoint(0))
    refused(rf"checkpoints/0/{message}", workspace, stage, iteration)


@pytest.mark.slow
def test_a_checkpoint_that_is_remembered_is_refused_once_it_is_damaged(workspace: Workspace) -> None:
    """Also where the file keeps its size and modification time; what nobody touched is not read again."""
    time.sleep(sums.SETTLED / 1e9 + 0.1)
    weights(Context(workspace, resolved()), 2)
    path = workspace.checkpoint(0) / "model.safetensors"
    known = records.read(workspace.sums, sums.Memory).known
    assert {path.name for path in map(Path, known)} >= {"model.safetensors", "train.jsonl", "train.parquet"}
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for stage, iteration in ((generate, 1), (weights, 1), (train, 1), (evaluate, 0)):
        refused(r"checkpoints/0/model\.safetensors: has changed since it was made", workspace, stage, iteration)


OTHER_ROWS = r"was not made from the current data/{}\.jsonl; recreate it with `tpaw encode`"


@pytest.mark.parametrize("how", ["edited", "gone"])
@pytest.mark.parametrize("stage", [sft, generate, weights, train])
def test_rows_that_are_not_those_that_were_encoded_are_refused(
    stage: Callable[..., None], how: str, workspace: Workspace
) -> None:
    if how == "gone":
        shutil.rmtree(workspace.data)
        message = r"data/train\.jsonl: does not exist; .* or recreate it with `tpaw data`"
    else:
        workspace.train_rows.write_text(workspace.train_rows.read_text().replace("####", "###", 1))
        message = r"encoded/train\.parquet: " + OTHER_ROWS.format("train")
    refused(message, workspace, stage, *(() if stage is sft else (1,)))


@pytest.mark.parametrize("stage", [sft, generate, weights, train])
def test_encoded_rows_that_cannot_be_read_are_refused(stage: Callable[..., None], workspace: Workspace) -> None:
    path = workspace.encoded("train")
    path.write_bytes(path.read_bytes()[:-10])
    refused(r"encoded/train\.parquet: cannot be read", workspace, stage, *(() if stage is sft else (1,)))


def test_a_pruned_checkpoint_is_named_with_the_way_to_get_it_back(workspace: Workspace) -> None:
    workspace.pruned(1).parent.mkdir()
    (workspace.checkpoint(1) / "manifest.json").rename(workspace.pruned(1))
    shutil.rmtree(workspace.checkpoint(1))
    refused(r"checkpoints/1: was pruned; recreate it with `dvc repro train@1`", workspace, evaluate, 1)


# team -----------------------------------------------------------------------------------------------------------------


def test_team_refuses_a_member_without_answers(workspace: Workspace) -> None:
    workspace.synthetic(1).unlink()
    message = r"synthetic/1\.parquet: does not exist; make it with `tpaw generate --iteration 1`"
    refused(message, workspace, team, 2)


def test_team_refuses_where_nobody_is_left(workspace: Workspace) -> None:
    refused(r"team of iteration 2: .*; look at team\.exclude", workspace, team, 2, overrides=["team.exclude=[0, 1]"])


# weights --------------------------------------------------------------------------------------------------------------


def test_weights_refuse_a_missing_team(workspace: Workspace) -> None:
    workspace.team(2).unlink()
    refused(r"teams/2\.json: does not exist; make it with `tpaw team --iteration 2`", workspace, weights, 2)


TEAMS: dict[str, Any] = {
    "no members": {"members": []},
    "more judges than members": {"players": 3},
    "no judge": {"players": 0},
    "one field too many": {"more": 1},
    "text for a number": {"iteration": "2"},
}


@pytest.mark.parametrize("what", list(TEAMS))
@pytest.mark.parametrize("stage", [weights, train])
def test_a_damaged_team_is_named(stage: Callable[..., None], what: str, workspace: Workspace) -> None:
    edit(workspace.team(2), **TEAMS[what])
    refused(r"teams/2\.json: is damaged; recreate it with `tpaw team --iteration 2`", workspace, stage, 2)


@pytest.mark.parametrize("name", ["checkpoint", "synthetic"])
def test_a_team_that_names_a_path_elsewhere_is_damaged(name: str, workspace: Workspace) -> None:
    members = json.loads(workspace.team(2).read_text())["members"]
    members[0][name] = f"../{members[0][name]}"
    edit(workspace.team(2), members=members)
    refused(r"teams/2\.json: is damaged", workspace, weights, 2)


def test_weights_refuse_a_member_that_was_made_again(workspace: Workspace) -> None:
    remade(workspace, 0)
    message = r"checkpoints/0: is not the checkpoint recorded in teams/2\.json; rerun `tpaw team --iteration 2`"
    refused(message, workspace, weights, 2)


@pytest.mark.parametrize("stage", [weights, train])
def test_answers_that_have_changed_since_the_team_was_made_are_refused(
    stage: Callable[..., None], workspace: Workspace
) -> None:
    path = workspace.synthetic(2)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    refused(r"synthetic/2\.parquet: has changed since the team was made", workspace, stage, 2)


def test_weights_refuse_answers_of_other_rows(workspace: Workspace) -> None:
    """As if `tpaw data` had made more rows since."""
    shutil.rmtree(workspace.data)
    context = Context(workspace, resolved("data.max_train_rows=9"))
    data(context)
    encode(context)
    again = "recreate it with `tpaw generate --iteration 1`"
    message = rf"synthetic/1\.parquet: was not made from the current encoded/train\.parquet; {again}"
    refused(message, workspace, weights, 1)


def test_a_score_that_is_not_finite_ends_the_method(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a study this is a result, and not an error."""
    shutil.rmtree(workspace.scores)

    def batches(model: Any, pairs: list[Any], **options: Any) -> Iterator[tuple[list[int], list[float]]]:
        yield list(range(len(pairs))), [float("nan"), *[-1.0] * (len(pairs) - 1)]

    monkeypatch.setattr(scoring, "batches", batches)
    with pytest.raises(Diverged, match=r"weights of iteration 1: a log-probability of prompt \w{16} is not finite"):
        weights(Context(workspace, resolved()), 1)


# train ----------------------------------------------------------------------------------------------------------------


def test_train_refuses_missing_weights(workspace: Workspace) -> None:
    workspace.weights(2).unlink()
    message = r"weights/2\.parquet: does not exist; make it with `tpaw weights --iteration 2`"
    refused(message, workspace, train, 2)


def test_train_refuses_weights_that_cannot_be_read(workspace: Workspace) -> None:
    path = workspace.weights(2)
    path.write_bytes(path.read_bytes()[:-10])
    refused(r"weights/2\.parquet: cannot be read", workspace, train, 2)


def test_train_refuses_weights_of_another_number_of_judges(workspace: Workspace) -> None:
    shutil.copy(workspace.weights(1), workspace.weights(2))
    refused(r"weights/2\.parquet: cannot be read \(.*one number for each of 2 players", workspace, train, 2)


@pytest.mark.parametrize("other", ["opponents", "rows"])
def test_train_refuses_weights_that_belong_to_others(other: str, workspace: Workspace) -> None:
    found = read_weights(workspace.weights(2), 2)
    if other == "opponents":
        found = found._replace(opponents=found.opponents[::-1])
    else:
        found = found._replace(prompt_ids=["0" * 16, *found.prompt_ids[1:]])
    write_weights(workspace.weights(2), found, digest(workspace), "float32")
    message = r"weights/2\.parquet: does not match encoded/train\.parquet and teams/2\.json; recreate it"
    refused(message, workspace, train, 2)


def test_train_refuses_weights_of_other_encoded_rows(workspace: Workspace) -> None:
    write_weights(workspace.weights(2), read_weights(workspace.weights(2), 2), "0" * 64, "float32")
    again = "recreate it with `tpaw weights --iteration 2`"
    message = rf"weights/2\.parquet: was not made from the current encoded/train\.parquet; {again}"
    refused(message, workspace, train, 2)


def test_train_refuses_a_number_that_is_not_finite(workspace: Workspace) -> None:
    table = pq.read_table(workspace.weights(2))
    place = table.schema.get_field_index("beta")
    broken = [[float("nan"), 1.0], *table["beta"].to_pylist()[1:]]
    column = pa.array(broken, table.schema.field("beta").type)
    pq.write_table(table.set_column(place, "beta", column), workspace.weights(2))
    refused(r"weights/2\.parquet: cannot be read \(beta is not finite in every row\)", workspace, train, 2)


# evaluate -------------------------------------------------------------------------------------------------------------


def test_evaluate_refuses_a_checkpoint_that_is_not_there(workspace: Workspace) -> None:
    message = r"checkpoints/2/manifest\.json: does not exist; make checkpoint 2 first"
    refused(message, workspace, evaluate, 2)


def test_evaluate_refuses_rows_that_are_not_there(workspace: Workspace) -> None:
    workspace.heldout_rows.unlink()
    refused(r"data/heldout\.jsonl: does not exist; make it with `tpaw data`", workspace, evaluate, 0)


def test_evaluate_refuses_rows_that_were_edited(workspace: Workspace) -> None:
    workspace.heldout_rows.write_text(workspace.heldout_rows.read_text().replace("####", "###", 1))
    refused(r"encoded/heldout\.parquet: " + OTHER_ROWS.format("heldout"), workspace, evaluate, 0)


def test_evaluate_refuses_a_pattern_that_finds_no_answer_in_a_target(workspace: Workspace) -> None:
    overrides = ["evaluation.answer_pattern='nowhere'"]
    refused(
        r"data/heldout\.jsonl: row 1: .* finds no answer in its target", workspace, evaluate, 0, overrides=overrides
    )


# All ------------------------------------------------------------------------------------------------------------------


def test_messages_name_the_file_within_the_workspaces_folder(workspace: Workspace) -> None:
    workspace.team(2).unlink()
    refused(rf"^{re.escape(str(workspace.team(2)))}: does not exist", workspace, weights, 2)
