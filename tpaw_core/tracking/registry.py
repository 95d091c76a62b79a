"""The registered model: one version per checkpoint, with aliases, vetoes and deletions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.metrics import Metrics
from tpaw_core.config.params import Params
from tpaw_core.errors import TpawError
from tpaw_core.method.team import Candidate
from tpaw_core.tracking import ledger
from tpaw_core.tracking.client import tracking_uri
from tpaw_core.tracking.runs import Runs
from tpaw_core.workspace import files
from tpaw_core.workspace.files import Deletion
from tpaw_core.workspace.paths import Workspace

MODEL = "tpaw-policy"
NEWEST, CHAMPION = "newest", "champion"  # MLflow reserves "latest" for its own models:/NAME/latest
logger = logging.getLogger(__name__)
HOLDER = "workspace."  # a version's tag for each workspace that has this checkpoint


class Registry:
    """One workspace's view of the registered model; its runs are in ``runs``."""

    def __init__(self, workspace: Workspace, params: Params) -> None:
        self.workspace, self.params = workspace, params
        self.runs = Runs(workspace, params)

    @property
    def client(self) -> MlflowClient:
        return self.runs.client

    def register(self, iteration: int, *, again: bool = False) -> int | None:
        """Make sure that checkpoint ``iteration`` is a version of tpaw-policy. Returns its number.

        None where it was registered before and that version has been deleted since; ``again`` brings it back.
        """
        folder = self.workspace.checkpoint(iteration)
        manifest = checkpoint.manifest(self.workspace, iteration)
        known = ledger.read(self.workspace).get(self.runs.server, {})
        versions = {v.tags.get("digest"): v for v in self._versions()}
        if manifest.digest not in versions:
            if manifest.digest in known and not again:
                return None
            checkpoint.verify(self.workspace, iteration)
            run = self.runs.iteration_run(iteration)
            run_id = run.info.run_id
            self.client.log_artifacts(run_id, str(folder), "model")
            versions[manifest.digest] = version = self.client.create_model_version(
                MODEL,
                source=f"runs:/{run_id}/model",
                run_id=run_id,
                tags={
                    "iteration": str(iteration),
                    "digest": manifest.digest,
                    "parent": manifest.parent or "",
                    **({"base": manifest.base.digest} if manifest.base else {}),
                    "recipe": self.params.recipe,
                    "run": run.data.tags.get("mlflow.parentRunId", run_id),
                },
                description=f"Checkpoint {iteration} of recipe {self.params.recipe}.",
            )
            versions[manifest.digest] = version = self._first(version)
            self.client.set_registered_model_alias(MODEL, NEWEST, str(version.version))
        number = int(versions[manifest.digest].version)
        if known.get(manifest.digest) != number:
            self.client.set_model_version_tag(MODEL, str(number), self._holder, "")
            ledger.add(self.workspace, self.runs.server, manifest.digest, number)
        return number

    def _first(self, version: Any) -> Any:
        """Of two workspaces that register equal checkpoints at the same moment, the later one joins the earlier."""
        twins = [v for v in self._versions() if v.tags.get("digest") == version.tags["digest"]]
        first = min(twins, key=lambda v: int(v.version))
        if first.version != version.version:
            self.client.delete_model_version(MODEL, version.version)
        return first

    def check(self, iteration: int) -> None:
        """Compare checkpoint ``iteration`` with its version: one, of this parent, with the same files.

        Files that another machine serves are compared by name and size.
        Raises TpawError where they disagree.
        """
        folder = self.workspace.checkpoint(iteration)
        manifest = checkpoint.manifest(self.workspace, iteration)
        own = [v for v in self._versions() if v.tags.get("digest") == manifest.digest]
        if not own:
            if manifest.digest in ledger.read(self.workspace).get(self.runs.server, {}):
                return  # it has been deleted
            raise TpawError(f"{folder}: is not registered as a version of {MODEL}; run `tpaw register`")
        name = f"{folder}: version {own[0].version} of {MODEL}"
        if len(own) > 1:
            raise TpawError(f"{folder}: is registered {len(own)} times; delete all but one of its versions in MLflow")
        again = "delete this version in MLflow, then run `tpaw register --again`"
        tags = own[0].tags
        if (tags.get("parent", ""), tags.get("iteration")) != (manifest.parent or "", str(iteration)):
            raise TpawError(f"{name} has tags that do not match the checkpoint's manifest; {again}")
        kept = urlparse(f"{self.client.get_run(own[0].run_id).info.artifact_uri}/model")
        if kept.scheme in ("", "file"):
            differs = next(
                (file for file, sha in manifest.files.items() if _sum(Path(unquote(kept.path)) / file) != sha), None
            )
        else:
            sizes = {Path(a.path).name: a.file_size for a in self.client.list_artifacts(own[0].run_id, "model")}
            differs = next((f for f in manifest.files if sizes.get(f) != (folder / f).stat().st_size), None)
        if differs is not None:
            raise TpawError(f"{name}: its {differs} in MLflow is missing or damaged; {again}")

    def record_evaluation(self, iteration: int, metrics: Metrics, samples: Sequence[Mapping[str, Any]]) -> None:
        """The benchmark figures and a table of samples into the iteration's run; the alias `champion` to the best."""
        self.runs.reopen()
        run_id = self.runs.iteration_run(iteration).info.run_id
        figures = {
            f"eval/{task}/{name.split(',')[0]}": float(value)
            for task, values in metrics.benchmarks.items()
            for name, value in values.items()
        }
        figures["eval/primary"] = metrics.primary.value
        self.client.log_batch(run_id, [Metric(name, value, 0, iteration) for name, value in figures.items()])
        headline = {"eval/primary": metrics.primary.value}
        headline |= {f"iterations/{name}": value for name, value in metrics.training.items()}
        self.runs.log_metrics(self.runs.workspace_run(), [(iteration, headline)])
        if samples:
            columns = {name: [sample[name] for sample in samples] for name in samples[0]}
            table = "samples.json"
            if not any(a.path == table for a in self.client.list_artifacts(run_id)):
                self.client.log_table(run_id, {"iteration": [iteration] * len(samples), **columns}, table)
        digest = checkpoint.manifest(self.workspace, iteration).digest
        for version in self._versions():
            if version.tags.get("digest") == digest:
                self.client.set_model_version_tag(MODEL, version.version, "primary", f"{metrics.primary.value:.6f}")
        self.client.set_terminated(run_id)
        self._crown()

    def _crown(self) -> None:
        """CHAMPION: the best evaluated version of this recipe."""
        scored = [v for v in self._versions() if v.tags.get("recipe") == self.params.recipe and "primary" in v.tags]
        if scored:
            best = max(scored, key=lambda v: (float(v.tags["primary"]), -int(v.version)))
            self.client.set_registered_model_alias(MODEL, CHAMPION, str(best.version))

    def candidates(self, iterations: Sequence[int]) -> list[Candidate]:
        """Those of these checkpoints of the workspace that are registered.

        Checkpoints that were never registered are registered first; a deleted version is not a candidate.
        """
        client, found = self.client, []  # a server that does not answer is reported before a checkpoint is looked at
        for iteration in iterations:
            number = self.register(iteration)
            digest = checkpoint.manifest(self.workspace, iteration).digest
            if number is None:
                logger.info(
                    "checkpoint %d: its version was deleted from %s, so it is left out of the team", iteration, MODEL
                )
                continue
            tags = client.get_model_version(MODEL, str(number)).tags
            found.append(Candidate(iteration, number, digest, vetoed=tags.get("team_member", "").lower() == "false"))
        return found

    def aliased(self) -> set[str]:
        """Digests of the versions that an alias names."""
        named = {str(number) for number in self._model().aliases.values()}
        return {v.tags["digest"] for v in self._versions() if str(v.version) in named and "digest" in v.tags}

    def deletions(self, kept: Collection[str]) -> list[Deletion]:
        """Versions that only this workspace holds, and their files, except these digests and what an alias names."""
        spared = {*kept, *self.aliased()}
        own = []
        for version in self._versions():
            if version.tags.get("digest") in spared:
                continue
            if [name for name in version.tags if name.startswith(HOLDER)] == [self._holder]:
                size = sum(file.file_size or 0 for file in self.client.list_artifacts(version.run_id, "model"))
                what = f"version {version.version} of {MODEL} and its files, checkpoint {version.tags['iteration']}"
                own.append(Deletion(what, size, partial(self._delete, version)))
        return own

    def _delete(self, version: Any) -> None:
        """The files first: what is left of a version whose deletion was stopped is found again."""
        root = self.client.get_run(version.run_id).info.artifact_uri
        get_artifact_repository(root, tracking_uri=tracking_uri(self.workspace)).delete_artifacts("model")
        self.client.delete_model_version(MODEL, version.version)

    def run_of(self, digest: str) -> str | None:
        """The run that made the checkpoint with this digest."""
        return next((v.run_id for v in self._versions() if v.tags.get("digest") == digest), None)

    @property
    def _holder(self) -> str:
        return HOLDER + ledger.workspace_id(self.workspace)

    def _model(self) -> Any:
        try:
            return self.client.get_registered_model(MODEL)
        except MlflowException:
            about = "Policies made by tpaw, one version per checkpoint."
            return self.client.create_registered_model(MODEL, description=about)

    def _versions(self) -> list[Any]:
        self._model()
        return list(self.client.search_model_versions(f"name = '{MODEL}'", max_results=10000))


def _sum(path: Path) -> str | None:
    return files.sha256(path) if path.is_file() else None
