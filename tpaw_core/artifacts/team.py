"""teams/<t>.json: the checkpoints that play iteration t."""

from __future__ import annotations

from pathlib import Path

from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, records
from tpaw_core.workspace.paths import Workspace
from tpaw_core.workspace.records import Record


class Member(Record):
    """A checkpoint of the team: its answers in ``synthetic`` are negatives, its log-probabilities references."""

    iteration: int
    version: int
    digest: str
    checkpoint: str
    synthetic: str
    synthetic_sha256: str


class Team(Record):
    """Members, newest first. All are opponents; the first ``players`` of them judge."""

    iteration: int
    policy: str
    players: int
    members: list[Member]

    @property
    def judges(self) -> list[Member]:
        return self.members[: self.players]


def read_team(workspace: Workspace, iteration: int) -> Team:
    """Raises TpawError where the file is missing, damaged or names other paths than the workspace has."""
    again = f"`tpaw team --iteration {iteration}`"
    path = files.need(workspace.team(iteration), f"make it with {again}")
    found = records.read(path, Team, f"recreate it with {again}")
    sound = 1 <= found.players <= len(found.members) and all(
        member.checkpoint == workspace.name(workspace.checkpoint(member.iteration))
        and member.synthetic == workspace.name(workspace.synthetic(member.iteration + 1))
        for member in found.members
    )
    if not sound:
        raise TpawError(f"{path}: is damaged; recreate it with {again}")
    return found


def answers(workspace: Workspace, member: Member) -> Path:
    """The file with a member's answers. Raises TpawError where it is not the one that the team was made with."""
    path = files.need(workspace.place(member.synthetic), records.RESTORE)
    if workspace.sha256(path) != member.synthetic_sha256:
        remedy = f"move it away, then restore it with `dvc checkout {path}`"
        raise TpawError(f"{path}: has changed since the team was made; {remedy}")
    return path


def write_team(workspace: Workspace, team: Team) -> None:
    with workspace.publish(workspace.team(team.iteration)) as aside:
        aside.write_text(team.text())
