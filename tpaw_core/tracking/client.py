"""A client of the tracking server, and an experiment."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException

from tpaw_core.errors import TpawError, Unavailable
from tpaw_core.workspace.paths import Workspace

SECONDS_AWAY = 3.0  # a server that restarts, or a connection that was cut


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, or the local database that `tpaw up` serves."""
    return os.environ.get("MLFLOW_TRACKING_URI") or workspace.mlflow_database


def connect(workspace: Workspace, experiment: str) -> tuple[MlflowClient, Experiment]:
    """A client, and the experiment of this name, which is made where it is missing.

    Raises Unavailable where no server answers, TpawError where it refuses.
    """
    uri = tracking_uri(workspace)
    local = not uri.startswith("http")
    if local:
        workspace.mlflow.mkdir(parents=True, exist_ok=True)
    else:
        _refuse_if_silent(uri)
    artifacts = (workspace.mlflow / "artifacts").resolve().as_uri() if local else None
    try:
        client = MlflowClient(uri)
        return client, _experiment(client, experiment, uri, artifacts)
    except MlflowException as error:
        raise TpawError(
            f"MLFLOW_TRACKING_URI {uri}: {str(error).splitlines()[0]}; check the server's log and, if it "
            "requires a login, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from None


def find_run(client: MlflowClient, experiment: str, tags: Mapping[str, str], *also: str) -> Run | None:
    """The newest run with these tags, for which what ``also`` says holds too."""
    query = " and ".join([*(f"tags.`{name}` = '{value}'" for name, value in tags.items()), *also])
    runs = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0] if runs else None


def _experiment(client: MlflowClient, name: str, uri: str, artifacts: str | None) -> Experiment:
    for _ in range(2):
        if found := client.get_experiment_by_name(name):
            return found
        with contextlib.suppress(MlflowException):  # another process may make it just now
            client.create_experiment(name, artifacts, {"mlflow.experimentKind": "custom_model_development"})
    raise TpawError(f"MLflow at {uri}: the experiment {name!r} can be neither found nor created; was it deleted?")


def _refuse_if_silent(uri: str) -> None:
    """Raise after seconds, rather than after minutes of retries, where no MLflow server answers."""
    deadline = time.monotonic() + SECONDS_AWAY
    while (refusal := _silence(uri)) is not None:
        if time.monotonic() > deadline:
            raise refusal
        time.sleep(0.2)


def _silence(uri: str) -> Unavailable | None:
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return None  # it answers; permissions are a later question
    except (http.client.InvalidURL, ValueError) as error:
        raise TpawError(f"MLFLOW_TRACKING_URI {uri}: not a valid address ({error}); fix or unset it") from None
    except OSError as error:
        return Unavailable(
            f"MLFLOW_TRACKING_URI {uri}: no MLflow server answers ({error}); start it with `make up`, "
            "or unset the variable to use the local database"
        )
    return None
