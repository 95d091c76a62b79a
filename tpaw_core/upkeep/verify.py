"""Whether a workspace is consistent: everything that one file records about another.

Reads everything and changes nothing. A disagreement is one line that names the file and what to do; a note is one that
needs no action.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_core.artifacts import checkpoint, code
from tpaw_core.artifacts.encoded import AGAIN, read_encoded, read_encoding
from tpaw_core.artifacts.metrics import read_metrics
from tpaw_core.artifacts.parquet import opened
from tpaw_core.artifacts.team import read_team
from tpaw_core.artifacts.weights import read_weights
from tpaw_core.data import prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.errors import TpawError
from tpaw_core.stages import members
from tpaw_core.stages.context import Context
from tpaw_core.workspace import files, records
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    from tpaw_core.tracking.registry import Registry


@dataclass
class Findings:
    """What was looked at, by kind, what disagrees, and what is worth knowing."""

    workspace: Workspace
    checked: Counter[str] = field(default_factory=Counter)
    disagreements: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, kind: str, path: Path, remedy: str = records.RESTORE) -> Iterator[None]:
        """Look at one file; what the block raises is the disagreement. ``remedy``: where a library cannot read it."""
        self.checked[kind] += 1
        try:
            yield
        except TpawError as error:
            self.disagreements.append(str(error))
        except Exception as error:  # a broken file makes libraries raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.disagreements.append(f"{path}: cannot be read ({reason}); {remedy}")


def check(context: Context) -> Findings:
    """Look at all of a workspace; of a pruned checkpoint the manifest counts."""
    context = replace(context, workspace=replace(context.workspace, remembers=False))
    found = Findings(context.workspace)
    _rows(found)
    _encoded(found)
    _checkpoints(found)
    _bases(found, context)
    _synthetic(found)
    _teams(found)
    _weights(found)
    _records(found)
    _scores(found)
    _outputs(found)
    if context.registry is not None:
        _versions(found, context.registry)
    return found


def _rows(found: Findings) -> None:
    if found.workspace.data.exists():
        with found.of("datasets", found.workspace.data):
            prepare.verify(found.workspace, must_exist=True)


def _encoded(found: Findings) -> None:
    """Readable, and of the rows in data/."""
    workspace = found.workspace
    if not workspace.tokenizer.parent.exists():
        return
    with found.of("encoded files", workspace.tokenizer, AGAIN):
        read_encoding(workspace)
        checkpoint.load_tokenizer(workspace.tokenizer)
    for name in ("train", "heldout", "validation"):
        path, rows = workspace.encoded(name), workspace.data / f"{name}.jsonl"
        with found.of("encoded files", path, AGAIN):
            encoded = read_encoded(workspace, name)
            ids = [row.prompt_id for row in read_rows(rows)] if encoded.row_ids else []
            same = encoded.row_ids == [ids[place] for place in encoded.places if place < len(ids)]
            _expect(same, f"{path}: its rows do not match {rows}; {AGAIN}")


def _checkpoints(found: Findings) -> None:
    workspace, sha256 = found.workspace, cache(files.sha256)  # all checkpoints name the same rows
    for iteration in workspace.iterations("checkpoints"):
        folder = workspace.checkpoint(iteration)
        with found.of("checkpoints", folder):
            manifest = checkpoint.verify(workspace, iteration)
            recorded = manifest.iteration
            _expect(recorded == iteration, f"{folder}: its manifest belongs to checkpoint {recorded}")
            parent = _digest(workspace, iteration - 1)
            _expect(
                manifest.parent == parent or parent is None,
                f"{folder}: was not trained from the current checkpoints/{iteration - 1}; run `dvc repro`",
            )
            for name, sha in manifest.made_from.items():
                path = workspace.place(name)
                if name.startswith(("data/", "encoded/", "weights/")) and path.is_file():
                    _expect(
                        sha256(path) == sha,
                        f"{folder}: was made from a different version of {path}; run `dvc repro`",
                    )
            if parts := code.changed(manifest.code):
                stage = f"train@{iteration}" if iteration else "sft"
                found.notes.append(
                    f"{folder}: was made by a different version of the code ({', '.join(parts)}); "
                    f"`dvc repro --force --single-item {stage}` reruns it"
                )


def _bases(found: Findings, context: Context) -> None:
    """Of adapters: still where it can be found, and unchanged."""
    workspace = found.workspace
    manifests = [
        checkpoint.manifest(workspace, t) for t in workspace.iterations("checkpoints") if _digest(workspace, t)
    ]
    for base in {m.base.digest: m.base for m in manifests if m.base is not None}.values():
        with found.of("bases", Path(base.source)):
            members.place(context, base)


def _synthetic(found: Findings) -> None:
    workspace = found.workspace
    columns = ("iteration", "opponent", "rejected_ids", "prompt_id", "chosen")
    targets: dict[str, str] | None = None  # the texts may be more than memory holds
    for iteration in workspace.iterations("synthetic"):
        path = workspace.synthetic(iteration)
        with found.of("synthetic datasets", path):
            if targets is None:
                targets = {row.prompt_id: files.digest(row.completion) for row in read_rows(workspace.train_rows)}
            opponent = _digest(workspace, iteration - 1)
            with opened(path, columns) as (_, batches):
                for batch in batches:
                    iterations, opponents, answers, row_ids, chosen = (batch[name] for name in columns)
                    _expect(
                        set(iterations.to_pylist()) == {iteration}, f"{path}: does not belong to iteration {iteration}"
                    )
                    _expect(
                        opponent is None or set(opponents.to_pylist()) == {opponent},
                        f"{path}: its answers were not generated by the current checkpoints/{iteration - 1}; "
                        f"run `dvc repro generate@{iteration}`",
                    )
                    for row_id, target in zip(row_ids.to_pylist(), chosen.to_pylist(), strict=True):
                        same = targets.get(row_id) == files.digest(target)
                        _expect(same, f"{path}: prompt {row_id} differs from {workspace.train_rows}")
                    _expect(not answers.null_count, f"{path}: has a row without token ids")


def _teams(found: Findings) -> None:
    workspace = found.workspace
    for iteration in workspace.iterations("teams"):
        path = workspace.team(iteration)
        with found.of("teams", path):
            remedy = f"run `dvc repro team@{iteration}`"
            team = read_team(workspace, iteration)
            _expect(team.iteration == iteration, f"{path}: belongs to iteration {team.iteration}; {remedy}")
            for member in team.members:
                same = _digest(workspace, member.iteration) == member.digest
                _expect(same, f"{path}: {member.checkpoint} has changed since the team was chosen; {remedy}")
                synthetic = files.need(workspace.place(member.synthetic), "restore it with `dvc checkout`")
                _expect(
                    files.sha256(synthetic) == member.synthetic_sha256,
                    f"{path}: {synthetic} has changed since the team was made; {remedy}",
                )


def _weights(found: Findings) -> None:
    import numpy as np

    workspace = found.workspace
    for iteration in workspace.iterations("weights"):
        path = workspace.weights(iteration)
        with found.of("weights", path):
            remedy = f"run `dvc repro --force --single-item weights@{iteration}`"
            team = read_team(workspace, iteration)
            weights = read_weights(path, team.players)
            rows = len(weights.prompt_ids) // len(team.members)
            opponents = [member.digest for member in team.members for _ in range(rows)]
            _expect(
                weights.opponents == opponents,
                f"{path}: was not computed for the current teams/{iteration}.json; {remedy}",
            )
            sums = weights.beta.sum(axis=1)
            _expect(bool(np.allclose(sums, 1, atol=1e-9)), f"{path}: weights of a row do not add up to 1; {remedy}")
            logps = np.maximum(weights.players_chosen, weights.players_rejected)
            _expect(bool((logps <= 0).all()), f"{path}: has a log-probability above 0; {remedy}")


def _records(found: Findings) -> None:
    workspace = found.workspace
    for kind, place in (("training", workspace.training_log), ("samples", workspace.samples)):
        for iteration in workspace.iterations(kind):
            path = place(iteration)
            with found.of("logs", path):
                for number, entry in enumerate(records.lines(path), 1):
                    figures = [value for value in entry.values() if isinstance(value, float)]
                    _expect(all(map(math.isfinite, figures)), f"{path}, line {number}: has a number that is not finite")
    for iteration in workspace.iterations("metrics"):
        path = workspace.metrics(iteration)
        with found.of("metrics", path):
            own = _digest(workspace, iteration)
            metrics = read_metrics(workspace, iteration)
            _expect(
                own is None or metrics.checkpoint == own,
                f"{path}: was not measured on the current checkpoints/{iteration}; run `dvc repro`",
            )


def _scores(found: Findings) -> None:
    import numpy as np

    from tpaw_core.artifacts import score_store

    for path in sorted(found.workspace.scores.glob("*/*/*/*.npy")):
        with found.of("files of scores", path):
            logps = score_store.read(path)["logp"]
            _expect(
                bool((np.isfinite(logps) & (logps <= 0)).all()),
                f"{path}: has a score that is not a log-probability; delete its folder: its rows will be scored again",
            )


def _outputs(found: Findings) -> None:
    """The digests in dvc.lock and data.dvc, and those of the objects in DVC's cache."""
    workspace = found.workspace
    if not (workspace.root / ".dvc").is_dir():
        return
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB

    lock = workspace.root / "dvc.lock"
    remedy = "delete it, and `dvc repro` restores finished stages from its cache"
    with found.of("outputs in dvc.lock", lock, remedy), Repo(str(workspace.root)) as repo:
        for out in repo.index.outs:
            if not out.hash_info:
                continue
            path = workspace.root / Path(out.fs_path).relative_to(repo.root_dir)
            pruned = path.parent.name == "checkpoints" and workspace.pruned(int(path.name)).exists()
            if pruned and not path.exists():
                continue
            with found.of("outputs in dvc.lock", path):
                files.need(path, f"restore it with `dvc checkout {path}`")
                store = HashFileDB(out.fs, str(workspace.state))  # without DVC's memory of earlier sums
                _, _, made = build(store, out.fs_path, out.fs, "md5", dry_run=True)
                # What is in the folder now may be in no cache: no advice may delete it.
                differs = f"{path}: does not match {lock}; move it away, then run `dvc checkout {path}` or `dvc repro`"
                if path == workspace.data:
                    differs = (
                        f"{path}: does not match data.dvc; if its rows are correct, record them with `dvc add {path}`"
                    )
                _expect(made.hash_info == out.hash_info, differs)
        for path in sorted(Path(repo.cache.local.path).glob("??/*")):
            with found.of("objects in DVC's cache", path):
                with path.open("rb") as file:
                    md5 = hashlib.file_digest(file, "md5").hexdigest()
                _expect(
                    path.parent.name + path.name.removesuffix(".dir") == md5,
                    f"{path}: is damaged; move it away, then run `dvc commit` or `dvc pull`",
                )


def _versions(found: Findings, registry: Registry) -> None:
    workspace = found.workspace
    for iteration in workspace.iterations("checkpoints"):
        folder = workspace.checkpoint(iteration)
        with found.of("versions in the registry", folder):
            registry.check(iteration)


def _digest(workspace: Workspace, iteration: int) -> str | None:
    """The digest of a checkpoint by its manifest; None where there is no readable one."""
    try:
        return checkpoint.manifest(workspace, iteration).digest if iteration >= 0 else None
    except TpawError:
        return None


def _expect(true: Any, message: str) -> None:
    if not true:
        raise TpawError(message)
