"""MLflow: runs, metrics and checkpoint versions, and from them the candidates for a team.

Everything here may be done twice with the same result: a run is found again by its tags, a version by its digest.
Knows MLflow; must not know torch or the flow.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow import MlflowClient
from tpaw_core import checkpoint, config, records, workspace
from tpaw_core.config import Params
from tpaw_core.errors import TpawError, Unavailable
from tpaw_core.team import Candidate
from tpaw_core.workspace import Removal

EXPERIMENT = "tpaw"
UNFINISHED = "attributes.status != 'FINISHED'"
MODEL = "tpaw-policy"
NEWEST, CHAMPION = "newest", "champion"  # MLflow reserves "latest" for its own models:/NAME/latest
HOLDER = "workspace."  # a version's tag for each workspace that has this checkpoint
LOCAL = workspace.STATE / "mlflow"
WORKSPACE_ID = workspace.STATE / "workspace"
LEDGER = workspace.STATE / "registered.json"  # server -> digest -> version: tells a deleted version from one never made


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the local database that `tpaw up` serves."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(LOCAL / 'mlflow.db').resolve()}"


def connect(name: str) -> tuple[MlflowClient, Experiment]:
    """A client of the tracking server, and the experiment of this name.

    Raises Unavailable where no server answers, TpawError where it refuses.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        _answering(uri)
    else:
        LOCAL.mkdir(parents=True, exist_ok=True)
    try:
        client = MlflowClient(uri)
        return client, _experiment(client, name, uri)
    except MlflowException as error:
        raise TpawError(
            f"MLFLOW_TRACKING_URI {uri}: {str(error).splitlines()[0]}; look at the server's log, and at "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where it asks for them"
        ) from None


def _experiment(client: MlflowClient, name: str, uri: str) -> Experiment:
    location = None if uri.startswith("http") else (LOCAL / "artifacts").resolve().as_uri()
    kind = {"mlflow.experimentKind": "custom_model_development"}
    for _ in range(2):
        if found := client.get_experiment_by_name(name):
            return found
        with contextlib.suppress(MlflowException):  # somebody else may make it just now
            client.create_experiment(name, location, kind)
    raise TpawError(f"MLflow at {uri}: the experiment {name!r} can be neither found nor made; was it deleted?")


class Registry:
    """One workspace's view of MLflow; it connects when it is first used, after a stage has checked its inputs."""

    def __init__(self, params: Params) -> None:
        self.params = params

    @cached_property
    def _key(self) -> dict[str, str]:
        return {"tpaw.workspace": _workspace_id(), "tpaw.params": self.params.digest(), "tpaw.kind": "run"}

    @cached_property
    def _connected(self) -> tuple[MlflowClient, Experiment]:
        return connect(EXPERIMENT)

    @property
    def client(self) -> MlflowClient:
        return self._connected[0]

    @property
    def experiment(self) -> str:
        return self._connected[1].experiment_id

    @property
    def _server(self) -> str:
        """Tells one server's versions from another's."""
        found = self._connected[1]
        return f"{found.experiment_id}-{found.creation_time}"

    # Runs -----------------------------------------------------------------------------------------------------------

    def parent(self) -> Run:
        """The unfinished run of this workspace and these params, or a new one: a continued flow continues its run."""
        session = os.environ.get("TPAW_SESSION", "")
        if unfinished := self._find(self._key, UNFINISHED):
            if session:
                self.client.set_tag(unfinished.info.run_id, "prefect.flow_run_id", session)
            return unfinished
        tags = {**self._key, "tpaw.recipe": self.params.recipe, **({"prefect.flow_run_id": session} if session else {})}
        run = self.client.create_run(self.experiment, tags=tags, run_name=self.params.recipe)
        self._log_params(run, config.flat(self.params.model_dump(by_alias=True, exclude_none=True)))
        return run

    def _reopen(self) -> None:
        """Go on with the last run of this workspace and these params where it has ended: a report belongs to it."""
        if self._find(self._key, UNFINISHED) is None and (ended := self._find(self._key)):
            self.client.update_run(ended.info.run_id, status="RUNNING")

    def iteration(self, iteration: int) -> Run:
        """The run of one iteration, under the parent."""
        parent = self.parent()
        key = {"mlflow.parentRunId": parent.info.run_id, "tpaw.iteration": str(iteration)}
        if found := self._find(key):
            return found
        name = "sft" if iteration == 0 else f"iteration {iteration}"
        tags = {**key, "tpaw.recipe": self.params.recipe, "tpaw.kind": "iteration"}
        run = self.client.create_run(self.experiment, tags=tags, run_name=name)
        if iteration > 0:
            settings = {
                **self.params.objective_at(iteration).model_dump(by_alias=True),
                **self.params.training_at(iteration).model_dump(),
            }
            self._log_params(run, settings)
        return run

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the workspace's run under these params, if one is going on; gives its id."""
        run = self._find(self._key, UNFINISHED)
        if run is None:
            return None
        for child in self.client.search_runs(
            [self.experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and {UNFINISHED}"
        ):
            self.client.set_terminated(child.info.run_id, status)
        self.client.set_terminated(run.info.run_id, status)
        return run.info.run_id

    def _find(self, tags: Mapping[str, str], also: str = "") -> Run | None:
        query = " and ".join(
            [*(f"tags.`{name}` = '{value}'" for name, value in tags.items()), *([also] if also else [])]
        )
        runs = self.client.search_runs([self.experiment], query, order_by=["attributes.start_time DESC"], max_results=1)
        return runs[0] if runs else None

    # What is logged -------------------------------------------------------------------------------------------------

    def _log_params(self, run: Run, params: Mapping[str, Any]) -> None:
        self.client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def log_metrics(self, run: Run, entries: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(step, metrics) entries in batches."""
        metrics = [Metric(name, float(value), 0, step) for step, values in entries for name, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])

    def log_dataset(self, run: Run, path: Path, rows: int, context: str) -> None:
        """A data set as an input of the run, with its digest."""
        dataset = Dataset(
            name=path.as_posix(),
            digest=workspace.sha256(path)[:16],
            source_type="local",
            source=json.dumps({"uri": path.as_posix()}),
            profile=json.dumps({"num_rows": rows}),
        )
        self.client.log_inputs(run.info.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def warn(self, iteration: int, warning: str) -> None:
        """A tag on the runs of the iteration and of the whole, where the UI shows it beside the figures."""
        self.client.set_tag(self.iteration(iteration).info.run_id, "tpaw.warning", warning)
        self.client.set_tag(self.parent().info.run_id, f"tpaw.warning.{iteration}", warning)

    # Versions -------------------------------------------------------------------------------------------------------

    def register(self, iteration: int, *, again: bool = False) -> int | None:
        """Make sure that checkpoint ``iteration`` is a version of tpaw-policy; gives its number.

        None where it was registered before and somebody has deleted that version since; ``again`` brings it back.
        """
        folder = workspace.checkpoint(iteration)
        manifest = checkpoint.manifest(folder)
        ledger = _ledgers().get(self._server, {})
        versions = {v.tags.get("digest"): v for v in self._versions()}
        if manifest["digest"] not in versions:
            if manifest["digest"] in ledger and not again:
                return None
            checkpoint.verify(folder)
            run = self.iteration(iteration)
            run_id = run.info.run_id
            self.client.log_artifacts(run_id, str(folder), "model")
            versions[manifest["digest"]] = version = self.client.create_model_version(
                MODEL,
                source=f"runs:/{run_id}/model",
                run_id=run_id,
                tags={
                    "iteration": str(iteration),
                    "digest": manifest["digest"],
                    "parent": manifest["parent"] or "",
                    "recipe": self.params.recipe,
                    "run": run.data.tags.get("mlflow.parentRunId", run_id),
                },
                description=f"Checkpoint {iteration} of recipe {self.params.recipe}.",
            )
            versions[manifest["digest"]] = version = self._first(version)
            self.client.set_registered_model_alias(MODEL, NEWEST, str(version.version))
        number = int(versions[manifest["digest"]].version)
        if ledger.get(manifest["digest"]) != number:
            self.client.set_model_version_tag(MODEL, str(number), _holder(), "")
            everywhere = _ledgers()
            everywhere[self._server] = {**ledger, manifest["digest"]: number}
            with workspace.publish(LEDGER) as aside:
                aside.write_text(json.dumps(everywhere, indent=1))
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
        folder = workspace.checkpoint(iteration)
        manifest = checkpoint.manifest(folder)
        own = [v for v in self._versions() if v.tags.get("digest") == manifest["digest"]]
        if not own:
            if manifest["digest"] in _ledgers().get(self._server, {}):
                return  # somebody has deleted it
            raise TpawError(f"{folder}: is no version of {MODEL}; run `tpaw register`")
        name = f"{folder}: version {own[0].version} of {MODEL}"
        if len(own) > 1:
            raise TpawError(f"{folder}: is registered {len(own)} times; delete all but one of its versions in MLflow")
        if own[0].tags.get("parent", "") != (manifest["parent"] or "") or own[0].tags.get("iteration") != str(
            iteration
        ):
            raise TpawError(
                f"{name} has other tags than its manifest; delete it in MLflow, then `tpaw register --again`"
            )
        kept = urlparse(f"{self.client.get_run(own[0].run_id).info.artifact_uri}/model")
        if kept.scheme in ("", "file"):
            differs = next(
                (file for file, sha in manifest["files"].items() if _sum(Path(unquote(kept.path)) / file) != sha), None
            )
        else:
            sizes = {Path(a.path).name: a.file_size for a in self.client.list_artifacts(own[0].run_id, "model")}
            differs = next((f for f in manifest["files"] if sizes.get(f) != (folder / f).stat().st_size), None)
        if differs is not None:
            raise TpawError(
                f"{name}: its {differs} in MLflow is missing or damaged; delete it, then `tpaw register --again`"
            )

    def record_evaluation(
        self, iteration: int, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """The benchmark figures and a table of samples into the iteration's run; the alias `champion` to the best."""
        self._reopen()
        run_id = self.iteration(iteration).info.run_id
        figures = {
            f"eval/{task}/{name.split(',')[0]}": float(value)
            for task, values in metrics["benchmarks"].items()
            for name, value in values.items()
        }
        figures["eval/primary"] = metrics["primary"]["value"]
        self.client.log_batch(run_id, [Metric(name, value, 0, iteration) for name, value in figures.items()])
        headline = {name: figures[name] for name in ("eval/primary",)} | {
            f"iterations/{name}": value for name, value in metrics["training"].items()
        }
        self.log_metrics(self.parent(), [(iteration, headline)])
        if samples:
            columns = {name: [sample[name] for sample in samples] for name in samples[0]}
            table = "samples.json"
            if not any(a.path == table for a in self.client.list_artifacts(run_id)):
                self.client.log_table(run_id, {"iteration": [iteration] * len(samples), **columns}, table)
        digest = checkpoint.manifest(workspace.checkpoint(iteration))["digest"]
        for version in self._versions():
            if version.tags.get("digest") == digest:
                self.client.set_model_version_tag(
                    MODEL, version.version, "primary", f"{metrics['primary']['value']:.6f}"
                )
        self.client.set_terminated(run_id)
        self._crown()

    def _crown(self) -> None:
        """CHAMPION: the best evaluated version of this recipe."""
        scored = [v for v in self._versions() if v.tags.get("recipe") == self.params.recipe and "primary" in v.tags]
        if scored:
            best = max(scored, key=lambda v: (float(v.tags["primary"]), -int(v.version)))
            self.client.set_registered_model_alias(MODEL, CHAMPION, str(best.version))

    def log_report(self, folder: Path) -> None:
        """The report's tables and plots into the workspace's run."""
        self.client.log_artifacts(self.parent().info.run_id, str(folder), "report")

    def candidates(self, iterations: Sequence[int]) -> list[Candidate]:
        """Those of these checkpoints of the workspace that are registered.

        Checkpoints that were never registered are registered first; a version that was deleted is no candidate.
        """
        client, found = self.client, []  # a server that does not answer is told before a checkpoint is looked at
        for iteration in iterations:
            number = self.register(iteration)
            digest = checkpoint.manifest(workspace.checkpoint(iteration))["digest"]
            if number is None:
                print(f"checkpoint {iteration}: its version was deleted from {MODEL}, so it does not play", flush=True)
                continue
            tags = client.get_model_version(MODEL, str(number)).tags
            found.append(Candidate(iteration, number, digest, vetoed=tags.get("team_member", "").lower() == "false"))
        return found

    def aliased(self) -> set[str]:
        """Digests of the versions that an alias names."""
        named = {str(number) for number in self._model().aliases.values()}
        return {v.tags["digest"] for v in self._versions() if str(v.version) in named and "digest" in v.tags}

    def removals(self, kept: Collection[str]) -> list[Removal]:
        """Versions that only this workspace holds, and their files; not these digests, nor what an alias names."""
        spared = {*kept, *self.aliased()}
        own = []
        for version in self._versions():
            if version.tags.get("digest") in spared:
                continue
            if [name for name in version.tags if name.startswith(HOLDER)] == [_holder()]:
                size = sum(file.file_size or 0 for file in self.client.list_artifacts(version.run_id, "model"))
                what = f"version {version.version} of {MODEL} and its files, checkpoint {version.tags['iteration']}"
                own.append(Removal(what, size, partial(self._remove, version)))
        return own

    def _remove(self, version: Any) -> None:
        """The files first: what is left of a version whose removal was stopped is found again."""
        root = self.client.get_run(version.run_id).info.artifact_uri
        get_artifact_repository(root, tracking_uri=tracking_uri()).delete_artifacts("model")
        self.client.delete_model_version(MODEL, version.version)

    def run_of(self, digest: str) -> str | None:
        """The run that made the checkpoint with this digest."""
        return next((v.run_id for v in self._versions() if v.tags.get("digest") == digest), None)

    def _model(self) -> Any:
        try:
            return self.client.get_registered_model(MODEL)
        except MlflowException:
            about = "Policies made by tpaw, one version a checkpoint."
            return self.client.create_registered_model(MODEL, description=about)

    def _versions(self) -> list[Any]:
        self._model()
        return list(self.client.search_model_versions(f"name = '{MODEL}'", max_results=10000))


def _sum(path: Path) -> str | None:
    return workspace.sha256(path) if path.is_file() else None


def _ledgers() -> dict[str, dict[str, int]]:
    return records.read(LEDGER, dict[str, dict[str, int]], "delete it") if LEDGER.exists() else {}


def _workspace_id() -> str:
    """A name that stays with this workspace, wherever it is moved or mounted."""
    if not WORKSPACE_ID.exists():
        with workspace.publish(WORKSPACE_ID) as aside:
            aside.write_text(uuid.uuid4().hex)
    return WORKSPACE_ID.read_text().strip()


def _holder() -> str:
    return HOLDER + _workspace_id()


def _answering(uri: str) -> None:
    """Raise at once, rather than after minutes of retries, where no MLflow server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{uri.rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers; who may do what is its own matter
    except (http.client.InvalidURL, ValueError) as error:
        raise TpawError(f"MLFLOW_TRACKING_URI {uri}: not an address ({error}); mend or unset it") from None
    except OSError as error:
        raise Unavailable(
            f"MLFLOW_TRACKING_URI {uri}: no MLflow server answers ({error}); start it with `make up`, "
            "or unset the variable to use the local database"
        ) from None
