"""The services and the flows with the real Prefect, DVC and MLflow.

The services run in one project for all tests. Before each test its files are set back to those after a finished loop,
and what does not run of the services is started.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.support.workspace import BIN, COMMANDS, Project
from tpaw_core.artifacts import checkpoint
from tpaw_core.processes import health
from tpaw_core.workspace import lease

pytestmark = pytest.mark.slow

LIVING = {"mlflow", "prefect", "logs", "services.json", "services.lock"}  # in .tpaw/, what the services hold


class Served(Project):
    """A project whose services were started; ``said`` is what that printed.

    Its folder has a name that a URL cannot hold as it is, and HTTP_PROXY names a proxy that answers nobody.
    """

    said = ""

    def restore(self, source: Project) -> None:
        """The files of ``source``, but for what belongs to the services."""
        for path in self.folder.iterdir():
            if path.name != ".tpaw":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (self.folder / ".tpaw").iterdir():
            if path.name not in LIVING:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in [*source.folder.iterdir(), *(source.folder / ".tpaw").iterdir()]:
            if path.name != ".tpaw" and not (path.parent.name == ".tpaw" and path.name in LIVING):
                target = self.folder / path.relative_to(source.folder)
                subprocess.run(["cp", "--archive", path, target], check=True)

    def states(self, flow: str) -> dict[str, str]:
        """The last runs of a flow that shared work: name and state."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 2}
        answer = health.ask(f"{self.environment['PREFECT_API_URL']}/flow_runs/filter", json.dumps(body).encode())
        return {run["name"]: run["state"]["type"] for run in json.loads(answer or "[]")}

    def worker_log(self) -> str:
        return (self.folder / ".tpaw" / "logs" / "worker.log").read_text()


@pytest.fixture(scope="module")
def running(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(finished.copy(tmp_path_factory.mktemp("flows") / "a%2Fb c?d#e").folder)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        made.environment |= {"HTTP_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
        made.said = made.run("tpaw", "up").stdout
        made.environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # for prefect, as `activate` does
        yield made
        made.close()


@pytest.fixture
def served(running: Served, finished: Project) -> Served:
    running.restore(finished)
    if "stopped" in running.run("tpaw", "status").stdout:
        running.run("tpaw", "up")
    return running


@pytest.fixture
def client(served: Served) -> MlflowClient:
    return MlflowClient(f"http://127.0.0.1:{served.environment['TPAW_MLFLOW_PORT']}")


def test_the_services_start_once(served: Served) -> None:
    for name in ("prefect", "mlflow", "worker"):
        assert f"{name}: started" in served.said
    assert served.run("tpaw", "up").stdout.count("already running") == 3


def test_a_flow_redoes_nothing_that_is_up_to_date(served: Served) -> None:
    before, start = served.lock(), len(served.worker_log())
    served.flow()
    log = served.worker_log()[start:]
    assert "Stage 'train@2' didn't change, skipping" in log
    assert "Running stage" not in log
    assert served.lock() == before


def test_the_services_listen_on_this_machine_only(served: Served) -> None:
    listening = [
        connection.laddr
        for process in served.services()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    ports = {int(served.environment[f"TPAW_{name}_PORT"]) for name in ("PREFECT", "MLFLOW")}
    assert ports <= {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_server_that_was_killed_starts_again_at_its_port(served: Served) -> None:
    server = served.service("mlflow")
    assert server is not None
    left = server.children(recursive=True)
    assert left, "uvicorn's processes, which hold the port"
    server.kill()
    assert "mlflow: started" in served.run("tpaw", "up").stdout
    assert psutil.wait_procs(left, timeout=5)[1] == []


def test_two_workspaces_share_one_mlflow_and_every_checkpoint_is_registered_once(
    served: Served, client: MlflowClient, finished: Project, tmp_path: Path
) -> None:
    """Equal settings, so equal checkpoints: each joins the version that is there, whichever workspace was first."""
    other = Project.make(tmp_path / "other", "sft.num_train_epochs=2")
    other.fork_from(finished)
    for path in ("synthetic", "teams", "weights", "checkpoints", "training", "metrics"):
        for made_before in (served.folder / path).glob("2*"):
            shutil.rmtree(made_before) if made_before.is_dir() else made_before.unlink()
    uri = client.tracking_uri
    commands = []
    for project, command in ((served, "flow"), (other, "repro")):
        environment = {**project.environment, "MLFLOW_TRACKING_URI": uri}
        commands.append(subprocess.Popen(COMMANDS[command], cwd=project.folder, env=environment))
    assert [command.wait() for command in commands] == [0, 0]
    assert other.digest(2) == served.digest(2) == finished.digest(2)
    digests = [version.tags["digest"] for version in client.search_model_versions("name='tpaw-policy'")]
    assert len(digests) == len(set(digests))
    for project in (served, other):
        project.environment["MLFLOW_TRACKING_URI"] = uri
        try:
            assert "no problems found" in project.run("tpaw", "verify").stdout
        finally:
            del project.environment["MLFLOW_TRACKING_URI"]
    other.close()


def test_a_dvc_lock_that_cannot_be_read_is_named_and_moved_aside(served: Served) -> None:
    before, start = served.lock(), len(served.worker_log())
    (served.folder / "dvc.lock").write_text("stages: {")
    served.flow()
    log = served.worker_log()[start:]
    assert "dvc.lock: is damaged; moved to dvc.lock.damaged" in log
    assert "is cached - skipping run" in log
    assert served.lock() == before


def test_a_flow_makes_what_other_code_made_again_where_it_is_asked_to(served: Served) -> None:
    """Only the checkpoint whose manifest names other code; the numbers come out the same."""
    manifest = served.workspace.checkpoint(2) / checkpoint.MANIFEST
    recorded, numbers = json.loads(manifest.read_text()), served.workspace.metrics(2).read_bytes()
    before, start = served.lock(), len(served.worker_log())
    manifest.unlink()
    manifest.write_text(json.dumps({**recorded, "code": {**recorded["code"], "engine": "0" * 64}}))
    served.flow("rerun_other_code=true")
    log = served.worker_log()[start:]
    assert set(re.findall(r"Running stage '([\w@-]+)'", log)) >= {"generate@2", "weights@2", "train@2", "evaluate@2"}
    assert not {"sft", "train@1"} & set(re.findall(r"Running stage '([\w@-]+)'", log))
    assert json.loads(manifest.read_text()) == recorded
    assert served.workspace.metrics(2).read_bytes() == numbers
    assert served.lock() == before


def study(seeds: str, **more: str) -> list[str]:
    """The command that runs a study as a flow."""
    parameters = {
        "methods": '["tpaw", "sft"]', "seeds": f'"{seeds}"', "rates": '"1e-3"', "iterations": "1",
        "validation_rows": "6", **more,
    }  # fmt: skip
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={value}")]
    return [str(BIN / "prefect"), "deployment", "run", "tpaw-compare/compare", "--watch", *given]


def test_a_study_runs_as_a_flow_and_ends_in_a_report(served: Served, client: MlflowClient) -> None:
    start = len(served.worker_log())
    served.run(*study("1"))
    assert (served.folder / "studies" / "demo" / "report.html").exists()
    log = served.worker_log()[start:]
    assert "tuning seeds: 13/13 (100%)" in log
    assert "| tpaw | 0.001 |" in re.sub(" +", " ", log)
    assert client.get_experiment_by_name("tpaw-compare") is not None


def test_a_study_on_two_workers_one_of_them_killed_gives_the_csv_files_of_one(
    served: Served, client: MlflowClient
) -> None:
    alone, shared = (served.folder / "studies" / name for name in ("alone", "demo"))
    asked = ["--method", "tpaw", "--method", "sft", "--seeds", "1-3", "--rates", "1e-3", "--iterations", "1"]
    second = psutil.Popen(
        [BIN / "prefect", "worker", "start", "--pool", "tpaw", "--type", "process", "--limit", "1"],
        cwd=served.folder,
        env={**served.environment, "MLFLOW_TRACKING_URI": client.tracking_uri, "PREFECT_WORKER_QUERY_SECONDS": "1"},
        start_new_session=True,
    )
    try:
        served.run("tpaw", "compare", *asked, "--validation-rows", "6", "--tuning-seeds", "3", "--folder", str(alone))
        watching = served.start(*study("1-3", tuning_seeds="3", workers="2"))
        while len(list(shared.glob("made/*/seconds"))) < 10 or not _works_on_a_cell(second, shared):
            assert watching.poll() is None, watching.communicate()
            time.sleep(0.05)
    finally:
        for process in [second, *second.children(recursive=True)]:
            process.kill()
        second.wait()
    _, said = watching.communicate()
    while "RUNNING" in (states := served.states("tpaw-compare")).values():
        time.sleep(0.2)
    assert sorted(states.values()) == ["COMPLETED", "CRASHED"], said
    assert sum(name.endswith(", worker 2 of 2") for name in states) == 1
    for name in ("results.csv", "grid.csv", "steps.csv"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name


def _works_on_a_cell(worker: psutil.Process, folder: Path) -> bool:
    own = {process.pid for process in worker.children(recursive=True)}
    owners = [lease.of(path).owner for path in folder.glob("cells/*/*/*/.tpaw/cell.lease")]
    return any(owner is not None and owner.pid in own for owner in owners)


def test_a_refused_parameter_fails_the_flow_and_changes_nothing(served: Served) -> None:
    before, start = served.params(), len(served.worker_log())
    assert served.flow('overrides=["objective.eta=0.5"]', check=False).returncode == 1
    assert served.params() == before
    assert "objective.eta" in served.worker_log()[start:]


def test_a_broken_model_and_broken_rows_are_both_named_before_anything_is_trained(served: Served) -> None:
    """The first task of a flow is `tpaw check`."""
    before, start = served.lock(), len(served.worker_log())
    made = {path: path.stat().st_mtime_ns for path in served.folder.glob("checkpoints/*/*")}
    shutil.copytree(served.workspace.checkpoint(0), broken := served.folder / "broken")
    (broken / "model.safetensors").unlink()
    rows = served.workspace.train_rows.read_text().splitlines()
    (served.folder / "rows.jsonl").write_text("\n".join([*rows[:20], *['{"prompt": "2 + 2"}'] * 20]))
    (served.folder / "heldout.jsonl").write_text(served.workspace.heldout_rows.read_text())
    asked = ["model.model_name_or_path=broken", "data.path=rows.jsonl", "data.heldout_path=heldout.jsonl"]
    assert served.flow(f"overrides={json.dumps(asked)}", check=False).returncode == 1
    log = served.worker_log()[start:]
    alone = served.run("tpaw", "check", check=False)
    assert alone.returncode == 1
    for said in (log, alone.stderr):
        assert "2 problems to fix before a run:" in said
        assert re.search(r"- rows\.jsonl: 20 of 40 rows cannot be used; the first reasons: row 21: ", said)
        assert "- model 'broken': cannot be loaded" in said
    assert log.count("(Alpaca)") == 1, "the layouts that are read, whoever repeats the failure"
    assert "Running stage" not in log
    assert served.lock() == before
    assert {path: path.stat().st_mtime_ns for path in served.folder.glob("checkpoints/*/*")} == made


def test_a_killed_flow_leaves_no_process_and_the_next_one_does_what_it_was_asked(served: Served) -> None:
    before, digest = served.lock(), served.digest(1)
    asked = ["--param", "iterations=1", "--param", 'overrides=["objective.eta=4"]']
    watching = subprocess.Popen(
        [BIN / "prefect", "deployment", "run", "tpaw/iterate", "--watch", *asked],
        cwd=served.folder,
        env=served.environment,
        stdout=subprocess.DEVNULL,
    )
    engine = _wait_for("prefect.engine", served.folder)
    started = engine.children(recursive=True)
    while not any("train" in _words(process) for process in started):
        time.sleep(0.05)
        started = engine.children(recursive=True)
    engine.send_signal(signal.SIGKILL)
    assert watching.wait() == 1
    assert len(started) >= 4, "dvc, the stage, and the processes that run them"
    assert psutil.wait_procs(started, timeout=20)[1] == []
    served.flow(*asked[1::2])
    assert served.params()["objective"]["eta"] == 4
    assert served.lock()["generate@1"] == before["generate@1"]
    assert served.digest(1) != digest
    assert "train@2" in served.stale(), "the second iteration was not asked for"
    changed = served.digest(1)
    served.run("tpaw", "train", "-t", "1")
    assert served.digest(1) == changed, "a flow's forked stages and the command by itself make the same bytes"


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


def test_down_ends_every_service(served: Served) -> None:
    services = served.services()
    served.run("tpaw", "down")
    assert served.run("tpaw", "status").stdout.count("stopped") == 3
    assert psutil.wait_procs(services, timeout=5)[1] == []
