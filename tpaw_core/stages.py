"""The stages: params and inputs in, engine called, outputs published. Iteration t makes checkpoint t, 0 the SFT model.

A stage writes aside and renames; what it refuses, it refuses before anything that was already made is touched.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import TypedDict

from tpaw_core import alarms, checkpoint, config, data, evaluation, records, workspace
from tpaw_core.config import Params
from tpaw_core.errors import Diverged, TpawError
from tpaw_core.ragged import Ragged

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tpaw_core.config import Objective
    from tpaw_core.generation import Response
    from tpaw_core.registry import Registry
    from tpaw_core.team import Candidate
    from tpaw_core.template import EncodedRows
    from tpaw_core.training import Groups, OnLog


ROWS_AT_A_TIME = 1000


@records.shape
class Member(TypedDict):
    """One team member in teams/<t>.json: a main player, and the opponent whose answers are in ``synthetic``."""

    iteration: int
    version: int
    digest: str
    checkpoint: str
    synthetic: str
    synthetic_sha256: str


@records.shape
class TeamFile(TypedDict):
    """What teams/<t>.json holds, members newest first; the first ``players`` of them judge."""

    iteration: int
    policy: str
    players: int
    members: list[Member]


class Weights(NamedTuple):
    """What weights/<t>.parquet holds of n opponents' triplets with K players, opponent by opponent."""

    prompt_ids: list[str]  # [n * rows]
    opponents: list[str]  # [n * rows] digests
    players_chosen: NDArray[np.float64]  # [n * rows, K]  log pi_j(y|x)
    players_rejected: NDArray[np.float64]  # [n * rows, K]  log pi_j(g|x)
    beta: NDArray[np.float64]  # [n * rows, K]


def prepare_data(params: Params) -> dict[str, int]:
    """Reads the recipe's rows. Writes data/. Refuses rows as `tpaw_core.data.prepare` says."""
    with workspace.exclusive("data"):
        return data.prepare(params.data, params.seed)


def sft(params: Params, registry: Registry | None) -> None:
    """Checkpoint 0: the base model fine-tuned on data/train.jsonl, or the ready model of the recipe as it is.

    Reads: data/train.jsonl. Writes: checkpoints/0, training/0.jsonl. Refuses: a model that cannot be loaded.
    """
    from tpaw_core import scratch, training

    with workspace.exclusive("sft"):
        own = params.model
        if own.model_name_or_path is None:
            assert own.scratch is not None
            texts = chain.from_iterable(
                [*(m["content"] for m in row.prompt), row.completion] for row in data.read(workspace.TRAIN_ROWS)
            )
            tokenizer = scratch.tokenizer(texts, own.scratch, own.max_length)
            model = scratch.model(own.scratch, tokenizer, max_length=own.max_length, seed=params.seed)
        else:
            tokenizer = checkpoint.load_tokenizer(own.model_name_or_path, own.revision)
            model = checkpoint.load_model(
                own.model_name_or_path, dtype="float32" if params.sft.enabled else own.dtype, revision=own.revision
            )
            if own.chat_template is not None:
                tokenizer.chat_template = own.chat_template
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
        log: list[dict[str, float]] = []
        deciding = {
            "seed": params.seed,
            "model": own.model_dump(mode="json"),
            "sft": params.sft.model_dump(mode="json"),
        }
        rows = workspace.sha256(workspace.TRAIN_ROWS)
        made_from = {workspace.TRAIN_ROWS.as_posix(): rows}
        if own.model_name_or_path is not None:
            made_from[own.model_name_or_path] = checkpoint.identity(model, own.model_name_or_path)
        origin = checkpoint.Origin(made_from=made_from, params=deciding)
        state = workspace.TRAINING_STATE / f"0-{config.digest([deciding, rows])[:16]}"
        if params.sft.enabled:
            encoded = _encoded(params, tokenizer, data.read(workspace.TRAIN_ROWS))
            with _recorded(registry, 0) as on_log:
                log = training.sft(
                    model,
                    list(zip(encoded.prompts, encoded.chosen, strict=True)),
                    params.sft,
                    pad_id=tokenizer.pad_token_id,
                    seed=params.seed,
                    state=state,
                    on_log=on_log,
                    row_ids=encoded.row_ids,
                )
                _publish(params, 0, model, tokenizer, log, origin)
                if registry:
                    registry.log_dataset(registry.iteration(0), workspace.TRAIN_ROWS, len(encoded.row_ids), "training")
                    registry.register(0)
        else:
            _publish(params, 0, model, tokenizer, log, origin)
            if registry:
                registry.register(0)
        shutil.rmtree(state, ignore_errors=True)


def generate(params: Params, iteration: int, registry: Registry | None) -> None:
    """One answer of checkpoint t-1 to every training prompt: the synthetic data of iteration t.

    Reads: checkpoints/<t-1>, data/train.jsonl. Writes: synthetic/<t>.parquet. Refuses: a missing or damaged parent.
    """
    from tpaw_core import generation

    with workspace.exclusive(f"generate@{iteration}"):
        folder = _parent(iteration)
        manifest = checkpoint.verify(folder)
        tokenizer = checkpoint.load_tokenizer(folder)
        encoded = _encoded(params, tokenizer)
        limit: Any = {"max_length": params.model.max_length, "eos_id": tokenizer.eos_token_id}
        seed = params.seed + iteration
        if params.generation.backend == "vllm":
            responses = generation.generate_vllm(
                folder, encoded.prompts, params.generation, **limit, seed=seed, dtype=params.model.dtype
            )
        else:
            model = checkpoint.load_model(folder)
            responses = generation.generate(
                model, encoded.prompts, params.generation, **limit, seed=seed, pad_id=tokenizer.pad_token_id
            )
        with workspace.publish(workspace.synthetic(iteration)) as aside:
            _write_synthetic(aside, iteration, manifest["digest"], _playing(params), encoded, responses, tokenizer)
        equal = sum(r.ids == chosen for r, chosen in zip(responses, encoded.chosen, strict=True))
        cut = sum(r.finish_reason == "length" for r in responses)
        print(f"{len(responses)} responses: {equal} equal their target, {cut} were cut at the limit", flush=True)
        if registry:
            run = registry.iteration(iteration)
            registry.log_dataset(run, workspace.synthetic(iteration), len(responses), "synthetic")
            share = {"generation/equal_to_target": equal / len(responses), "generation/cut": cut / len(responses)}
            registry.log_metrics(run, [(0, share)])
        _warn(alarms.of_answers(equal / len(responses)), iteration, registry)


def assemble_team(params: Params, iteration: int, registry: Registry | None) -> None:
    """The team of iteration t, chosen from the registered checkpoints.

    Reads: the registry (without one, the folder checkpoints/), manifests of the checkpoints before t. Writes:
    teams/<t>.json. Refuses: nobody left to play, a member whose checkpoint or synthetic data is missing.
    """
    from tpaw_core import team

    with workspace.exclusive(f"team@{iteration}"):
        _parent(iteration)
        try:
            chosen = team.assemble(
                candidates(iteration, registry), iteration=iteration, size=params.team.size, exclude=params.team.exclude
            )
        except ValueError as error:
            raise TpawError(
                f"team of iteration {iteration}: {error}; look at team.exclude and the tags in MLflow"
            ) from None
        members = []
        for player in chosen:
            synthetic = workspace.need(
                workspace.synthetic(player.iteration + 1),
                f"make it with `tpaw generate --iteration {player.iteration + 1}`",
            )
            members.append(
                Member(
                    iteration=player.iteration,
                    version=player.version,
                    digest=player.digest,
                    checkpoint=workspace.checkpoint(player.iteration).as_posix(),
                    synthetic=synthetic.as_posix(),
                    synthetic_sha256=workspace.sha256(synthetic),
                )
            )
        players = min(params.team.players or len(members), len(members))
        found = TeamFile(iteration=iteration, policy=params.team.policy, players=players, members=members)
        with workspace.publish(workspace.team(iteration)) as aside:
            aside.write_text(json.dumps(found, indent=2) + "\n")
        print(
            "team: " + ", ".join(f"checkpoint {m['iteration']} (version {m['version']})" for m in members), flush=True
        )


def weigh(params: Params, iteration: int, registry: Registry | None) -> None:
    """Log-probabilities of every (triplet, player) and the player weights beta.

    Reads: teams/<t>.json, its members' checkpoints and synthetic data, the score store. Writes: weights/<t>.parquet;
    adds to the store what was not in it. Refuses: a member that is missing or changed.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tpaw_core import score_store, scoring, weights

    with workspace.exclusive(f"weights@{iteration}"):
        team = read_team(iteration)
        members = team["members"]
        judges, bf16, scored = members[: team["players"]], params.training.bf16, 0
        tokenizer = checkpoint.load_tokenizer(workspace.need(Path(members[0]["checkpoint"]), "restore the checkpoint"))
        encoded = _encoded(params, tokenizer)
        stores = []
        for member in judges:
            folder = Path(member["checkpoint"])
            if checkpoint.verify(folder)["digest"] != member["digest"]:
                raise TpawError(
                    f"{folder}: is not the checkpoint that teams/{iteration}.json names; make the team again"
                )
            stores.append(score_store.ScoreStore(workspace.SCORES, member["digest"], "bfloat16" if bf16 else "float32"))
        # What a player was asked in earlier iterations is asked again first: it is known, or computed as it was then.
        for earlier in range(judges[-1]["iteration"] + 1, iteration + 1):
            team = read_team(earlier)
            pairs = list(zip(encoded.prompts, encoded.chosen, strict=True))
            for opponent in team["members"]:
                answers = read_responses(opponent["synthetic"], encoded.row_ids, opponent["synthetic_sha256"])
                pairs += zip(encoded.prompts, answers, strict=True)
            keys = score_store.keys(pairs)
            columns = []
            for member, store in zip(judges, stores, strict=True):
                if member["digest"] not in [player["digest"] for player in team["members"][: team["players"]]]:
                    continue

                def score(new: list[scoring.Pair], folder: str = member["checkpoint"]) -> Any:
                    model = checkpoint.load_model(folder, dtype="float32")
                    return scoring.batches(model, new, pad_id=tokenizer.pad_token_id, bf16=bf16)

                values, new = store.scores(pairs, score, keys)
                columns.append(values)
                scored += new
        table = np.array(columns).T  # [targets + responses, players]
        rows, players = len(encoded.row_ids), len(judges)
        if len(broken := np.flatnonzero(~np.isfinite(table).all(axis=1))):
            raise Diverged(
                f"weights of iteration {iteration}: a log-probability of prompt {encoded.row_ids[broken[0] % rows]} is "
                "not finite; the checkpoint that gave it is not usable, exclude it with team.exclude"
            )
        chosen = np.tile(table[:rows], (len(members), 1))
        rejected = table[rows:]
        objective = params.objective_at(iteration)
        by_chosen, by_rejected = (np.ones(1), np.ones(1))
        if objective.per_token:
            lengths = np.array([len(response) for _, response in pairs])
            by_chosen, by_rejected = (lengths[:rows].mean() / some for some in np.split(lengths[:, None], [rows]))
            by_chosen = np.tile(by_chosen, (len(members), 1))
        beta = weights.player_weights(
            chosen * by_chosen, rejected * by_rejected, gamma=objective.gamma, scale=objective.lambda_
        )
        out = pa.table(
            {
                "prompt_id": encoded.row_ids * len(members),
                "opponent": [member["digest"] for member in members for _ in range(rows)],
                **{
                    name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), players)
                    for name, values in (("players_chosen", chosen), ("players_rejected", rejected), ("beta", beta))
                },
            }
        )
        with workspace.publish(workspace.weights(iteration)) as aside:
            pq.write_table(out, aside)
        print(f"{len(pairs) * players} (row, player) pairs: {scored} scored now, the others known", flush=True)
        if registry:
            registry.log_metrics(
                registry.iteration(iteration), [(0, {"scoring/new": scored, "scoring/pairs": len(pairs) * players})]
            )


def train(params: Params, iteration: int, registry: Registry | None) -> None:
    """Checkpoint t from checkpoint t-1 and the team's triplets; goes on from its last saved state if it was stopped.

    Reads: checkpoints/<t-1>, teams/<t>.json, weights/<t>.parquet, the team's synthetic data (objective.name=sft: the
    rows alone). Writes: checkpoints/<t>, training/<t>.jsonl. Refuses: inputs that do not belong together, numbers that
    are not finite.
    """
    from tpaw_core import training

    with workspace.exclusive(f"train@{iteration}"):
        folder = _parent(iteration)
        manifest = checkpoint.verify(folder)
        tokenizer = checkpoint.load_tokenizer(folder)
        encoded = _encoded(params, tokenizer)
        objective, settings = params.objective_at(iteration), params.training_at(iteration)
        # What decides the weights is left out: these are read.
        own = objective.model_dump(mode="json", by_alias=True, exclude={"gamma", "player_weighting"})
        deciding = {
            "seed": params.seed,
            "model": {"dtype": params.model.dtype},
            "objective": own,
            "training": settings.model_dump(mode="json"),
        }
        made_from, team = [workspace.TRAIN_ROWS], []
        if objective.name == "sft":
            learn: Any = partial(training.sft, rows=list(zip(encoded.prompts, encoded.chosen, strict=True)))
        else:
            learn = partial(training.self_play, groups=_groups(iteration, encoded, objective), objective=objective)
            made_from.append(workspace.weights(iteration))
            team = [member["digest"] for member in read_team(iteration)["members"]]
        origin = checkpoint.Origin(
            manifest["digest"], team, {path.as_posix(): workspace.sha256(path) for path in made_from}, deciding
        )
        state = workspace.TRAINING_STATE / f"{iteration}-{config.digest(origin)[:16]}"
        model = checkpoint.load_model(folder, dtype="float32")
        with _recorded(registry, iteration) as on_log:
            log = learn(
                model,
                settings=settings,
                pad_id=tokenizer.pad_token_id,
                seed=params.seed + iteration,
                state=state,
                on_log=on_log,
                row_ids=encoded.row_ids,
            )
            _publish(params, iteration, model, tokenizer, log, origin)
            if registry:
                registry.register(iteration)
        _warn(alarms.of_training(log), iteration, registry)
        shutil.rmtree(state, ignore_errors=True)


def evaluate(params: Params, iteration: int, registry: Registry | None) -> None:
    """Benchmarks of checkpoint t.

    Reads: checkpoints/<t>, training/<t>.jsonl, data/heldout.jsonl (and validation.jsonl). Writes: metrics/<t>.json,
    samples/<t>.jsonl. Refuses: an unknown benchmark, a held-out target in which the pattern finds no answer.
    """
    from tpaw_core import evaluation

    with workspace.exclusive(f"evaluate {iteration}"):
        folder = workspace.checkpoint(iteration)
        manifest = checkpoint.verify(folder)
        data.verify()
        results = evaluation.evaluate(
            checkpoint.load_model(folder),
            checkpoint.load_tokenizer(folder),
            {
                task: list(data.read(workspace.DATA / f"{task}.jsonl"))
                for task in evaluation.OWN
                if task in params.evaluation.tasks
            },
            params.evaluation,
            max_length=params.model.max_length,
            seed=params.seed,
        )
        metrics: evaluation.Metrics = {
            "primary": results.primary,
            "benchmarks": results.benchmarks,
            "training": _last_quarter(iteration),
            "checkpoint": manifest["digest"],
            "parent": manifest["parent"],
        }
        kept = results.samples[:20]
        with workspace.publish(workspace.samples(iteration)) as aside:
            aside.write_text(
                "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in kept), encoding="utf-8"
            )
        with workspace.publish(workspace.metrics(iteration)) as aside:
            aside.write_text(json.dumps(metrics, indent=2) + "\n")
        primary = results.primary
        print(
            f"{primary['benchmark']}: {primary['metric']} {primary['value']:.4f} +- {primary['stderr']:.4f}", flush=True
        )
        if registry:
            registry.register(iteration)
            registry.record_evaluation(iteration, metrics, kept)


def report(params: Params, registry: Registry | None) -> None:
    """Table and plots of every checkpoint evaluated so far; brings the registry up to date and ends the run.

    Reads: metrics/, training/. Writes: report/.
    """
    from tpaw_core import report as pages

    with workspace.exclusive("report"):
        with workspace.publish(Path("report")) as aside:
            aside.mkdir()
            pages.write(aside)
        if registry:
            for iteration, metrics in pages.evaluated().items():
                if registry.register(iteration) is not None:
                    registry.record_evaluation(iteration, metrics, pages.samples(iteration))
            registry.log_report(Path("report"))
            registry.finish()


def register(params: Params, registry: Registry | None, *, again: bool = False) -> list[tuple[int, int | None]]:
    """Every checkpoint of the workspace a version of the registered model; gives (iteration, version) pairs."""
    if registry is None:
        raise TpawError("register: needs the registry; `pip install mlflow`")
    folders = [workspace.checkpoint(t) for t in range(len(params.iterations) + 1)]
    return [(int(f.name), registry.register(int(f.name), again=again)) for f in folders if f.exists()]


def read_team(iteration: int) -> TeamFile:
    """teams/<t>.json, checked."""
    again = f"`tpaw team --iteration {iteration}`"
    path = workspace.need(workspace.team(iteration), f"make it with {again}")
    found = records.read(path, TeamFile, f"make it again with {again}")
    good = 1 <= found["players"] <= len(found["members"]) and all(
        m["checkpoint"] == workspace.checkpoint(m["iteration"]).as_posix()
        and m["synthetic"] == workspace.synthetic(m["iteration"] + 1).as_posix()
        for m in found["members"]
    )
    if not good:
        raise TpawError(f"{path}: is damaged; make it again with {again}")
    return found


def candidates(before: int, registry: Registry | None) -> list[Candidate]:
    """The checkpoints before ``before`` that are in the registry, or, without one, in checkpoints/."""
    from tpaw_core.team import Candidate

    there = [t for t in range(before) if workspace.checkpoint(t).exists() or not workspace.pruned(t).exists()]
    if registry:
        return registry.candidates(there)
    return [Candidate(t, t + 1, checkpoint.manifest(workspace.checkpoint(t))["digest"]) for t in there]


def _groups(iteration: int, encoded: EncodedRows, objective: Objective) -> Groups:
    """The team's triplets with their weights, checked to belong together."""
    from tpaw_core.training import Groups

    team = read_team(iteration)
    members = team["members"]
    path = workspace.need(workspace.weights(iteration), f"make it with `tpaw weights --iteration {iteration}`")
    weights = read_weights(path, team["players"])
    opponents = [member["digest"] for member in members for _ in encoded.row_ids]
    if weights.prompt_ids != encoded.row_ids * len(members) or weights.opponents != opponents:
        raise TpawError(f"{path}: does not belong to data/train.jsonl and teams/{iteration}.json; make it again")
    shape = len(members), len(encoded.row_ids), team["players"]  # opponents, rows, players
    return Groups(
        encoded.prompts,
        encoded.chosen,
        [read_responses(member["synthetic"], encoded.row_ids, member["synthetic_sha256"]) for member in members],
        weights.players_chosen.reshape(shape)[0],
        weights.players_rejected.reshape(shape),
        weights.beta.reshape(shape),
        first=read_responses(workspace.synthetic(1), encoded.row_ids) if objective.name == "tspin" else None,
        drop_equal=objective.drop_equal,
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file where its bytes are not what they should be."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        raise TpawError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {records.RESTORE}") from None


def _parent(iteration: int) -> Path:
    folder = workspace.checkpoint(iteration - 1)
    if not folder.exists():
        how = "tpaw sft" if iteration == 1 else f"tpaw train --iteration {iteration - 1}"
        raise TpawError(f"{folder}: does not exist, and iteration {iteration} starts from it; make it with `{how}`")
    return folder


def _encoded(params: Params, tokenizer: Any, rows: Iterable[data.Row] | None = None) -> EncodedRows:
    """``rows``, by default those that play, as ids."""
    from tpaw_core import template

    data.verify()
    return template.encode(
        _playing(params) if rows is None else rows,
        tokenizer,
        max_length=params.model.max_length,
        max_skipped=params.data.max_skipped,
        name=str(workspace.TRAIN_ROWS),
    )


def _playing(params: Params) -> Iterable[data.Row]:
    return islice(data.read(workspace.TRAIN_ROWS), params.data.max_self_play_rows)


def _write_synthetic(
    path: Path,
    iteration: int,
    opponent: str,
    rows: Iterable[data.Row],
    encoded: EncodedRows,
    responses: Sequence[Response],
    tokenizer: Any,
) -> None:
    """synthetic/<t>.parquet, some rows at a time: the texts are read from the file once more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "prompt_id": pa.string(),
            "iteration": pa.int64(),
            "opponent": pa.string(),
            "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
            "chosen": pa.string(),
            "rejected": pa.string(),
            "rejected_ids": pa.list_(pa.int32()),
            "finish_reason": pa.string(),
        }
    )
    kept = set(encoded.row_ids)  # a prompt without room for an answer has none
    answered = zip((row for row in rows if row.prompt_id in kept), responses, strict=True)
    with pq.ParquetWriter(path, schema) as file:
        while some := list(islice(answered, ROWS_AT_A_TIME)):
            ids = [list(r.ids) for _, r in some]
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            columns = zip(
                *(
                    (row.prompt_id, iteration, opponent, row.prompt, row.completion, text, own, r.finish_reason)
                    for (row, r), text, own in zip(some, texts, ids, strict=True)
                ),
                strict=True,
            )
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            file.write_batch(pa.record_batch(arrays, schema=schema))


def read_responses(path: str | Path, row_ids: list[str], sha256: str | None = None) -> Ragged:
    """The ids that an opponent generated, in the order of the training rows; ``sha256``: the file's, as it must be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = workspace.need(Path(path), records.RESTORE)
    if sha256 is not None and workspace.sha256(path) != sha256:
        raise TpawError(f"{path}: has changed since the team was made; restore it with `dvc checkout --force {path}`")
    with _readable(path):
        table = pq.read_table(path, columns=["prompt_id", "rejected_ids"]).combine_chunks()
        ids = table["rejected_ids"].combine_chunks()
        if ids.null_count or not pa.types.is_list(ids.type) or not pa.types.is_integer(ids.type.value_type):
            raise ValueError("rejected_ids is not a list of token ids in every row")
        found = Ragged.of(ids.values.to_numpy(), ids.offsets.to_numpy())
        names = table["prompt_id"].cast(pa.string()).to_pylist()
    if names == row_ids:
        return found
    place = {name: number for number, name in enumerate(names)}
    missing = [name for name in row_ids if name not in place]
    if missing:
        raise TpawError(f"{path}: lacks {len(missing)} rows of data/train.jsonl, the first {missing[0]}; make it again")
    return Ragged(found[place[name]] for name in row_ids)


def read_weights(path: Path, players: int) -> Weights:
    """The log-probabilities and weights of triplets; raises TpawError where they are not one finite number a player."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = []
    with _readable(path):
        table = pq.read_table(path, columns=["prompt_id", "opponent", "players_chosen", "players_rejected", "beta"])
        for name in ("players_chosen", "players_rejected", "beta"):
            column = table[name].combine_chunks()
            sound = pa.types.is_fixed_size_list(column.type) and pa.types.is_float64(column.type.value_type)
            if not sound or column.type.list_size != players or column.null_count:
                raise ValueError(f"{name} is not one number for each of {players} players")
            numbers = column.flatten().to_numpy()  # raises where one is null
            if not np.isfinite(numbers).all():
                raise ValueError(f"{name} is not finite in every row")
            values.append(numbers.reshape(-1, players))
        return Weights(table["prompt_id"].to_pylist(), table["opponent"].to_pylist(), *values)


def _publish(
    params: Params,
    iteration: int,
    model: Any,
    tokenizer: Any,
    log: list[dict[str, float]],
    origin: checkpoint.Origin,
) -> None:
    """The checkpoint and its training log, in place only when complete."""
    import torch

    dtype = params.model.dtype
    if dtype == "auto":  # as the model came: training itself runs in float32
        dtype = "bfloat16" if params.training.bf16 else "float32"
    with workspace.publish(workspace.training_log(iteration)) as aside:
        aside.write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in log))
    with workspace.publish(workspace.checkpoint(iteration)) as aside:
        model.to(getattr(torch, dtype)).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        checkpoint.seal(aside, iteration, origin)
    workspace.pruned(iteration).unlink(missing_ok=True)


def _last_quarter(iteration: int) -> dict[str, float]:
    """Means over the last quarter of the training log: where the iteration ended, not how it got there."""
    entries = records.lines(workspace.training_log(iteration))
    entries = entries[-max(1, len(entries) // 4) :]
    names = sorted({name for entry in entries for name in entry} - {"step", "epoch", "learning_rate"})
    return {
        name.replace("weights/", "").replace("/", "_"): sum(e[name] for e in entries) / len(entries) for name in names
    }


def _warn(warning: str | None, iteration: int, registry: Registry | None) -> None:
    if warning is None:
        return
    print(f"warning: iteration {iteration}: {warning}", flush=True)
    if registry:
        registry.warn(iteration, warning)


def open_registry(params: Params) -> Registry | None:
    """MLflow; None where it is not installed, as on a bare machine that only trains."""
    try:
        from tpaw_core.registry import Registry
    except ImportError as error:
        # "mlflow.entities" where a folder mlflow/ in the current one passes for the package.
        if (error.name or "").split(".")[0] != "mlflow":
            raise
        print("mlflow is not installed: this stage is not recorded", file=sys.stderr, flush=True)
        return None
    return Registry(params)


@contextmanager
def _recorded(registry: Registry | None, iteration: int) -> Iterator[OnLog]:
    """An ``on_log`` that sends training metrics to the iteration's run a few entries at a time."""
    if registry is None:
        yield lambda step, metrics: None
        return
    run = registry.iteration(iteration)
    waiting: list[tuple[int, dict[str, float]]] = []

    def flush() -> None:
        registry.log_metrics(run, waiting)
        waiting.clear()

    def on_log(step: int, metrics: dict[str, float]) -> None:
        waiting.append((step, metrics))
        if len(waiting) >= 10:
            flush()

    yield on_log
    flush()
