"""How a flow runs stages through DVC: what it reads from their output, and what it does about a damaged dvc.lock."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows import dvc
from tests.support.workspace import BIN, Project
from tpaw_core.processes import fork_server
from tpaw_core.workspace.paths import Workspace

# A project of one stage that needs no model: it writes `out`, which is what `in` holds, and fails where `in` says so.
STAGE = "stages: {one: {cmd: 'sh stage.sh', deps: [in], outs: [out]}}\n"
SCRIPT = "cat in; if [ -e temporary ]; then exit 75; fi; grep -q wrong in && exit 3; cp in out\n"


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What goes to the flow run's log."""
    monkeypatch.setattr(dvc, "get_run_logger", lambda: logging.getLogger("flow"))
    caplog.set_level(logging.INFO, "flow")
    return caplog


@pytest.fixture(scope="module")
def initialised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder .dvc of a new project."""
    folder = tmp_path_factory.mktemp("dvc")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], check=True, cwd=folder)
    return folder / ".dvc"


@pytest.fixture
def folder(initialised: Path, host: Project, tmp_path: Path, messages: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, as of a flow run, with a project of one stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv(fork_server.ADDRESS, host.environment[fork_server.ADDRESS])
    shutil.copytree(initialised, tmp_path / ".dvc")
    (tmp_path / "dvc.yaml").write_text(STAGE)
    (tmp_path / "stage.sh").write_text(SCRIPT)
    (tmp_path / "in").write_text("rows\n")
    return tmp_path


# What a failed command said -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code", "message", "temporary"),
    [
        (["Running stage 'sft':", "error: data/: no rows", "ERROR: failed to run: exited with 1"], 255,
         "error: data/: no rows", False),
        (["one", "error: a", "  b", "ERROR: failed to run: tpaw team, exited with 75"], 255, "error: a\n  b", True),
        (["ERROR: failed to run: tpaw train, exited with -9"], 255,
         "ERROR: failed to run: tpaw train, exited with -9", True),
        (["ERROR: failed to run: tpaw train, exited with 137"], 255,
         "ERROR: failed to run: tpaw train, exited with 137", True),
        (["Traceback", *"abcdef", "ValueError: x"], 1, "c\nd\ne\nf\nValueError: x", False),
        ([f"error: {'x' * 300}"], 1, f"error: {'x' * 243} ...", False),
        (["killed"], -9, "killed", True),
        (["killed"], 143, "killed", True),
        (["an attempt exited with 75", "ERROR: another exited with 1"], 255, "an attempt exited with 75\n"
         "ERROR: another exited with 1", False),
    ],
)  # fmt: skip
def test_a_failure_is_the_stages_own_message_and_temporary_where_a_retry_can_help(
    lines: list[str], code: int, message: str, temporary: bool
) -> None:
    found = dvc._failure(lines, code)
    assert type(found) is dvc.StageFailed
    assert (str(found), found.temporary) == (message, temporary)


@pytest.mark.parametrize(
    "line",
    [
        "ERROR: 'dvc.lock' is invalid.",
        "ERROR: '../project/dvc.lock' validation failed.",
        "ERROR: unable to read: '/project/dvc.lock', YAML file structure is corrupted",
    ],
)
def test_a_lock_that_dvc_cannot_read_is_told_from_other_failures(line: str) -> None:
    found = dvc._failure(["Running stage 'sft':", line], 255)
    assert isinstance(found, dvc.LockDamaged)
    assert not found.temporary


def test_another_damaged_file_is_no_damaged_lock() -> None:
    assert type(dvc._failure(["ERROR: unable to read: 'dvc.yaml', YAML file"], 255)) is dvc.StageFailed


# Running --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_line_but_dvcs_hints_goes_to_the_log(folder: Path, messages: pytest.LogCaptureFixture) -> None:
    (folder / "stage.sh").write_text("echo 'warning: look'; echo more; cp in out\n")
    assert dvc.repro("one")
    levels = {record.getMessage(): record.levelno for record in messages.records if record.name == "flow"}
    assert levels["warning: look"] == logging.WARNING
    assert levels["more"] == logging.INFO
    assert not [line for line in levels if line.startswith(dvc.HINTS)]


@pytest.mark.slow
def test_dvcs_hints_are_what_it_says_itself(folder: Path) -> None:
    """Whatever else DVC says is shown: a hint that was reworded would be noticed here."""
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.no_scm", "false"], check=True)
    command = [sys.executable, "-m", "dvc", "repro", "one"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.strip()]
    shown = [line for line in said if not line.startswith(dvc.HINTS)]
    assert len(shown) < len(said)
    assert [line for line in shown if "git" in line or "dvc " in line] == []


def test_repro_says_whether_the_stage_ran(folder: Path) -> None:
    assert dvc.repro("one")
    assert not dvc.repro("one")
    assert (folder / "out").read_text() == "rows\n"


@pytest.mark.slow
def test_force_runs_a_stage_that_is_up_to_date(folder: Path) -> None:
    assert dvc.repro("one")
    assert not dvc.repro("one")
    assert dvc.repro("one", force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("pruned", [None, 1, 2, 3])
def test_the_options_that_dvc_gets(
    force: bool, pruned: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pruned checkpoint, the one before and the one that the stage makes count."""
    monkeypatch.chdir(tmp_path)
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(dvc, "run", lambda *command: given.append(command) or [])
    if pruned is not None:
        path = Workspace(tmp_path).pruned(pruned)
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    dvc.repro("train@2", 2, force=force)
    options = (*(["--allow-missing"] if pruned in (1, 2) else []), *(["--force"] if force else []))
    assert given == [("dvc", "repro", "--single-item", *options, "train@2")]


@pytest.mark.slow
def test_a_stage_that_refuses_is_not_temporary(folder: Path) -> None:
    (folder / "in").write_text("error: wrong rows\n")
    with pytest.raises(dvc.StageFailed, match=r"^error: wrong rows") as caught:
        dvc.repro("one")
    assert not caught.value.temporary


@pytest.mark.slow
def test_a_service_that_did_not_answer_is_temporary(folder: Path) -> None:
    (folder / "temporary").touch()
    with pytest.raises(dvc.StageFailed) as caught:
        dvc.repro("one")
    assert caught.value.temporary


@pytest.mark.slow
def test_a_command_that_is_not_there_fails_with_its_name(folder: Path) -> None:
    with pytest.raises(dvc.StageFailed, match="No such command 'nothing'"):
        dvc.run("tpaw", "nothing")


# A damaged dvc.lock ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"stages: {", b"\xff\xfe", b"stages: 1\n", b"[]\n"])
def test_a_lock_that_cannot_be_read_is_moved_aside_and_the_stage_is_taken_from_the_cache(
    content: bytes, folder: Path, messages: pytest.LogCaptureFixture
) -> None:
    assert dvc.repro("one")
    before = (folder / "dvc.lock").read_bytes()
    (folder / "dvc.lock").write_bytes(content)
    dvc.repro("one")
    assert "dvc.lock: is damaged; moved to dvc.lock.damaged, and all stages will be rechecked" in messages.text
    assert "is cached - skipping run" in messages.text
    assert (folder / "dvc.lock").read_bytes() == before
    assert (folder / "dvc.lock.damaged").read_bytes() == content


@pytest.mark.slow
def test_adding_a_folder_survives_a_damaged_lock_too(folder: Path) -> None:
    dvc.repro("one")
    (folder / "dvc.lock").write_text("stages: {")
    (folder / "data").mkdir()
    (folder / "data" / "rows").write_text("rows")
    dvc.add(Path("data"))
    assert (folder / "data.dvc").exists()
    assert (folder / "dvc.lock.damaged").exists()


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whatever_ends_the_wait_the_whole_group_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stage.sh").write_text("echo $$ > pid; echo started; sleep 100\n")

    class Stopped(BaseException):
        pass

    class Logger(logging.Logger):
        def log(self, level: int, message: object, *args: object, **kwargs: object) -> None:
            if message == "started":
                raise Stopped

    monkeypatch.setattr(dvc, "get_run_logger", lambda: Logger("flow"))
    with pytest.raises(Stopped):
        dvc.repro("one")
    shell = int((folder / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(shell) and psutil.Process(shell).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stage_knows_the_flow_that_started_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stage.sh").write_text("echo owner $TPAW_OWNER; which tpaw; touch out\n")
    lines = dvc.run("dvc", "repro", "one")
    assert f"owner {os.getpid()}" in lines
    assert str(BIN / "tpaw") in lines


@pytest.mark.slow
def test_while_commands_are_preloaded_they_are_forked_and_the_server_ends_with_the_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(fork_server.ADDRESS)
    with dvc.preloaded():
        assert Path(os.environ[fork_server.ADDRESS]).exists()
        assert dvc.repro("one")
        (server,) = [p for p in psutil.Process().children() if os.environ[fork_server.ADDRESS] in p.cmdline()]
    assert fork_server.ADDRESS not in os.environ
    assert not server.is_running()
