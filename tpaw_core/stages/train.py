"""train: checkpoint t from checkpoint t-1 and the team's triplets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.artifacts.encoded import read_encoding
from tpaw_core.artifacts.synthetic import read_responses
from tpaw_core.artifacts.team import Member, answers, read_team
from tpaw_core.artifacts.training_log import write_log
from tpaw_core.artifacts.weights import read_weights, scored_in
from tpaw_core.data.tokens import Pairs
from tpaw_core.errors import TpawError
from tpaw_core.method import early_warnings
from tpaw_core.stages import storage
from tpaw_core.stages.context import Context
from tpaw_core.stages.members import Members, base_of
from tpaw_core.workspace import files

if TYPE_CHECKING:
    from tpaw_core.config.optimisation import Optimisation
    from tpaw_core.config.params import Objective
    from tpaw_core.data.encoding import EncodedRows
    from tpaw_core.data.tokens import TokenRows
    from tpaw_core.engine.training.batches import Groups


def train(context: Context, iteration: int) -> None:
    """Checkpoint t; resumes from its last saved state if it was stopped. With lora, checkpoint t-1's adapter goes on.

    Reads: encoded/, checkpoints/<t-1>, teams/<t>.json, weights/<t>.parquet, the team's synthetic data
    (objective.name=sft: the rows alone). Writes: checkpoints/<t>, training/<t>.jsonl. Refuses: inputs that do not
    belong together, numbers that are not finite.
    """
    from tpaw_core.engine.training import loop
    from tpaw_core.launch import training

    workspace, params = context.workspace, context.params
    with workspace.exclusive(f"train@{iteration}"):
        folder = context.parent(iteration)
        manifest = checkpoint.verify(workspace, iteration - 1)
        base, adapter = base_of(context, iteration - 1)
        if adapter is not None and params.lora is not None:
            adapters.require(adapter, params.lora)
        tokenizer, encoded = checkpoint.load_tokenizer(workspace.tokenizer), context.encoded()
        encoding = read_encoding(workspace)
        objective, settings = params.objective_at(iteration), _settings(context, iteration)
        deciding = {
            "seed": params.seed,
            "model": {"dtype": params.model.dtype},
            # What decides the weights is left out: these are read.
            "objective": objective.model_dump(mode="json", by_alias=True, exclude={"gamma", "player_weighting"}),
            "training": settings.model_dump(mode="json"),
        }
        if params.lora is not None:
            deciding["lora"] = params.lora.model_dump(mode="json")
        made_from, team = [*context.rows], []
        learn: Any = loop.sft
        if objective.name == "sft":
            own: dict[str, Any] = {"rows": Pairs(encoded.prompts, encoded.chosen)}
        else:
            learn = loop.self_play
            own = {"groups": _groups(context, iteration, encoded, objective), "objective": objective}
            made_from.append(workspace.weights(iteration))
            team = [member.digest for member in read_team(workspace, iteration).members]
        sums = context.sums(made_from)
        state = workspace.training_state / f"{iteration}-{files.digest([manifest.digest, team, sums, deciding])[:16]}"
        origin = checkpoint.Origin(manifest.digest, team, sums, deciding, base if params.lora else None)
        source = Members(context, "bfloat16" if params.lora else "float32").source(iteration - 1)
        if params.lora is not None and adapter is None:
            source = replace(source, new=(params.lora, params.seed))
        with context.recorded(iteration) as on_log:
            model, log = training.train(
                params.machine,
                workspace.state,
                source,
                learn,
                settings,
                on_log,
                pad_id=encoding.pad_id,
                seed=params.seed + iteration,
                state=state.absolute(),
                row_ids=encoded.row_ids,
                **own,
            )
        write_log(workspace, iteration, log)
        storage.report_kept(context, iteration, model, folder)
        checkpoint.write(
            workspace,
            iteration,
            model,
            tokenizer,
            origin,
            dtype=params.checkpoint_dtype,
            stop_ids=encoding.ending.stop_ids,
        )
        if context.registry:
            context.registry.register(iteration)
        context.warn(early_warnings.of_training(log), iteration)
        shutil.rmtree(state, ignore_errors=True)


def _settings(context: Context, iteration: int) -> Optimisation:
    """How to train, in the precision in which the judges scored: else the first step's reward would not be 0."""
    from tpaw_core.engine import precision

    settings, how = context.params.training_at(iteration), f"with `tpaw weights --iteration {iteration}`"
    lora = context.params.lora is not None
    if context.params.objective.name == "sft":
        return precision.on_a_base(settings) if lora else precision.settled(settings, "training")
    path = files.need(context.workspace.weights(iteration), f"make it {how}")
    scored = scored_in(path)
    if lora != (scored == "bfloat16_base"):
        found = scored if lora else f"{scored} (for LoRA)"
        trained = "LoRA trains on a bfloat16 base" if lora else "lora is null, so all weights are trained"
        raise TpawError(f"{path}: was scored in {found}, but {trained}; recreate it {how}")
    if scored == "bfloat16_base":
        return precision.on_a_base(settings)
    if scored not in (None, "float32") and settings.sharded != (scored == "bfloat16_weights"):
        asked = f"training.sharded={str(settings.sharded).lower()} rounds weights at a different point"
        raise TpawError(f"{path}: was scored in {scored}, but {asked}; recreate it {how}")
    if scored is not None and settings.bf16 != "auto" and settings.bf16 != (scored != "float32"):
        asked = f"training.bf16={str(settings.bf16).lower()} asks for the other precision"
        raise TpawError(f"{path}: was scored in {scored}, but {asked}; recreate it {how}")
    return precision.settled(settings, "training", "bfloat16" if scored == "bfloat16_weights" else scored)


def _groups(context: Context, iteration: int, encoded: EncodedRows, objective: Objective) -> Groups:
    """The team's triplets with their weights, checked to belong together."""
    from tpaw_core.engine.training.batches import Groups

    workspace, digest = context.workspace, context.encoded_digest
    team = read_team(workspace, iteration)
    path = files.need(workspace.weights(iteration), f"make it with `tpaw weights --iteration {iteration}`")
    weights = read_weights(path, team.players, digest)
    opponents = [member.digest for member in team.members for _ in encoded.row_ids]
    if weights.prompt_ids != encoded.row_ids * len(team.members) or weights.opponents != opponents:
        raise TpawError(
            f"{path}: does not match encoded/train.parquet and teams/{iteration}.json; recreate it with "
            f"`tpaw weights --iteration {iteration}`"
        )
    shape = len(team.members), len(encoded.row_ids), team.players  # opponents, rows, players

    def played(member: Member) -> TokenRows:
        return read_responses(answers(workspace, member), encoded.row_ids, digest)

    return Groups(
        encoded.prompts,
        encoded.chosen,
        [played(member) for member in team.members],
        weights.players_chosen.reshape(shape)[0],
        weights.players_rejected.reshape(shape),
        weights.beta.reshape(shape),
        initial=read_responses(workspace.synthetic(1), encoded.row_ids) if objective.name == "tspin" else None,
        drop_equal=objective.drop_equal,
    )
