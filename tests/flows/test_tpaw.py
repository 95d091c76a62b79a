"""The flow's own decisions, without a server: which checkpoints are made again, and which failures are retried."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flows import dvc, tpaw
from tpaw_core.artifacts import checkpoint, code
from tpaw_core.config.params import Params
from tpaw_core.workspace.paths import Workspace


@pytest.fixture
def made(
    workspace: Workspace,
    make_model: Callable[[int], Any],
    save_checkpoint: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Workspace:
    """Three checkpoints in the flow's workspace."""
    for iteration in range(3):
        save_checkpoint(make_model(iteration), workspace.checkpoint(iteration), iteration)
    monkeypatch.setattr(tpaw, "WORKSPACE", workspace)
    return workspace


def edit(workspace: Workspace, iteration: int, parts: dict[str, str]) -> None:
    path = workspace.checkpoint(iteration) / checkpoint.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": parts}))


def test_no_checkpoint_of_todays_code_is_made_again(made: Workspace) -> None:
    assert tpaw._by_other_code() == set()


@pytest.mark.parametrize("part", list(code.PARTS))
def test_a_checkpoint_of_other_code_is_made_again(part: str, made: Workspace) -> None:
    edit(made, 1, {**code.digests(), part: "0" * 64})
    assert tpaw._by_other_code() == {1}


def test_a_checkpoint_that_names_no_code_is_left(made: Workspace) -> None:
    edit(made, 0, {})
    edit(made, 2, {"engine": "0" * 64})
    assert tpaw._by_other_code() == {2}


@pytest.mark.parametrize("rerun", [set(), {0}, {1}, {0, 2}])
def test_the_stages_of_a_checkpoint_that_is_made_again_are_forced_and_no_others(
    rerun: set[int], made: Workspace, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which answers, weights and figures belong to checkpoint t: those that iteration t makes."""
    asked: list[tuple[str, bool]] = []
    for name in ("check", "data", "encode", "sft", "generate", "team", "weights", "train", "evaluate", "report"):
        monkeypatch.setattr(tpaw, name, _recording(name, asked))
    monkeypatch.setattr(tpaw, "show_results", lambda *_: None)
    monkeypatch.setattr(tpaw, "create_progress_artifact", lambda *_, **__: uuid.uuid4())
    monkeypatch.setattr(tpaw, "update_progress_artifact", lambda *_: None)
    monkeypatch.setattr(dvc, "preloaded", contextlib.nullcontext)
    tpaw.iterate(params, 2, False, rerun)
    names = ["check", "data", "encode", "sft", "evaluate 0"]
    names += [f"{stage} {t}" for t in (1, 2) for stage in ("generate", "team", "weights", "train", "evaluate")]
    assert [name for name, _ in asked] == [*names, "report"]
    forced = {name for name, force in asked if force}
    expected = {"sft", "evaluate 0"} if 0 in rerun else set()
    for t in rerun - {0}:
        expected |= {f"{stage} {t}" for stage in ("generate", "weights", "train", "evaluate")}
    assert forced == expected
    assert json.loads(made.flow_seconds.read_text()).keys() == {name.split()[0] for name in [*names, "report"]}


def _recording(name: str, asked: list[tuple[str, bool]]) -> Any:
    class Stage:
        def __init__(self) -> None:
            self.name = name

        def __call__(self, *arguments: Any) -> None:
            numbers = [str(a) for a in arguments if not isinstance(a, bool)]
            asked.append((" ".join([name, *numbers]), True in [a for a in arguments if isinstance(a, bool)]))

    return Stage()


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (dvc.StageFailed("error: data/", temporary=False), False),
        (dvc.StageFailed("no server", temporary=True), True),
        (OSError("disk"), True),
    ],
)
def test_a_retry_can_help_unless_the_stage_refused(error: Exception, helps: bool) -> None:
    state = SimpleNamespace(result=lambda raise_on_failure: error)
    assert dvc.can_help(None, None, state) is helps
