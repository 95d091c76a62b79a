"""The local stack: a Prefect server, an MLflow server and a Prefect worker; all its state is in `.tpaw/`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from filelock import FileLock

from tpaw_core.errors import TpawError
from tpaw_core.processes import daemon, health
from tpaw_core.processes.daemon import Daemon
from tpaw_core.processes.health import POOL
from tpaw_core.workspace import records
from tpaw_core.workspace.files import need
from tpaw_core.workspace.paths import Workspace

HOST = "127.0.0.1"
DEPLOYMENT = "tpaw/iterate"
NAMES = ("prefect", "mlflow", "worker")  # in the order they are started; stopped in the reverse order
SECONDS_TO_START = 120
LOG_LINES = 15  # shown when a service fails


@dataclass(frozen=True)
class Status:
    name: str
    state: Literal["running", "not answering", "stopped"]
    url: str | None
    pid: int | None

    def __str__(self) -> str:
        return f"{self.name}: {self.state}{f', {self.url}, process {self.pid}' if self.pid else ''}"


@dataclass(frozen=True)
class Service:
    name: str
    arguments: tuple[str, ...]  # of this interpreter
    environment: Mapping[str, str]
    url: str
    port: int | None = None
    variable: str | None = None  # sets the port


def up(workspace: Workspace) -> None:
    """Start what is not running, wait until everything answers, and print the addresses."""
    need(workspace.root / "prefect.yaml", "run `tpaw up` from the project's folder")
    with _alone(workspace):
        known = _read(workspace)
        running = {name for name, record in known.items() if daemon.process(record)}
        services = _services(workspace, {name: known[name] for name in running})
        missing = [service for service in services.values() if service.name not in running]
        _refuse_moved_ports(known, running, missing)
        for service in missing:
            if service.name in known:
                daemon.stop(known[service.name])  # a server that was killed leaves processes that hold its port
        _refuse_taken_ports(missing)
        if missing:
            names = ", ".join(service.name for service in missing)
            print(f"starting {names}; logs in {workspace.state / 'logs'}", flush=True)
        workspace.mlflow.mkdir(exist_ok=True)  # SQLite makes a file, not its folder
        started: list[str] = []

        def start(name: str) -> None:
            own, log = services[name], _log(workspace, name)
            known[name] = daemon.start(own.arguments, workspace.root, own.environment, log, own.port, own.url)
            started.append(name)
            _write(workspace, known)

        try:
            for name in ("prefect", "mlflow"):
                if name not in running:
                    start(name)
            _wait(workspace, ("prefect", "mlflow"), known, started)
            if "worker" not in running:
                _deploy(workspace, services["prefect"].url, services["worker"].environment)
                start("worker")
            _wait(workspace, ("worker",), known, started)
        except BaseException:
            for name in reversed(started):
                daemon.stop(known.pop(name))
                print(f"{name}: stopped", flush=True)
            _write(workspace, known)
            raise
        for name in NAMES:
            print(f"{name}: {'already running' if name in running else 'started'}, {known[name].url}")
    print(f"next: {_next_command(workspace, services['prefect'].url)}", flush=True)


def down(workspace: Workspace) -> None:
    """Stop what services.json records, the worker first, and with each service all processes it started."""
    stopped = False
    if _records(workspace).exists():
        with _alone(workspace):
            known = _read(workspace)
            for name in reversed(NAMES):
                record = known.pop(name, None)
                if record is not None and daemon.stop(record):
                    stopped = True
                    print(f"{name}: stopped", flush=True)
                _write(workspace, known)
    if not stopped:
        print("nothing is running")


def status(workspace: Workspace) -> list[Status]:
    """Each service of this workspace and whether it answers."""
    known, found = _read(workspace), []
    for name in NAMES:
        record = known.get(name)
        if record is None or daemon.process(record) is None:
            found.append(Status(name, "stopped", None, None))
        else:
            state: Literal["running", "not answering"]
            state = "running" if health.answers(name, record) else "not answering"
            found.append(Status(name, state, record.url, record.pid))
    return found


def _services(workspace: Workspace, running: Mapping[str, Daemon]) -> dict[str, Service]:
    """How each service is started; one that runs keeps the port it has."""
    prefect = _port("prefect", "TPAW_PREFECT_PORT", 4200, running)
    mlflow = _port("mlflow", "TPAW_MLFLOW_PORT", 5000, running)
    if prefect == mlflow:
        raise TpawError(
            f"port {prefect}: assigned to both Prefect and MLflow; set TPAW_PREFECT_PORT or TPAW_MLFLOW_PORT"
        )
    prefect_url, mlflow_url = f"http://{HOST}:{prefect}", f"http://{HOST}:{mlflow}"
    environment = _environment(workspace, prefect_url)
    artifacts = (workspace.mlflow / "artifacts").resolve().as_uri()  # where the stages write when no server is named
    tracking = (
        *("-m", "mlflow", "server", "--host", HOST, "--port", str(mlflow), "--workers", "1"),
        *("--allowed-hosts", f"{HOST}:*,localhost:*"),  # whatever port a tunnel has
        *("--backend-store-uri", workspace.mlflow_database),
        *("--no-serve-artifacts", "--default-artifact-root", artifacts),
    )
    # --limit 1: two runs would write the same files. A deployment's concurrency limit leaks its slot on a crash.
    polling = ("-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL, "--limit", "1")
    working = {**environment, "MLFLOW_TRACKING_URI": mlflow_url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    serving = ("-m", "prefect", "server", "start", "--host", HOST, "--port", str(prefect))
    return {
        "prefect": Service("prefect", serving, environment, prefect_url, prefect, "TPAW_PREFECT_PORT"),
        "mlflow": Service("mlflow", tracking, environment, mlflow_url, mlflow, "TPAW_MLFLOW_PORT"),
        "worker": Service("worker", polling, working, f"{prefect_url}/work-pools/work-pool/{POOL}"),
    }


def _environment(workspace: Workspace, prefect_url: str) -> dict[str, str]:
    """The caller's environment without settings that belong to other Prefect or MLflow servers."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    home = (workspace.state / "prefect").resolve()
    return {
        **own,
        "PATH": os.pathsep.join(filter(None, (str(Path(sys.executable).parent), own.get("PATH")))),
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{quote(str(home / 'prefect.db'))}",
        "PREFECT_API_URL": f"{prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }


def _port(name: str, variable: str, default: int, running: Mapping[str, Daemon]) -> int:
    if name in running and (port := running[name].port) is not None:
        return port
    text = os.environ.get(variable) or str(default)
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise TpawError(f"{variable}: must be a port number from 1 to 65535, got {text!r}")
    return int(text)


def _refuse_moved_ports(known: Mapping[str, Daemon], running: set[str], missing: Sequence[Service]) -> None:
    """A worker that outlived its server keeps calling it at the old port."""
    for service in missing:
        old = known[service.name].port if service.name in known else None
        if "worker" in running and old is not None and old != service.port:
            raise TpawError(
                f"{service.name}: the running worker expects it on port {old}; run `tpaw down`, then `tpaw up`"
            )


def _refuse_taken_ports(services: Sequence[Service]) -> None:
    for service in services:
        if service.port is None:
            continue
        with socket.socket() as probe:
            probe.settimeout(2)
            if probe.connect_ex((HOST, service.port)) == 0:
                raise TpawError(
                    f"port {service.port}: taken by another program, so {service.name} cannot start; "
                    f"stop that program, or choose another port, e.g. {service.variable}={service.port + 100} tpaw up"
                )


def _wait(workspace: Workspace, names: Sequence[str], known: Mapping[str, Daemon], started: Sequence[str]) -> None:
    """Until every service answers; one that has died, or stays silent too long, is an error."""
    deadline = time.monotonic() + SECONDS_TO_START
    waiting = list(names)
    while waiting:
        for name in list(waiting):
            log = _log(workspace, name)
            if daemon.process(known[name]) is None:
                raise TpawError(f"{name}: stopped while starting; last lines of {log}:\n{_tail(log)}")
            if health.answers(name, known[name]):
                waiting.remove(name)
            elif time.monotonic() > deadline:
                remedy = "see its log" if name in started else "run `tpaw down`, then `tpaw up`"
                raise TpawError(
                    f"{name}: did not answer within {SECONDS_TO_START} s; {remedy}; last lines of {log}:\n{_tail(log)}"
                )
        if waiting:
            time.sleep(0.3)


def _deploy(workspace: Workspace, prefect_url: str, environment: Mapping[str, str]) -> None:
    """Make the work pool where it is missing, and deploy what prefect.yaml lists."""
    if health.ask(f"{prefect_url}/api/work_pools/{POOL}") is None:
        _prefect(workspace, ("work-pool", "create", POOL, "--type", "process"), environment)
    _prefect(workspace, ("--no-prompt", "deploy", "--all"), environment)


def _prefect(workspace: Workspace, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    log = _log(workspace, "deploy")
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=workspace.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise TpawError(f"prefect {' '.join(arguments)}: failed; last lines of {log}:\n{_tail(log)}")


def _next_command(workspace: Workspace, prefect_url: str) -> str:
    """The command that starts a run; names the server where prefect would ask another one."""
    command = f"prefect deployment run {DEPLOYMENT} --watch"
    api = f"{prefect_url}/api"
    file = workspace.root / "prefect.toml"
    written = tomllib.loads(file.read_text(encoding="utf-8")).get("api", {}).get("url") if file.exists() else None
    return command if os.environ.get("PREFECT_API_URL", written) == api else f"PREFECT_API_URL={api} {command}"


@contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """One `tpaw up` or `tpaw down` at a time in a workspace."""
    workspace.state.mkdir(exist_ok=True)
    with FileLock(workspace.state / "services.lock"):
        yield


def _records(workspace: Workspace) -> Path:
    return workspace.state / "services.json"


def _read(workspace: Workspace) -> dict[str, Daemon]:
    path = _records(workspace)
    if not path.exists():
        return {}
    found = records.read(path, dict[str, Daemon], "stop the services manually, then delete this file")
    return {name: found[name] for name in NAMES if name in found}


def _write(workspace: Workspace, started: Mapping[str, Daemon]) -> None:
    content = {name: record.model_dump() for name, record in started.items()}
    with workspace.publish(_records(workspace)) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _log(workspace: Workspace, name: str) -> Path:
    return workspace.state / "logs" / f"{name}.log"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
