"""weights: the judges' log-probabilities of every triplet, and the player weights beta."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import read_encoding
from tpaw_core.artifacts.synthetic import read_responses
from tpaw_core.artifacts.team import Member, Team, answers, read_team
from tpaw_core.artifacts.weights import Weights, write_weights
from tpaw_core.data.tokens import Pairs
from tpaw_core.errors import Diverged, TpawError
from tpaw_core.stages.context import Context
from tpaw_core.stages.members import Members

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from tpaw_core.config.params import Regime
    from tpaw_core.data.encoding import EncodedRows
    from tpaw_core.data.tokens import Pair, TokenRows

logger = logging.getLogger(__name__)


def weights(context: Context, iteration: int) -> None:
    """Log-probabilities of every (triplet, player) and the player weights beta.

    Reads: encoded/, teams/<t>.json, its members' checkpoints and synthetic data, the score store. Writes:
    weights/<t>.parquet; adds to the store what it lacked. Refuses: a member that is missing or changed.
    """
    from tpaw_core.engine import precision

    lora = context.params.lora is not None
    workspace, registry = context.workspace, context.registry
    with workspace.exclusive(f"weights@{iteration}"):
        team = read_team(workspace, iteration)
        for member in team.judges:
            if checkpoint.verify(workspace, member.iteration).digest != member.digest:
                which = f"{workspace.place(member.checkpoint)}: is not the checkpoint"
                raise TpawError(
                    f"{which} recorded in teams/{iteration}.json; rerun `tpaw team --iteration {iteration}`"
                )
        encoded = context.encoded()
        regime: Regime = "bfloat16_base"
        if not lora:
            regime = precision.of_products(context.params.training.bf16, "training.bf16")
            if regime == "bfloat16" and context.params.training.sharded:
                regime = "bfloat16_weights"
        pairs, table, scored = _scores(context, team, encoded, read_encoding(workspace).pad_id, regime)
        known = _weights(context, team, encoded, pairs, table)
        with workspace.publish(workspace.weights(iteration)) as aside:
            write_weights(aside, known, context.encoded_digest, regime)
        logger.info("%d (row, player) pairs: %d scored now, the rest already stored", table.size, scored)
        if registry:
            counts = {"scoring/new": scored, "scoring/pairs": table.size}
            registry.runs.log_metrics(registry.runs.iteration_run(iteration), [(0, counts)])


def _scores(
    context: Context, team: Team, encoded: EncodedRows, pad_id: int, regime: Regime
) -> tuple[Pairs, NDArray[np.float64], int]:
    """The pairs of targets, then of each opponent's answers; their scores [pairs, judges]; how many were computed."""
    import numpy as np

    from tpaw_core.artifacts import code, score_store
    from tpaw_core.engine import scoring
    from tpaw_core.launch import scoring as ranked

    workspace, scored = context.workspace, 0
    settings = f"{regime}-{code.digests()['engine'][:12]}"
    digest = context.encoded_digest
    members = Members(context, "bfloat16" if regime in ("bfloat16_base", "bfloat16_weights") else "float32")
    how: Any = {"pad_id": pad_id, "bf16": regime == "bfloat16"}
    machine = context.params.machine

    def read(opponent: Member) -> tuple[TokenRows, NDArray[np.bytes_]]:
        rows = read_responses(answers(workspace, opponent), encoded.row_ids, digest)
        return rows, score_store.keys(Pairs(encoded.prompts, rows))

    stores = [score_store.ScoreStore(workspace.scores, member.digest, settings) for member in team.judges]
    targets = score_store.keys(Pairs(encoded.prompts, encoded.chosen))
    played: dict[Member, tuple[TokenRows, NDArray[np.bytes_]]] = {}  # an opponent's answers and their keys
    # A player's earlier requests are repeated first, so that what is computed now has the same bytes as then.
    for earlier in range(team.judges[-1].iteration + 1, team.iteration + 1):
        then = read_team(workspace, earlier)
        played = {member: played.get(member) or read(member) for member in then.members}
        rows, keys = zip(*played.values(), strict=True)
        pairs = Pairs(encoded.prompts, encoded.chosen, *rows)
        request, columns = score_store.Request.of(np.concatenate([targets, *keys])), []
        for member, store in zip(team.judges, stores, strict=True):
            if member.digest not in [judge.digest for judge in then.judges]:
                continue

            def score(new: Sequence[Pair], player: int = member.iteration) -> Any:
                if machine.world_size == 1:
                    return scoring.batches(members.load(player), new, **how)
                sharded = context.params.training.sharded
                return ranked.batches(machine, workspace.state, members.source(player), new, sharded=sharded, **how)

            values, new = store.scores(pairs, score, request)
            columns.append(values)
            scored += new
    return pairs, np.array(columns).T, scored


def _weights(context: Context, team: Team, encoded: EncodedRows, pairs: Pairs, table: NDArray[np.float64]) -> Weights:
    import numpy as np

    from tpaw_core.method.lengths import by_length
    from tpaw_core.method.player_weights import player_weights

    rows, opponents = len(encoded.row_ids), len(team.members)
    if len(broken := np.flatnonzero(~np.isfinite(table).all(axis=1))):
        raise Diverged(
            f"weights of iteration {team.iteration}: a log-probability of prompt {encoded.row_ids[broken[0] % rows]} "
            "is not finite; the checkpoint that gave it is not usable; exclude it with team.exclude"
        )
    objective = context.params.objective_at(team.iteration)
    judged = table
    if objective.per_token:
        lengths = pairs.response_lengths.astype(np.float64)
        judged = by_length(table, lengths[:, None], lengths[:rows].mean())
    targets = np.tile(judged[:rows], (opponents, 1))
    beta = player_weights(targets, judged[rows:], gamma=objective.gamma, scale=objective.lambda_)
    return Weights(
        encoded.row_ids * opponents,
        [member.digest for member in team.members for _ in range(rows)],
        np.tile(table[:rows], (opponents, 1)),
        table[rows:],
        beta,
    )
