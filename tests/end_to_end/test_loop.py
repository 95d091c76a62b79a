"""The whole loop at a tiny size through the command line, with the real DVC and MLflow.

One `dvc repro` makes what all tests look at; a test that changes something has a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.workspace import BIN, COMMANDS, Project
from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import read_encoded
from tpaw_core.artifacts.training_log import read_log
from tpaw_core.engine import scratch
from tpaw_core.workspace.paths import Workspace

pytestmark = pytest.mark.slow


def test_a_finished_loop_has_nothing_to_do_and_every_output_is_there(finished: Project) -> None:
    assert finished.stale() == set()
    assert "Running stage" not in finished.run("dvc", "repro").stdout
    assert finished.team(1) == [0]
    assert finished.team(2) == [1, 0]
    for iteration in range(3):
        metrics = json.loads(finished.workspace.metrics(iteration).read_text())
        assert next(iter(metrics)) == "primary"
        assert metrics["primary"]["n"] == 16
    table = finished.run("tpaw", "table").stdout.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["0", "1", "2"]


def test_the_generated_ids_are_what_the_weights_and_the_rows_agree_on(finished: Project) -> None:
    workspace = finished.workspace
    rows = [json.loads(line) for line in workspace.train_rows.read_text().splitlines()]
    answers = pq.read_table(workspace.synthetic(2)).to_pydict()
    weights = pq.read_table(workspace.weights(2)).to_pydict()
    assert answers["prompt_id"] == [row["prompt_id"] for row in rows]
    assert answers["opponent"] == [finished.digest(1)] * len(rows)
    assert weights["prompt_id"] == answers["prompt_id"] * 2
    assert {len(beta) for beta in weights["beta"]} == {2}
    assert all(abs(sum(beta) - 1) < 1e-12 for beta in weights["beta"])


def test_mlflow_holds_one_parent_run_a_child_per_iteration_and_a_version_per_checkpoint(finished: Project) -> None:
    client = finished.client()
    runs = client.search_runs([client.get_experiment_by_name("tpaw").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {"sft", "iteration 1", "iteration 2"}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {"rewards/chosen", "rewards/rejected", "weights/target_active", "weights/player/1", "eval/primary"} <= set(
        children["iteration 2"].data.metrics
    )
    (given,) = children["iteration 2"].inputs.dataset_inputs
    assert given.dataset.name == "synthetic/2.parquet"
    plots = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, "report")}
    assert {f"report/{name}.png" for name in ("accuracy", "rewards", "target_active", "player_weights")} <= plots
    assert "samples.json" in {artifact.path for artifact in client.list_artifacts(children["iteration 1"].info.run_id)}
    versions = {version.tags["iteration"]: version for version in client.search_model_versions("name='tpaw-policy'")}
    assert {t: v.tags["digest"] for t, v in versions.items()} == {str(t): finished.digest(t) for t in range(3)}
    assert versions["2"].tags["parent"] == finished.digest(1)
    assert versions["2"].tags["run"] == parent.info.run_id
    assert int(client.get_model_version_by_alias("tpaw-policy", "newest").version) == int(versions["2"].version)
    assert client.get_model_version_by_alias("tpaw-policy", "champion").tags["primary"] == max(
        version.tags["primary"] for version in versions.values()
    )


def test_no_pair_is_scored_twice_over_the_iterations(finished: Project) -> None:
    keys = [
        (file.parents[2].name, key)
        for file in finished.workspace.scores.glob("*/*/*/*.npy")
        for key in np.load(file)["key"].tolist()
    ]
    assert len(keys) == len(set(keys)) > 0
    client = finished.client()
    runs = client.search_runs([client.get_experiment_by_name("tpaw").experiment_id])
    new = sum(run.data.metrics.get("scoring/new", 0) for run in runs)
    asked = sum(run.data.metrics.get("scoring/pairs", 0) for run in runs)
    assert new == len(keys) < asked


def test_a_changed_eta_concerns_training_but_not_the_first_answers(project: Project) -> None:
    with project.settings("objective.eta=5.0"):
        assert {"train@1", "train@2"} <= project.stale()
        assert not {"sft", "generate@1", "team@1", "weights@1"} & project.stale()


def test_stages_run_again_give_the_same_digests(project: Project) -> None:
    before = project.lock()
    for stage in ("sft", "generate@1", "team@1"):
        assert "Running stage" in project.run(*COMMANDS["repro"], "--force", "--single-item", stage).stdout
    assert project.lock() == before


def test_a_checkpoint_that_other_code_made_is_made_again_with_the_same_numbers(project: Project) -> None:
    """What the flow's rerun_other_code does: each stage of the iteration is forced."""
    manifest = project.workspace.checkpoint(2) / checkpoint.MANIFEST
    before, numbers = project.lock(), project.workspace.metrics(2).read_bytes()
    recorded = json.loads(manifest.read_text())
    manifest.unlink()  # it is a link to what DVC keeps
    manifest.write_text(json.dumps({**recorded, "code": {**recorded["code"], "engine": "0" * 64}}))
    project.run("dvc", "commit", "--force", "--quiet", "train@2")
    project.run("dvc", "commit", "--force", "--quiet", "evaluate@2")
    assert "differs from the installed code in: engine" in project.run("tpaw", "lineage", "-t", "2").stdout
    assert "Running stage" not in project.run(*COMMANDS["repro"], "--single-item", "train@2").stdout
    for stage in ("generate@2", "weights@2", "train@2", "evaluate@2"):
        assert "Running stage" in project.run(*COMMANDS["repro"], "--force", "--single-item", stage).stdout
    assert json.loads(manifest.read_text()) == recorded
    assert "differs" not in project.run("tpaw", "lineage", "-t", "2").stdout
    assert project.workspace.metrics(2).read_bytes() == numbers
    assert project.lock() == before


def test_a_step_in_parts_and_on_two_processes_has_the_loss_and_gradient_of_one_pass(project: Project) -> None:
    """The first step's numbers before anything was rounded differently, and the last step's loosely."""
    steps = ["training.save_steps=1", "training.logging_steps=1", "training.max_grad_norm=0"]
    logs, scores = [], project.workspace.weights(2).read_bytes()
    for own in ([], ["training.max_tokens=1"], ["machine.processes=2"]):
        with project.settings(*steps, "training.train_batch_size=8", *own):
            project.run("tpaw", "train", "-t", "2")
        logs.append(read_log(project.workspace, 2))
    expected = logs[0]
    for found in logs[1:]:
        assert [entry["step"] for entry in found] == [entry["step"] for entry in expected] == list(range(1, 7))
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "weights/target_active"):
            assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5), name
            assert found[-1][name] == pytest.approx(expected[-1][name], rel=1e-2), name
    shutil.rmtree(project.workspace.scores)
    with project.settings("machine.processes=2"):
        project.run("tpaw", "weights", "-t", "2")
    assert project.workspace.weights(2).read_bytes() == scores


def test_lambda_by_length_divides_each_log_probability_by_its_own_tokens(project: Project) -> None:
    workspace = project.workspace
    with project.settings("objective.per_token=true"):
        project.run("tpaw", "weights", "-t", "2")
    found = pq.read_table(workspace.weights(2)).to_pydict()
    encoded = read_encoded(workspace, "train")
    assert len(encoded.chosen) == len(workspace.train_rows.read_text().splitlines())
    targets = np.array([len(ids) for ids in encoded.chosen])
    answers = [pq.read_table(workspace.synthetic(t))["rejected_ids"].to_pylist() for t in (2, 1)]
    lengths = np.array([len(ids) for ids in [*answers[0], *answers[1]]])
    chosen = np.array(found["players_chosen"]) * (targets.mean() / np.tile(targets, 2))[:, None]
    rejected = np.array(found["players_rejected"]) * (targets.mean() / lengths)[:, None]
    odds = np.exp(0.5 * 0.1 * (chosen - rejected))
    assert np.allclose(found["beta"], odds / odds.sum(axis=1, keepdims=True), atol=1e-12)


def test_scores_that_are_computed_again_are_the_stored_ones_to_the_byte(project: Project) -> None:
    weights = project.workspace.weights(2)
    stored = weights.read_bytes()
    shutil.rmtree(project.workspace.scores)
    assert " 0 scored now" not in project.run("tpaw", "weights", "-t", "2").stdout
    assert weights.read_bytes() == stored
    assert " 0 scored now" in project.run("tpaw", "weights", "-t", "2").stdout


def test_a_killed_training_continues_from_its_last_state_and_ends_in_the_same_bytes(project: Project) -> None:
    digest, folder = project.digest(2), project.workspace.checkpoint(2)
    log = project.workspace.training_log(2).read_bytes()
    shutil.rmtree(folder)
    process = project.start(str(BIN / "tpaw"), "train", "-t", "2")
    state = project.workspace.training_state
    while process.poll() is None and not list(state.glob("2-*/checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not folder.exists(), "training ended before it could be killed"
    assert "resuming from" in project.run("tpaw", "train", "-t", "2").stdout
    assert project.digest(2) == digest
    assert project.workspace.training_log(2).read_bytes() == log


CLOCK = """
import datetime, os
from transformers.utils import chat_template_utils

class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=int(os.environ["TPAW_TEST_DAYS"]))

chat_template_utils.datetime = Clock
"""


def test_a_template_that_writes_the_date_gives_the_same_bytes_after_midnight(finished: Project, tmp_path: Path) -> None:
    """The date is that of `encode`, whenever the other stages run."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    own = scratch.TEMPLATE.replace("{% for", "{{ strftime_now('%Y-%m-%d') + '\n' }}{% for", 1)
    (tmp_path / "dated.jinja").write_text(own)
    base, template = finished.workspace.checkpoint(0), tmp_path / "dated.jinja"
    settings = [f"model.model_name_or_path={base}", f"model.chat_template={template}", "sft.num_train_epochs=1"]
    made = Project.make(tmp_path / "dated", *settings, iterations=1)
    made.fork_from(finished)
    workspace = made.workspace
    made.run(*COMMANDS["repro"], "train@1", "evaluate@1")
    outputs = [
        *workspace.checkpoint(1).iterdir(),
        workspace.training_log(1),
        workspace.metrics(1),
        workspace.samples(1),
    ]
    before, encoded = {path: path.read_bytes() for path in outputs}, workspace.encoded("train").read_bytes()
    shutil.rmtree(workspace.checkpoint(1))
    for path in outputs[-3:]:
        path.unlink()
    paths = [str(tmp_path / "clock"), os.environ.get("PYTHONPATH", "")]
    made.environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TPAW_TEST_DAYS": "1"}
    made.preload()  # the clock moves where an interpreter starts
    made.run("tpaw", "train", "-t", "1")
    made.run("tpaw", "evaluate", "-t", "1")
    assert {path: path.read_bytes() for path in outputs} == before
    assert made.stale() == {"evaluate-sft", "report"}, "what has not run yet"
    today = _date(workspace)
    made.run("tpaw", "encode")
    assert _date(workspace) == today + timedelta(days=1), "the clock has moved"
    assert workspace.encoded("train").read_bytes() != encoded
    made.close()


def _date(workspace: Workspace) -> date:
    """What the template wrote before the first prompt."""
    prompt = read_encoded(workspace, "train").prompts[0]
    return date.fromisoformat(checkpoint.load_tokenizer(workspace.tokenizer).decode(list(prompt)).splitlines()[0])


def test_a_version_tagged_out_of_the_team_does_not_play(project: Project) -> None:
    client = project.client()
    (version,) = [v for v in client.search_model_versions("name='tpaw-policy'") if v.tags["iteration"] == "0"]
    client.set_model_version_tag("tpaw-policy", version.version, "team_member", "false")
    project.run("tpaw", "team", "-t", "2")
    assert project.team(2) == [1]
    client.delete_model_version_tag("tpaw-policy", version.version, "team_member")
    project.run("tpaw", "team", "-t", "2")
    assert project.team(2) == [1, 0]


@pytest.fixture
def outside(project: Project, tmp_path: Path) -> Iterator[tuple[Project, Path]]:
    """The project, and an empty folder to work from."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    yield project, folder
    assert list(folder.iterdir()) == [], "nothing is written where a command was started"


def test_dash_c_works_from_another_folder(outside: tuple[Project, Path]) -> None:
    project, elsewhere = outside
    there = Project(elsewhere)
    there.environment = project.environment
    before = project.lock()
    said = there.run("tpaw", "-C", str(project.folder), "use", "objective.eta=5").stdout
    assert said == "params.yaml: recipe demo, objective.eta=5\n"
    assert project.params()["objective"]["eta"] == 5
    there.run("tpaw", "-C", "../project", "use", "objective.eta=6.0")
    shutil.rmtree(project.workspace.data)
    assert there.run("tpaw", "-C", "../project", "data").stdout == "data/: 48 train rows, 16 held-out rows\n"
    assert "no problems found" in there.run("tpaw", "-C", "../project", "verify").stdout
    there.run("tpaw", "-C", str(project.folder), "weights", "-t", "2")
    there.run("tpaw", "-C", "../project", "team", "-t", "2")
    assert project.stale() == set()
    assert project.lock() == before
    done = there.run("tpaw", "-C", "../nothing", "verify", check=False)
    assert done.returncode != 0
    assert "../nothing" in done.stderr


def test_checkpoints_may_be_on_another_disk(project: Project, mount_small_disk: Callable[[Path], Path]) -> None:
    before = project.digest(2)
    checkpoints = project.folder / "checkpoints"
    shutil.rmtree(checkpoints)
    mount_small_disk(checkpoints)
    project.run("dvc", "checkout")
    assert project.stale() == set()
    for stage in ("sft", "train@2"):  # one from the cache, one made again
        project.run("dvc", "repro", "--single-item", *(["--force"] if stage == "train@2" else []), stage)
    assert project.digest(2) == before
    assert project.stale() == set()
    assert "no problems found" in project.run("tpaw", "verify").stdout
