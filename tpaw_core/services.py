"""The local stand: a Prefect server, an MLflow server and a Prefect worker, started detached and stopped again.

Knows processes, ports and health checks; must not know stages or torch. All state lies in `.tpaw/`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock

from tpaw_core.errors import TpawError
from tpaw_core.workspace import STATE, need, publish

HOST = "127.0.0.1"
POOL = "tpaw"
DEPLOYMENT = "tpaw/iterate"
NAMES = ("prefect", "mlflow", "worker")  # in the order they are started; stopped in the reverse order
RECORDS = STATE / "services.json"
LOGS = STATE / "logs"
SECONDS_TO_START = 120
SECONDS_TO_STOP = 15
LOG_LINES = 15  # shown when a service fails

# No proxy stands between this process and its own machine, whatever the environment says.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Record:
    """What services.json holds of a started service; pid and create_time together name one process for ever."""

    pid: int
    create_time: float
    port: int | None
    url: str


@dataclass(frozen=True)
class Status:
    name: str
    state: Literal["running", "not answering", "stopped"]
    url: str | None
    pid: int | None


@dataclass(frozen=True)
class Service:
    name: str
    arguments: tuple[str, ...]  # of this interpreter
    environment: Mapping[str, str]
    url: str
    port: int | None = None
    variable: str | None = None  # sets the port


def up() -> None:
    """Start what is not running, wait until all of it answers, and say where."""
    root = need(Path("prefect.yaml"), "run `tpaw up` from the project's folder").resolve().parent
    with _alone():
        records = _read()
        running = {name for name, record in records.items() if _process(record)}
        services = _services(root, {name: records[name] for name in running})
        missing = [service for service in services.values() if service.name not in running]
        _refuse_moved_ports(records, running, missing)
        for service in missing:
            if service.name in records:
                _stop(records[service.name])  # a server that was killed leaves processes that hold its port
        _refuse_taken_ports(missing)
        if missing:
            print(f"starting {', '.join(service.name for service in missing)}; logs in {LOGS}", flush=True)
        started: list[str] = []
        (STATE / "mlflow").mkdir(exist_ok=True)  # SQLite makes a file, not its folder
        try:
            for name in ("prefect", "mlflow"):
                if name not in running:
                    _start(services[name], records, started)
            _wait(("prefect", "mlflow"), records, started)
            if "worker" not in running:
                _deploy(services["prefect"].url, services["worker"].environment)
                _start(services["worker"], records, started)
            _wait(("worker",), records, started)
        except BaseException:
            for name in reversed(started):
                _stop(records.pop(name))
                print(f"{name}: stopped again", flush=True)
            _write(records)
            raise
        for name in NAMES:
            print(f"{name}: {'already running' if name in running else 'started'}, {records[name].url}")
    print(f"next: {_next_command(root, services['prefect'].url)}", flush=True)


def down() -> None:
    """Stop what services.json records, the worker first, and with each service all processes it started."""
    stopped = False
    if RECORDS.exists():
        with _alone():
            records = _read()
            for name in reversed(NAMES):
                record = records.pop(name, None)
                if record is not None and _stop(record):
                    stopped = True
                    print(f"{name}: stopped", flush=True)
                _write(records)
    if not stopped:
        print("nothing is running")


def status() -> list[Status]:
    """Each service of this workspace and whether it answers."""
    records = _read()
    found = []
    for name in NAMES:
        record = records.get(name)
        if record is None or _process(record) is None:
            found.append(Status(name, "stopped", None, None))
        else:
            state: Literal["running", "not answering"] = "running" if _answers(name, record) else "not answering"
            found.append(Status(name, state, record.url, record.pid))
    return found


def _services(root: Path, running: Mapping[str, Record]) -> dict[str, Service]:
    """How each service is started; one that runs keeps the port it has."""
    prefect = _port("prefect", "TPAW_PREFECT_PORT", 4200, running)
    mlflow = _port("mlflow", "TPAW_MLFLOW_PORT", 5000, running)
    if prefect == mlflow:
        raise TpawError(f"port {prefect}: wanted by Prefect and MLflow; set TPAW_PREFECT_PORT or TPAW_MLFLOW_PORT")
    prefect_url, mlflow_url = f"http://{HOST}:{prefect}", f"http://{HOST}:{mlflow}"
    environment = _environment(root, prefect_url)
    store = root / STATE / "mlflow"  # where the stages write when no server is named
    tracking = (
        *("-m", "mlflow", "server", "--host", HOST, "--port", str(mlflow), "--workers", "1"),
        *("--allowed-hosts", f"{HOST}:*,localhost:*"),  # whatever port a tunnel has
        *("--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"),
        *("--no-serve-artifacts", "--default-artifact-root", str(store / "artifacts")),
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


def _environment(root: Path, prefect_url: str) -> dict[str, str]:
    """The caller's environment without settings that belong to other Prefect or MLflow servers."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    direct = ",".join(filter(None, (own.get("no_proxy") or own.get("NO_PROXY"), HOST, "localhost")))
    return {
        **own,
        "PATH": os.pathsep.join(filter(None, (str(Path(sys.executable).parent), own.get("PATH")))),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PREFECT_HOME": str(root / STATE / "prefect"),
        "PREFECT_API_URL": f"{prefect_url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }


def _port(name: str, variable: str, default: int, running: Mapping[str, Record]) -> int:
    if name in running and (port := running[name].port) is not None:
        return port
    text = os.environ.get(variable) or str(default)
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise TpawError(f"{variable}: must be a port number from 1 to 65535, got {text!r}")
    return int(text)


def _refuse_moved_ports(records: Mapping[str, Record], running: set[str], missing: Sequence[Service]) -> None:
    """A worker that outlived its server keeps calling it at the old port."""
    for service in missing:
        old = records[service.name].port if service.name in records else None
        if "worker" in running and old is not None and old != service.port:
            raise TpawError(f"{service.name}: the running worker expects it at port {old}; `tpaw down`, then `tpaw up`")


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


def _start(service: Service, records: dict[str, Record], started: list[str]) -> None:
    """Start a service in a session of its own, and record it before anything can go wrong."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = _log(service.name)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *service.arguments],
            env=service.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    created = psutil.Process(process.pid).create_time()
    records[service.name] = Record(pid=process.pid, create_time=created, port=service.port, url=service.url)
    started.append(service.name)
    _write(records)


def _wait(names: Sequence[str], records: Mapping[str, Record], started: Sequence[str]) -> None:
    """Until every service answers; one that has died, or stays silent too long, is an error."""
    deadline = time.monotonic() + SECONDS_TO_START
    waiting = list(names)
    while waiting:
        for name in list(waiting):
            if _process(records[name]) is None:
                raise TpawError(f"{name}: stopped while starting; the end of {_log(name)}:\n{_tail(_log(name))}")
            if _answers(name, records[name]):
                waiting.remove(name)
            elif time.monotonic() > deadline:
                remedy = "see its log" if name in started else "`tpaw down`, then `tpaw up`"
                raise TpawError(
                    f"{name}: does not answer after {SECONDS_TO_START} s; {remedy}; "
                    f"the end of {_log(name)}:\n{_tail(_log(name))}"
                )
        if waiting:
            time.sleep(0.3)


def _answers(name: str, record: Record) -> bool:
    url = record.url
    if name == "prefect":
        return _ask(f"{url}/api/health") is not None
    if name == "mlflow":
        return _ask(f"{url}/health") is not None
    return _worker_reports(url.removesuffix(f"/work-pools/work-pool/{POOL}"), record)


def _worker_reports(prefect_url: str, record: Record) -> bool:
    """Whether the server has heard from this worker; an earlier worker of the same name may be on its books."""
    answer = _ask(f"{prefect_url}/api/work_pools/{POOL}/workers/filter", b"{}")
    for worker in json.loads(answer or "[]"):
        seen = worker["last_heartbeat_time"]
        if worker["name"] == POOL and worker["status"] == "ONLINE" and seen is not None:
            return datetime.fromisoformat(seen).timestamp() > record.create_time
    return False


def _ask(url: str, body: bytes | None = None) -> str | None:
    """What a server answers, None when it does not, or refuses."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with _open(request, timeout=5) as response:
            text: str = response.read().decode()
            return text
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _deploy(prefect_url: str, environment: Mapping[str, str]) -> None:
    """Make the work pool where it is missing, and deploy what prefect.yaml lists."""
    if _ask(f"{prefect_url}/api/work_pools/{POOL}") is None:
        _prefect(("work-pool", "create", POOL, "--type", "process"), environment)
    _prefect(("--no-prompt", "deploy", "--all"), environment)


def _prefect(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    log = _log("deploy")
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise TpawError(f"prefect {' '.join(arguments)}: failed; the end of {log}:\n{_tail(log)}")


def _next_command(root: Path, prefect_url: str) -> str:
    """The command that starts a run; names the server where prefect would ask another one."""
    command = f"prefect deployment run {DEPLOYMENT} --watch"
    api = f"{prefect_url}/api"
    file = root / "prefect.toml"
    written = tomllib.loads(file.read_text(encoding="utf-8")).get("api", {}).get("url") if file.exists() else None
    return command if os.environ.get("PREFECT_API_URL", written) == api else f"PREFECT_API_URL={api} {command}"


def _process(record: Record) -> psutil.Process | None:
    """The recorded process, None when it has ended or its number now belongs to another one."""
    try:
        process = psutil.Process(record.pid)
        return process if _same(process, record) and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _same(process: psutil.Process, record: Record) -> bool:
    # The system derives creation times from its clock, which may have been set meanwhile: allow two seconds.
    return abs(process.create_time() - record.create_time) < 2


def _stop(record: Record) -> bool:
    """End a service with everything it started; False when nothing of it was left."""
    family = _family(record)
    found = bool(family)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for group in {group for process in family if (group := _group(process)) is not None}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, kind)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while family and time.monotonic() < deadline:
            time.sleep(0.1)
            family = {process for process in family | _family(record) if _is_alive(process)}
    return found


def _family(record: Record) -> set[psutil.Process]:
    """The processes of the service's session, and their descendants: a flow run has a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if not _same(psutil.Process(record.pid), record):
            return set()
    family = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record.pid:
                family |= {process, *process.children(recursive=True)}
    return {process for process in family if _is_alive(process)}


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid) if process.is_running() else None
    except (psutil.Error, OSError):
        return None


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is dead, also where no parent collects it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One `tpaw up` or `tpaw down` at a time in a workspace."""
    STATE.mkdir(exist_ok=True)
    with FileLock(STATE / "services.lock"):
        yield


def _read() -> dict[str, Record]:
    try:
        records = json.loads(RECORDS.read_text(encoding="utf-8"))
        return {name: Record(**records[name]) for name in NAMES if name in records}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise TpawError(f"{RECORDS}: unreadable ({error}); stop the services by hand and delete it") from None


def _write(records: Mapping[str, Record]) -> None:
    with publish(RECORDS) as made:
        content = {name: asdict(record) for name, record in records.items()}
        made.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _log(name: str) -> Path:
    return LOGS / f"{name}.log"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
