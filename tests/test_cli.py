"""The command line in this process; end_to_end/test_cli runs it as users do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tpaw_core import cli
from tpaw_core.config import params_file
from tpaw_core.processes import fork_server
from tpaw_core.workspace.paths import Workspace


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Tpaw = Callable[..., Done]


@pytest.fixture
def tpaw(workspace: Workspace, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tpaw:
    """Run a command in a workspace that holds the demo's parameters and recipes, and nothing else."""
    shutil.copytree(root / "recipes", workspace.recipes)
    shutil.copy(root / "recipes" / "demo.yaml", workspace.params_file)
    for name in ("MLFLOW_TRACKING_URI", "TPAW_OWNER", fork_server.ADDRESS):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, cwd: Path = workspace.root, **environment: str) -> Done:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["tpaw", *arguments])
        capfd.readouterr()
        code = 0
        with mock.patch.dict(os.environ, environment):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Done(code, *capfd.readouterr())

    return run


def params(workspace: Workspace, *overrides: str) -> None:
    workspace.params_file.write_text(params_file.resolve(workspace, "demo", overrides)[1])


@pytest.mark.parametrize("command", ["check", "data", "encode", "sft"])
def test_checkpoints_behind_a_link_are_refused_before_anything_is_done(
    command: str, tpaw: Tpaw, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (workspace.root / "checkpoints").symlink_to(tmp_path_factory.mktemp("disk"))
    done = tpaw(command)
    assert done.returncode == 1
    assert done.stderr.startswith("error: checkpoints: is a link, which DVC does not follow; ")


def test_help_names_every_stage(tpaw: Tpaw) -> None:
    done = tpaw("--help")
    assert (done.returncode, done.stderr) == (0, "")
    stages = ["check", "data", "encode", "sft", "generate", "team", "weights", "train", "evaluate", "report"]
    for command in [*stages, "use", "register", "up", "down", "status"]:
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "-t", "1"],
            "checkpoints/0: does not exist, but iteration 1 starts from it; make it with `tpaw sft`",
        ),
        (
            ["team", "--iteration", "3"],
            "checkpoints/2: does not exist, but iteration 3 starts from it; make it with `tpaw train",
        ),
        (["encode"], "data/train.jsonl: does not exist; make it with `tpaw data`"),
        (["evaluate", "-t", "0"], "encoded/tokenizer/ending.json: does not exist; make it with `tpaw encode`"),
        (["generate", "-t", "9"], "--iteration 9: params.yaml ends with iteration 4; add 9 there"),
        (["use", "dmo"], "recipe 'dmo': no such recipe (did you mean 'demo'?)"),
        (["use", "demo", "objective.etaa=3"], "unknown key 'objective.etaa' (did you mean 'eta'?)"),
    ],
)
def test_what_cannot_be_done_ends_in_one_message_and_status_1(arguments: list[str], message: str, tpaw: Tpaw) -> None:
    done = tpaw(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bad_parameters_are_one_message(tpaw: Tpaw, workspace: Workspace) -> None:
    path = workspace.params_file
    path.write_text(path.read_text().replace("eta:", "etaa:"))
    plain = tpaw("data")
    message = "params.yaml: unknown key 'objective.etaa' (did you mean 'eta'?); remove it or fix its name"
    assert (plain.returncode, plain.stdout, plain.stderr) == (1, "", f"error: {message}\n")


@pytest.mark.parametrize("content", [None, b"\xff", b"recipe: [", b"recipe: 2026-05-09\n"])
def test_a_params_file_that_cannot_be_read_is_no_traceback(
    content: bytes | None, tpaw: Tpaw, workspace: Workspace
) -> None:
    workspace.params_file.unlink()
    if content is not None:
        workspace.params_file.write_bytes(content)
    done = tpaw("data")
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "-t", "0"], ["generate", "-t", "one"], ["nonsense"]])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], tpaw: Tpaw) -> None:
    done = tpaw(*arguments)
    assert done.returncode == 2
    assert "Usage" in done.stderr


def test_a_tracking_server_that_does_not_answer_is_named_with_the_remedy(tpaw: Tpaw, workspace: Workspace) -> None:
    workspace.checkpoint(0).mkdir(parents=True)
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = tpaw("team", "-t", "1", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 75
    assert done.stderr.startswith(f"error: MLFLOW_TRACKING_URI {uri}: no MLflow server answers")
    assert "make up" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("uri", ["http://", "nonsense://server", "http://127.0.0.1:notaport"])
def test_a_tracking_uri_that_is_none_is_no_traceback(uri: str, tpaw: Tpaw, workspace: Workspace) -> None:
    workspace.checkpoint(0).mkdir(parents=True)
    done = tpaw("team", "-t", "1", MLFLOW_TRACKING_URI=uri)
    assert done.returncode in (1, 75)
    assert f"error: MLFLOW_TRACKING_URI {uri}" in done.stderr
    assert "Traceback" not in done.stderr


def test_use_switches_the_recipe_and_keeps_overrides_until_the_next_switch(tpaw: Tpaw, workspace: Workspace) -> None:
    active = workspace.params_file
    assert (
        tpaw("use", "demo", "seed=7", "objective.eta=4").stdout == "params.yaml: recipe demo, seed=7, objective.eta=4\n"
    )
    assert (params_file.load(active).seed, params_file.load(active).objective.eta) == (7, 4.0)
    assert tpaw("use", "objective.gamma=0").returncode == 0
    assert (params_file.load(active).seed, params_file.load(active).objective.gamma) == (7, 0.0)
    before = active.read_bytes()
    assert tpaw("use", "objective.eta=0").returncode == 1
    assert active.read_bytes() == before
    tpaw("use", "demo")
    assert params_file.load(active) == params_file.load(workspace.recipes / "demo.yaml")


def test_data_makes_the_rows_and_says_how_many(tpaw: Tpaw, workspace: Workspace) -> None:
    params(workspace, "data.max_train_rows=30", "data.max_heldout_rows=10")
    done = tpaw("data")
    assert (done.returncode, done.stdout) == (0, "data/: 30 train rows, 10 held-out rows\n")
    assert len(workspace.train_rows.read_text().splitlines()) == 30


def test_a_stage_whose_flow_is_gone_does_not_start(tpaw: Tpaw) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done = tpaw("sft", TPAW_OWNER=str(gone.pid))
    assert done.returncode == 1
    assert done.stderr == f"error: the flow (process {gone.pid}) that started this stage has ended\n"


def test_a_damaged_team_file_is_named(tpaw: Tpaw, workspace: Workspace) -> None:
    workspace.team(1).parent.mkdir()
    workspace.team(1).write_text(json.dumps({"iteration": 1, "members": []}))
    done = tpaw("weights", "-t", "1")
    assert (done.returncode, done.stderr) == (
        1, "error: teams/1.json: is damaged; recreate it with `tpaw team --iteration 1`\n"
    )  # fmt: skip


def test_dash_c_works_on_another_folder(
    tpaw: Tpaw, workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere, folder = tmp_path_factory.mktemp("elsewhere"), str(workspace.root)
    done = tpaw("-C", folder, "use", "demo", "data.max_train_rows=30", "data.max_heldout_rows=10", cwd=elsewhere)
    assert done.returncode == 0
    assert params_file.load(workspace.params_file).data.max_train_rows == 30
    relative = os.path.relpath(workspace.root, elsewhere)
    done = tpaw("-C", relative, "data", cwd=elsewhere)
    assert (done.returncode, done.stdout) == (0, "data/: 30 train rows, 10 held-out rows\n")
    assert len(workspace.train_rows.read_text().splitlines()) == 30
    done = tpaw("-C", folder, "verify", cwd=elsewhere)
    assert (done.returncode, done.stdout) == (0, "checked: datasets 1\nno problems found\n")
    assert list(elsewhere.iterdir()) == []


def test_dash_c_with_what_is_not_a_folder_is_refused(tpaw: Tpaw) -> None:
    done = tpaw("-C", "nothing", "data")
    assert (done.returncode, done.stderr) == (1, "error: -C nothing: not a folder\n")


def test_a_stage_takes_no_part_in_the_job_that_it_is_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["tpaw", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert not job.keys() & os.environ.keys()
