"""team: who plays an iteration."""

from __future__ import annotations

import logging

from tpaw_core.artifacts.team import Member, Team, write_team
from tpaw_core.errors import TpawError
from tpaw_core.method.team import assemble
from tpaw_core.stages.context import Context
from tpaw_core.workspace import files

logger = logging.getLogger(__name__)


def team(context: Context, iteration: int) -> None:
    """The team of iteration t, chosen from the registered checkpoints.

    Reads: the registry (without one, the folder checkpoints/), manifests of the checkpoints before t. Writes:
    teams/<t>.json. Refuses: nobody left to play, a member whose checkpoint or synthetic data is missing.
    """
    workspace, settings = context.workspace, context.params.team
    with workspace.exclusive(f"team@{iteration}"):
        context.parent(iteration)
        candidates = context.candidates(iteration)
        try:
            chosen = assemble(candidates, iteration=iteration, size=settings.size, exclude=settings.exclude)
        except ValueError as error:
            message = f"team of iteration {iteration}: {error}; look at team.exclude and the tags in MLflow"
            raise TpawError(message) from None
        members = []
        for player in chosen:
            played = player.iteration + 1
            synthetic = files.need(workspace.synthetic(played), f"make it with `tpaw generate --iteration {played}`")
            members.append(
                Member(
                    iteration=player.iteration,
                    version=player.version,
                    digest=player.digest,
                    checkpoint=workspace.name(workspace.checkpoint(player.iteration)),
                    synthetic=workspace.name(synthetic),
                    synthetic_sha256=workspace.sha256(synthetic),
                )
            )
        players = min(settings.players or len(members), len(members))
        write_team(workspace, Team(iteration=iteration, policy=settings.policy, players=players, members=members))
        names = [f"checkpoint {member.iteration} (version {member.version})" for member in members]
        logger.info("team: %s", ", ".join(names))
