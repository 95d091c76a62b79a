from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tpaw_core.config import params_file

ROOT = Path(__file__).parents[1]
Tpaw = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tpaw(tmp_path: Path) -> Tpaw:
    """Run the command line in a workspace that holds the demo's parameters and recipes, and nothing else."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "recipes" / "demo.yaml", tmp_path / "params.yaml")

    def run(*arguments: str, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tpaw_core", *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def params(tmp_path: Path, *overrides: str) -> None:
    (tmp_path / "params.yaml").write_text(params_file.resolve(str(ROOT / "recipes" / "demo.yaml"), overrides)[1])


def test_help_names_every_stage(tpaw: Tpaw) -> None:
    done = tpaw("--help")
    assert (done.returncode, done.stderr) == (0, "")
    stages = ["data", "sft", "generate", "team", "weights", "train", "evaluate", "report"]
    for command in [*stages, "use", "register", "up", "down", "status"]:
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "-t", "1"],
            "checkpoints/0: does not exist, and iteration 1 starts from it; make it with `tpaw sft`",
        ),
        (
            ["team", "--iteration", "3"],
            "checkpoints/2: does not exist, and iteration 3 starts from it; make it with `tpaw train",
        ),
        (["evaluate", "-t", "0"], "checkpoints/0/manifest.json: does not exist; make checkpoint 0 first"),
        (["generate", "-t", "9"], "--iteration 9: params.yaml has 4 iterations; add it there"),
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


def test_bad_parameters_are_a_message_and_a_traceback_only_where_asked_for(tpaw: Tpaw, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((tmp_path / "params.yaml").read_text().replace("eta:", "etaa:"))
    plain, traced = tpaw("data"), tpaw("data", "--traceback")
    message = "params.yaml: unknown key 'objective.etaa' (did you mean 'eta'?); remove it or mend its name"
    assert (plain.returncode, plain.stdout, plain.stderr) == (1, "", f"error: {message}\n")
    assert traced.returncode == 1
    assert "Traceback (most recent call last)" in traced.stderr
    assert message in traced.stderr


@pytest.mark.parametrize("content", [None, b"\xff", b"recipe: [", b"recipe: 2026-05-09\n"])
def test_a_params_file_that_cannot_be_read_is_no_traceback(content: bytes | None, tpaw: Tpaw, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").unlink()
    if content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    done = tpaw("data")
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "-t", "0"], ["generate", "-t", "one"], ["nonsense"]])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], tpaw: Tpaw) -> None:
    done = tpaw(*arguments)
    assert done.returncode == 2
    assert "Usage" in done.stderr


def test_a_tracking_server_that_does_not_answer_is_named_with_the_remedy(tpaw: Tpaw, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = tpaw("team", "-t", "1", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 75
    assert done.stderr.startswith(f"error: MLFLOW_TRACKING_URI {uri}: no MLflow server answers")
    assert "make up" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("uri", ["http://", "nonsense://server", "http://127.0.0.1:notaport"])
def test_a_tracking_uri_that_is_none_is_no_traceback(uri: str, tpaw: Tpaw, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    done = tpaw("team", "-t", "1", MLFLOW_TRACKING_URI=uri)
    assert done.returncode in (1, 75)
    assert f"error: MLFLOW_TRACKING_URI {uri}" in done.stderr
    assert "Traceback" not in done.stderr


def test_use_switches_the_recipe_and_keeps_overrides_until_the_next_switch(tpaw: Tpaw, tmp_path: Path) -> None:
    active = tmp_path / "params.yaml"
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
    assert params_file.load(active) == params_file.load(ROOT / "recipes" / "demo.yaml")


def test_data_makes_the_rows_and_says_how_many(tpaw: Tpaw, tmp_path: Path) -> None:
    params(tmp_path, "data.max_train_rows=30", "data.max_heldout_rows=10")
    done = tpaw("data")
    assert (done.returncode, done.stdout) == (0, "data/: 30 train rows, 10 held-out rows\n")
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 30


def test_a_stage_whose_flow_is_gone_does_not_start(tpaw: Tpaw) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done = tpaw("sft", TPAW_OWNER=str(gone.pid))
    assert done.returncode == 1
    assert done.stderr == f"error: the flow (process {gone.pid}) that started this stage is gone\n"


def test_a_damaged_team_file_is_named(tpaw: Tpaw, tmp_path: Path) -> None:
    (tmp_path / "teams").mkdir()
    (tmp_path / "teams" / "1.json").write_text(json.dumps({"iteration": 1, "members": []}))
    done = tpaw("weights", "-t", "1")
    assert (done.returncode, done.stderr) == (
        1, "error: teams/1.json: is damaged; make it again with `tpaw team --iteration 1`\n"
    )  # fmt: skip


def test_a_disk_that_runs_full_in_a_stage_is_one_message_and_costs_nothing_made(tpaw: Tpaw, small_disk: Path) -> None:
    params(small_disk, "data.max_train_rows=16", "data.max_heldout_rows=4", "sft.num_train_epochs=1")
    assert tpaw("data", cwd=small_disk).returncode == 0
    rows = (small_disk / "data" / "train.jsonl").read_bytes()
    done = tpaw("sft", cwd=small_disk)
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith(f"error: {small_disk}")
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert not (small_disk / "checkpoints").exists()
    assert (small_disk / "data" / "train.jsonl").read_bytes() == rows
