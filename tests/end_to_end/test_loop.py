"""The whole loop at a tiny size with the real DVC, Prefect and MLflow, in one workspace that the tests share."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from chaos.workspace import BIN, COMMANDS, Workspace
from mlflow import MlflowClient
from tpaw_core.artifacts import checkpoint
from tpaw_core.data import encoding
from tpaw_core.data.rows import read_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Workspace]:
    """A workspace after `dvc repro` of SFT and two iterations."""
    workspace = Workspace.make(tmp_path_factory.mktemp("loop"))
    workspace.preload()
    workspace.run("dvc", "repro")
    yield workspace
    workspace.close()


def test_a_finished_loop_has_nothing_to_do_and_every_output_is_there(made: Workspace) -> None:
    assert made.stale() == set()
    assert "Running stage" not in made.run("dvc", "repro").stdout
    assert made.team(1) == [0]
    assert made.team(2) == [1, 0]
    for iteration in range(3):
        metrics = json.loads((made.folder / "metrics" / f"{iteration}.json").read_text())
        assert next(iter(metrics)) == "primary"
        assert metrics["primary"]["n"] == 16
    table = made.run("tpaw", "table").stdout.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["0", "1", "2"]


def test_the_generated_ids_are_what_the_weights_and_the_rows_agree_on(made: Workspace) -> None:
    rows = [json.loads(line) for line in (made.folder / "data" / "train.jsonl").read_text().splitlines()]
    answers = pq.read_table(made.folder / "synthetic" / "2.parquet").to_pydict()
    weights = pq.read_table(made.folder / "weights" / "2.parquet").to_pydict()
    assert answers["prompt_id"] == [row["prompt_id"] for row in rows]
    assert answers["opponent"] == [made.digest(1)] * len(rows)
    assert weights["prompt_id"] == answers["prompt_id"] * 2
    assert {len(beta) for beta in weights["beta"]} == {2}
    assert all(abs(sum(beta) - 1) < 1e-12 for beta in weights["beta"])


def test_mlflow_holds_one_parent_a_child_an_iteration_and_a_version_a_checkpoint(made: Workspace) -> None:
    client = made.client()
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
    assert {t: version.tags["digest"] for t, version in versions.items()} == {str(t): made.digest(t) for t in range(3)}
    assert versions["2"].tags["parent"] == made.digest(1)
    assert versions["2"].tags["run"] == parent.info.run_id
    assert int(client.get_model_version_by_alias("tpaw-policy", "newest").version) == int(versions["2"].version)
    assert client.get_model_version_by_alias("tpaw-policy", "champion").tags["primary"] == max(
        version.tags["primary"] for version in versions.values()
    )


def test_no_pair_is_scored_twice_over_the_iterations(made: Workspace) -> None:
    keys = [
        (file.parents[2].name, key)
        for file in (made.folder / ".tpaw" / "scores").glob("*/*/*/*.npy")
        for key in np.load(file)["key"].tolist()
    ]
    assert len(keys) == len(set(keys)) > 0
    client = made.client()
    runs = client.search_runs([client.get_experiment_by_name("tpaw").experiment_id])
    new = sum(run.data.metrics.get("scoring/new", 0) for run in runs)
    asked = sum(run.data.metrics.get("scoring/pairs", 0) for run in runs)
    assert new == len(keys) < asked


def test_a_changed_eta_concerns_training_but_not_the_first_answers(made: Workspace) -> None:
    before = (made.folder / "params.yaml").read_text()
    (made.folder / "params.yaml").write_text(before.replace("eta: 6.0", "eta: 5.0"))
    try:
        assert {"train@1", "train@2"} <= made.stale()
        assert not {"sft", "generate@1", "team@1", "weights@1"} & made.stale()
    finally:
        (made.folder / "params.yaml").write_text(before)


def test_stages_run_again_give_the_same_digests(made: Workspace) -> None:
    before = made.lock()
    stages = ["sft", "generate@1", "team@1"]
    for stage in stages:
        assert "Running stage" in made.run("dvc", "repro", "--force", "--single-item", stage).stdout
    assert made.lock() == before


def _log(made: Workspace, iteration: int) -> list[dict[str, float]]:
    return [json.loads(line) for line in (made.folder / "training" / f"{iteration}.jsonl").read_text().splitlines()]


# What is changed before the command line runs, by the name of the two things that must agree.
EQUIVALENT = {
    "shared and plain rows": "from tpaw_core import attention; attention.why_not_packed = lambda *_: 'a test says so'",
    "chunked and whole log-probs": (
        "from tpaw_core import logps; "
        "logps.token_logps = lambda h, w, t, bias, scale, cap: (h @ w.T).float().log_softmax(-1)[range(len(t)), t]"
    ),
    "one part and many": "from tpaw_core import training; training.by_tokens = lambda rows, *_: [[r] for r in rows]",
    "micro-batches of 1 and of 8": None,
}


@pytest.mark.parametrize("what", EQUIVALENT)
def test_training_by_the_command_line_has_the_same_loss_and_gradient(made: Workspace, what: str) -> None:
    """The first step's numbers before anything was rounded differently, and the last step's loosely."""
    path = made.folder / "params.yaml"
    before, outputs = path.read_text(), ("checkpoints/2", "training/2.jsonl")
    steps = ["training.save_steps=1", "training.logging_steps=1", "training.max_grad_norm=0"]
    try:
        made.run("tpaw", "use", *steps, "training.per_device_train_batch_size=8")
        made.run("tpaw", "train", "-t", "2")
        expected = _log(made, 2)
        if (change := EQUIVALENT[what]) is None:
            accumulated = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"]
            made.run("tpaw", "use", *steps, *accumulated)
            made.run("tpaw", "train", "-t", "2")
        else:
            shutil.rmtree(made.folder / ".tpaw" / "training", ignore_errors=True)
            made.run(sys.executable, "-c", f"{change}; from tpaw_core.cli import main; main()", "train", "-t", "2")
        found = _log(made, 2)
    finally:
        path.write_text(before)
        made.run("dvc", "checkout", "--force", "--quiet", *outputs)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected] == list(range(1, 7))
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "weights/target_active"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5), name
        assert found[-1][name] == pytest.approx(expected[-1][name], rel=1e-2), name


def test_lambda_by_length_divides_each_log_probability_by_its_own_tokens(made: Workspace) -> None:
    path, weights = made.folder / "params.yaml", made.folder / "weights" / "2.parquet"
    before, kept = path.read_text(), weights.read_bytes()
    path.write_text(before.replace("per_token: false", "per_token: true"))
    try:
        made.run("tpaw", "weights", "-t", "2")
        found = pq.read_table(weights).to_pydict()
    finally:
        path.write_text(before)
        weights.unlink()
        weights.write_bytes(kept)
    tokenizer = checkpoint.load_tokenizer(made.folder / "checkpoints" / "1")
    rows = list(read_rows(made.folder / "data" / "train.jsonl"))
    encoded = encoding.encode(rows, tokenizer, max_length=160, max_skipped=0.0, name="rows")
    targets = np.array([len(ids) for ids in encoded.chosen])
    answers = [pq.read_table(made.folder / "synthetic" / f"{t}.parquet")["rejected_ids"].to_pylist() for t in (2, 1)]
    lengths = np.array([len(ids) for ids in [*answers[0], *answers[1]]])
    chosen = np.array(found["players_chosen"]) * (targets.mean() / np.tile(targets, 2))[:, None]
    rejected = np.array(found["players_rejected"]) * (targets.mean() / lengths)[:, None]
    odds = np.exp(0.5 * 0.1 * (chosen - rejected))
    assert np.allclose(found["beta"], odds / odds.sum(axis=1, keepdims=True), atol=1e-12)


def test_scores_that_are_computed_again_are_the_stored_ones_to_the_byte(made: Workspace) -> None:
    stored = (made.folder / "weights" / "2.parquet").read_bytes()
    kept = made.folder / ".tpaw" / "scores"
    kept.rename(kept.with_name("aside"))
    try:
        assert " 0 scored now" not in made.run("tpaw", "weights", "-t", "2").stdout
        assert (made.folder / "weights" / "2.parquet").read_bytes() == stored
        assert " 0 scored now" in made.run("tpaw", "weights", "-t", "2").stdout
    finally:
        shutil.rmtree(kept)
        kept.with_name("aside").rename(kept)


def test_a_killed_training_goes_on_from_its_last_state_and_ends_in_the_same_bytes(made: Workspace) -> None:
    digest = made.digest(2)
    log = (made.folder / "training" / "2.jsonl").read_bytes()
    shutil.rmtree(made.folder / "checkpoints" / "2")
    process = subprocess.Popen([BIN / "tpaw", "train", "-t", "2"], cwd=made.folder, env=made.environment)
    state = made.folder / ".tpaw" / "training"
    while process.poll() is None and not list(state.glob("2-*/checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (made.folder / "checkpoints" / "2").exists(), "training ended before it could be killed"
    assert "resuming from" in made.run("tpaw", "train", "-t", "2").stdout
    assert made.digest(2) == digest
    assert (made.folder / "training" / "2.jsonl").read_bytes() == log


def test_a_version_tagged_out_of_the_team_does_not_play(made: Workspace) -> None:
    client = made.client()
    (version,) = [v for v in client.search_model_versions("name='tpaw-policy'") if v.tags["iteration"] == "0"]
    client.set_model_version_tag("tpaw-policy", version.version, "team_member", "false")
    try:
        made.run("tpaw", "team", "-t", "2")
        assert made.team(2) == [1]
    finally:
        client.delete_model_version_tag("tpaw-policy", version.version, "team_member")
        made.run("tpaw", "team", "-t", "2")
    assert made.team(2) == [1, 0]


def test_the_services_start_once_and_the_flow_redoes_nothing(made: Workspace) -> None:
    assert "worker: started" in made.run("tpaw", "up").stdout
    assert "worker: already running" in made.run("tpaw", "up").stdout
    before = made.lock()
    made.flow()
    log = (made.folder / ".tpaw" / "logs" / "worker.log").read_text()
    assert "Stage 'train@2' didn't change, skipping" in log
    assert "Running stage" not in log
    assert made.lock() == before


def test_the_services_listen_on_this_machine_only(made: Workspace) -> None:
    listening = [
        connection.laddr
        for process in made.services()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    ports = {int(made.environment[f"TPAW_{name}_PORT"]) for name in ("PREFECT", "MLFLOW")}
    assert ports <= {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_server_that_was_killed_starts_again_at_its_port(made: Workspace) -> None:
    server = made.service("mlflow")
    assert server is not None
    left = server.children(recursive=True)
    assert left, "uvicorn's processes, which hold the port"
    server.kill()
    assert "mlflow: started" in made.run("tpaw", "up").stdout
    assert psutil.wait_procs(left, timeout=5)[1] == []


def test_two_workspaces_share_one_mlflow_and_every_checkpoint_is_registered_once(
    made: Workspace, tmp_path: Path
) -> None:
    """Equal settings, so equal checkpoints: each joins the version that is there, whichever workspace was first."""
    other = Workspace.make(tmp_path / "other")
    uri = f"http://127.0.0.1:{made.environment['TPAW_MLFLOW_PORT']}"
    for path in ("synthetic", "teams", "weights", "checkpoints", "training", "metrics"):
        for made_before in (made.folder / path).glob("2*"):
            shutil.rmtree(made_before) if made_before.is_dir() else made_before.unlink()
    commands = []
    for workspace, command in ((made, "flow"), (other, "repro")):
        environment = {**workspace.environment, "MLFLOW_TRACKING_URI": uri}
        commands.append(subprocess.Popen(COMMANDS[command], cwd=workspace.folder, env=environment))
    assert [command.wait() for command in commands] == [0, 0]
    assert other.digest(2) == made.digest(2)
    digests = [version.tags["digest"] for version in made.client().search_model_versions("name='tpaw-policy'")]
    assert len(digests) == len(set(digests))
    for workspace in (made, other):
        workspace.environment["MLFLOW_TRACKING_URI"] = uri
        assert "nothing disagrees" in workspace.run("tpaw", "verify").stdout
        del workspace.environment["MLFLOW_TRACKING_URI"]
    other.close()


def test_a_dvc_lock_that_cannot_be_read_is_named_and_set_aside(made: Workspace) -> None:
    before = made.lock()
    (made.folder / "dvc.lock").write_text("stages: {")
    made.flow()
    log = (made.folder / ".tpaw" / "logs" / "worker.log").read_text()
    assert "dvc.lock: is damaged; set aside as dvc.lock.damaged" in log
    assert "is cached - skipping run" in log
    assert made.lock() == before


def test_a_study_runs_as_a_flow_and_ends_in_a_report(made: Workspace) -> None:
    parameters = {
        "methods": '["tpaw", "sft"]', "seeds": '"1"', "rates": '"1e-3"', "iterations": "1", "validation_rows": "6"
    }  # fmt: skip
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={value}")]
    made.run("prefect", "deployment", "run", "tpaw-compare/compare", "--watch", *given)
    assert (made.folder / "studies" / "demo" / "report.html").exists()
    log = (made.folder / ".tpaw" / "logs" / "worker.log").read_text()
    assert "tuning seeds: 11/11 (100%)" in log
    assert "| tpaw | 0.001 |" in re.sub(" +", " ", log)
    client = MlflowClient(made.run("sh", "-c", "echo http://127.0.0.1:$TPAW_MLFLOW_PORT").stdout.strip())
    assert client.get_experiment_by_name("tpaw-compare") is not None


def test_a_refused_parameter_fails_the_flow_and_changes_nothing(made: Workspace) -> None:
    before = made.params()
    assert made.flow('overrides=["objective.eta=0.5"]', check=False).returncode == 1
    assert made.params() == before
    assert "objective.eta" in (made.folder / ".tpaw" / "logs" / "worker.log").read_text()


def test_a_killed_flow_leaves_no_process_and_the_next_one_does_what_it_was_asked(made: Workspace) -> None:
    before, digest = made.lock(), made.digest(1)
    asked = ["--param", "iterations=1", "--param", 'overrides=["objective.eta=4"]']
    watching = subprocess.Popen(
        [BIN / "prefect", "deployment", "run", "tpaw/iterate", "--watch", *asked],
        cwd=made.folder,
        env=made.environment,
        stdout=subprocess.DEVNULL,
    )
    engine = _wait_for("prefect.engine", made.folder)
    started = engine.children(recursive=True)
    while not any("train" in _words(process) for process in started):
        time.sleep(0.05)
        started = engine.children(recursive=True)
    engine.send_signal(signal.SIGKILL)
    assert watching.wait() == 1
    assert len(started) >= 4, "dvc, the stage, and the processes that run them"
    assert psutil.wait_procs(started, timeout=20)[1] == []
    made.flow(*asked[1::2])
    assert made.params()["objective"]["eta"] == 4
    assert made.lock()["generate@1"] == before["generate@1"]
    assert made.digest(1) != digest
    assert "train@2" in made.stale(), "the second iteration was not asked for"
    changed = made.digest(1)
    made.run("tpaw", "train", "-t", "1")
    assert made.digest(1) == changed, "a flow's forked stages and the command by itself make the same bytes"


def _words(process: psutil.Process) -> list[str]:
    """Its arguments, none where it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _wait_for(word: str, folder: Path) -> psutil.Process:
    """The process in this workspace that has ``word`` among its arguments."""
    for _ in range(1200):
        for process in psutil.process_iter():
            try:
                if word in _words(process) and Path(process.cwd()) == folder:
                    return process
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"no process with {word} in {folder}")


def test_down_ends_every_service(made: Workspace) -> None:
    made.run("tpaw", "down")
    assert made.run("tpaw", "status").stdout.count("stopped") == 3
