from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from tpaw_core.artifacts.team import Member, Team, answers, read_team, write_team
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files
from tpaw_core.workspace.paths import Workspace

Damage = Callable[[dict[str, Any]], Any]


def member(iteration: int, **changes: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "version": iteration + 1,
        "digest": f"{iteration}" * 64,
        "checkpoint": f"checkpoints/{iteration}",
        "synthetic": f"synthetic/{iteration + 1}.parquet",
        "synthetic_sha256": "f" * 64,
        **changes,
    }


SOUND = {"iteration": 3, "policy": "latest", "players": 2, "members": [member(2), member(1), member(0)]}


def save(workspace: Workspace, content: bytes | str) -> None:
    workspace.team(3).parent.mkdir(exist_ok=True)
    workspace.team(3).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_team_comes_back_as_it_was_written(workspace: Workspace) -> None:
    team = Team(iteration=3, policy="latest", players=2, members=[Member(**m) for m in SOUND["members"]])
    write_team(workspace, team)
    assert json.loads(workspace.team(3).read_text()) == SOUND
    assert read_team(workspace, 3) == team


def test_the_newest_players_judge(workspace: Workspace) -> None:
    save(workspace, json.dumps(SOUND))
    assert [judge.iteration for judge in read_team(workspace, 3).judges] == [2, 1]


def test_a_missing_team_is_asked_for(workspace: Workspace) -> None:
    with pytest.raises(TpawError, match=r"teams/3\.json: does not exist; make it with `tpaw team --iteration 3`"):
        read_team(workspace, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda team: {k: v for k, v in team.items() if k != "players"},
        lambda team: {**team, "extra": 1},
        lambda team: {**team, "players": 0},
        lambda team: {**team, "players": 4},
        lambda team: {**team, "players": "2"},
        lambda team: {**team, "members": []},
        lambda team: {**team, "members": [{"iteration": 0}]},
        lambda team: {**team, "members": [member(2) | {"iteration": math.inf}, *team["members"][1:]]},
        lambda team: {**team, "members": [member(2, checkpoint="../../etc"), *team["members"][1:]]},
        lambda team: {**team, "members": [member(2, checkpoint="checkpoints/1"), *team["members"][1:]]},
        lambda team: {**team, "members": [member(2, synthetic="/etc/hostname"), *team["members"][1:]]},
        lambda team: [team],
    ],
)
def test_a_damaged_team_is_refused(damage: Damage, workspace: Workspace) -> None:
    save(workspace, json.dumps(damage(SOUND)))
    with pytest.raises(TpawError, match=r"teams/3\.json: is damaged; recreate it with `tpaw team --iteration 3`"):
        read_team(workspace, 3)


def test_other_answers_than_the_teams_are_refused(workspace: Workspace) -> None:
    path = workspace.synthetic(1)
    path.parent.mkdir()
    path.write_bytes(b"abc")
    played = Member(**member(0, synthetic_sha256=files.sha256(path)))
    assert answers(workspace, played) == path
    path.write_bytes(b"abd")
    message = rf"{path}: has changed since the team was made; move it away, then restore it with `dvc checkout"
    with pytest.raises(TpawError, match=message):
        answers(workspace, played)
    path.unlink()
    with pytest.raises(TpawError, match=rf"{path}: does not exist; recreate it, or restore it with `dvc checkout`"):
        answers(workspace, played)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 5000])
def test_a_team_that_is_not_json_is_refused(content: bytes, workspace: Workspace) -> None:
    save(workspace, content)
    with pytest.raises(TpawError, match="is damaged"):
        read_team(workspace, 3)
