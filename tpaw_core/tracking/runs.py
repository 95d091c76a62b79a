"""The runs of one workspace: one per flow, with a child run per iteration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run

from tpaw_core.config import params as settings
from tpaw_core.config.params import Params
from tpaw_core.tracking import client, ledger
from tpaw_core.workspace.paths import Workspace

EXPERIMENT = "tpaw"
UNFINISHED = "attributes.status != 'FINISHED'"


class Runs:
    """Connects when it is first used, after a stage has checked its inputs."""

    def __init__(self, workspace: Workspace, params: Params) -> None:
        self.workspace, self.params = workspace, params

    @cached_property
    def _key(self) -> dict[str, str]:
        identity = ledger.workspace_id(self.workspace)
        return {"tpaw.workspace": identity, "tpaw.params": self.params.digest(), "tpaw.kind": "run"}

    @cached_property
    def _connected(self) -> tuple[MlflowClient, Experiment]:
        return client.connect(self.workspace, EXPERIMENT)

    @property
    def client(self) -> MlflowClient:
        return self._connected[0]

    @property
    def experiment(self) -> str:
        return self._connected[1].experiment_id

    @property
    def server(self) -> str:
        """Tells one server's versions from another's."""
        found = self._connected[1]
        return f"{found.experiment_id}-{found.creation_time}"

    def workspace_run(self) -> Run:
        """The unfinished run of this workspace and these params, or a new one: a continued flow continues its run."""
        session = os.environ.get("TPAW_SESSION", "")
        if unfinished := self._find(self._key, UNFINISHED):
            if session:
                self.client.set_tag(unfinished.info.run_id, "prefect.flow_run_id", session)
            return unfinished
        tags = {**self._key, "tpaw.recipe": self.params.recipe, **({"prefect.flow_run_id": session} if session else {})}
        run = self.client.create_run(self.experiment, tags=tags, run_name=self.params.recipe)
        self._log_params(run, settings.flat(self.params.model_dump(by_alias=True, exclude_none=True)))
        return run

    def reopen(self) -> None:
        """Go on with the last run of this workspace and these params where it has ended: a report belongs to it."""
        if self._find(self._key, UNFINISHED) is None and (ended := self._find(self._key)):
            self.client.update_run(ended.info.run_id, status="RUNNING")

    def iteration_run(self, iteration: int) -> Run:
        """The run of one iteration, under the parent."""
        parent = self.workspace_run()
        key = {"mlflow.parentRunId": parent.info.run_id, "tpaw.iteration": str(iteration)}
        if found := self._find(key):
            return found
        name = "sft" if iteration == 0 else f"iteration {iteration}"
        tags = {**key, "tpaw.recipe": self.params.recipe, "tpaw.kind": "iteration"}
        run = self.client.create_run(self.experiment, tags=tags, run_name=name)
        if iteration > 0:
            own = {
                **self.params.objective_at(iteration).model_dump(by_alias=True),
                **self.params.training_at(iteration).model_dump(),
            }
            self._log_params(run, own)
        return run

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the workspace's unfinished run under these params, if there is one. Returns its id."""
        run = self._find(self._key, UNFINISHED)
        if run is None:
            return None
        for child in self.client.search_runs(
            [self.experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and {UNFINISHED}"
        ):
            self.client.set_terminated(child.info.run_id, status)
        self.client.set_terminated(run.info.run_id, status)
        return run.info.run_id

    def _find(self, tags: Mapping[str, str], *also: str) -> Run | None:
        return client.find_run(self.client, self.experiment, tags, *also)

    def _log_params(self, run: Run, params: Mapping[str, Any]) -> None:
        self.client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def log_metrics(self, run: Run, entries: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(step, metrics) entries."""
        metrics = [Metric(name, float(value), 0, step) for step, values in entries for name, value in values.items()]
        self.client.log_batch(run.info.run_id, metrics)

    def log_dataset(self, run: Run, path: Path, rows: int, context: str) -> None:
        """A data set as an input of the run, with its digest."""
        dataset = Dataset(
            name=self.workspace.name(path),
            digest=self.workspace.sha256(path)[:16],
            source_type="local",
            source=json.dumps({"uri": self.workspace.name(path)}),
            profile=json.dumps({"num_rows": rows}),
        )
        self.client.log_inputs(run.info.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def warn(self, iteration: int, warning: str) -> None:
        """A line in a tag of the runs of the iteration and of the whole; the UI shows it beside the figures."""
        tags = {"tpaw.warning": self.iteration_run(iteration), f"tpaw.warning.{iteration}": self.workspace_run()}
        for tag, run in tags.items():
            lines = [*run.data.tags.get(tag, "").splitlines(), warning]
            self.client.set_tag(run.info.run_id, tag, "\n".join(dict.fromkeys(lines)))

    def log_report(self, folder: Path) -> None:
        """The report's tables and plots."""
        self.client.log_artifacts(self.workspace_run().info.run_id, str(folder), "report")
