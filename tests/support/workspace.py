"""The project's own pipeline in a folder of its own, with a tiny model, and commands run in it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from ruamel.yaml import YAML

from chaos.proxy import Proxy
from tpaw_core.config import params_file
from tpaw_core.data import prepare
from tpaw_core.processes import fork_server
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DVC = [sys.executable, "-m", "tpaw_core.processes.fork_server", "dvc"]
COMMANDS = {
    "repro": [*DVC, "repro"],
    "flow": [str(BIN / "prefect"), "deployment", "run", "tpaw/iterate", "--watch"],
}
TINY = [
    "model.scratch.hidden_size=64",
    "model.scratch.num_hidden_layers=1",
    "model.scratch.num_attention_heads=2",
    "model.scratch.intermediate_size=128",
    "data.max_train_rows=48",
    "data.max_heldout_rows=16",
    "sft.num_train_epochs=10",
    "training.train_batch_size=1",
    "training.save_steps=2",
    "training.logging_steps=2",
]


class Project:
    """A folder with the project's pipeline in it; a model so small that a stage takes a second."""

    server: psutil.Popen | None = None  # the preloaded process, where this project started it
    proxy: Proxy | None = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspace = folder, Workspace(folder)
        self.messages = Path(tempfile.mkdtemp(prefix="tpaw-")) / "repro.log"  # not on a disk that gets full
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_TRACKING", "TPAW_"))},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "TPAW_PREFECT_PORT": str(_free_port()),
            "TPAW_MLFLOW_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
        }
        self.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{self.environment['TPAW_PREFECT_PORT']}/api"

    @classmethod
    def make(cls, folder: Path, *settings: str, iterations: int = 2) -> Project:
        """The pipeline's files, params.yaml and rows; nothing has run yet."""
        made = cls.bare(folder)
        for name in ("prefect.yaml", "prefect.toml", ".gitignore", "flows"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
        (folder / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
        made.run("git", "init", "--quiet")
        params = params_file.switch(made.workspace, "demo", [*TINY, *settings])
        made.keep_iterations(iterations)
        prepare.prepare(made.workspace, params.data, params.seed)
        made.run("dvc", "add", "--quiet", "data")
        return made

    @classmethod
    def bare(cls, folder: Path) -> Project:
        """The recipes and the graph of stages alone: what a study needs."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")
        shutil.copytree(ROOT / "recipes", folder / "recipes")
        return cls(folder)

    def keep_iterations(self, number: int) -> None:
        """params.yaml with this many iterations, each as the recipe has it."""
        path = self.workspace.params_file
        kept = "".join(f"  '{t}': {{previous: {t - 1}}}\n" for t in range(1, number + 1))
        path.write_text(re.sub(r"(?m)(^iterations:\n)(^  '\d+': .*\n)+", rf"\g<1>{kept}", path.read_text()))

    def copy(self, folder: Path) -> Project:
        """Another project with the same files, and the same preloaded process."""
        subprocess.run(["cp", "--archive", self.folder, folder], check=True)  # hard links stay links
        made = Project(folder)
        made.fork_from(self)
        if (database := made.workspace.mlflow / "mlflow.db").exists():
            moved = (self.folder.resolve().as_uri(), folder.resolve().as_uri())
            with closing(sqlite3.connect(database)) as connection, connection:
                connection.execute("UPDATE experiments SET artifact_location = replace(artifact_location, ?, ?)", moved)
                connection.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, ?, ?)", moved)
        return made

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in the folder; tpaw and dvc are forked from the preloaded process where there is one."""
        words = [*DVC, *command[1:]] if command[0] == "dvc" else command
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command that goes on; its output can be read."""
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def flow(self, *parameters: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        given = [word for parameter in parameters for word in ("--param", parameter)]
        return self.run("prefect", "deployment", "run", "tpaw/iterate", "--watch", *given, check=check)

    def preload(self) -> None:
        """From now on commands are forked from a process that has done the imports, as in a flow."""
        if self.server is not None and self.server.is_running() and self.server.poll() is None:
            return
        self.environment.pop(fork_server.ADDRESS, None)  # else it is itself forked
        address = f"{tempfile.mkdtemp(prefix='tpaw-')}/socket"
        command = [sys.executable, "-m", "tpaw_core", "preload", address]
        self.server = psutil.Popen(command, stdin=subprocess.PIPE, env=self.environment)
        while not Path(address).exists() and self.server.poll() is None:
            time.sleep(0.05)
        self.environment[fork_server.ADDRESS] = address

    def fork_from(self, other: Project) -> None:
        """From now on commands are forked from another project's preloaded process, if it has one."""
        if (address := other.environment.get(fork_server.ADDRESS)) is not None:
            self.environment[fork_server.ADDRESS] = address

    def close(self) -> None:
        """End what was started for this project."""
        if self.server is not None:
            self.server.communicate()
            shutil.rmtree(Path(self.environment.pop(fork_server.ADDRESS)).parent)
            self.server = None
        if (self.workspace.state / "services.json").exists():
            self.run("tpaw", "down", check=False)
        shutil.rmtree(self.messages.parent)

    def up(self) -> None:
        """Start what is not running of Prefect, MLflow and the worker; a connection to MLflow that can be lost."""
        alone = {name: value for name, value in self.environment.items() if name != fork_server.ADDRESS}
        done = subprocess.run([BIN / "tpaw", "up"], cwd=self.folder, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, f"tpaw up\n{done.stdout}\n{done.stderr}"
        if self.proxy is None:
            self.proxy = Proxy(int(self.environment["TPAW_MLFLOW_PORT"]))

    def again(self, command: str) -> None:
        """One of COMMANDS beside whatever runs; it may wait, or say who is at work."""
        self.run(*COMMANDS[command], check=False)

    @contextmanager
    def settings(self, *overrides: str) -> Iterator[None]:
        """Other parameters for a while."""
        before = self.workspace.params_file.read_text()
        params_file.switch(self.workspace, None, overrides)
        try:
            yield
        finally:
            self.workspace.params_file.write_text(before)

    def log(self, command: str) -> Path:
        """Where a command's stages say that they run."""
        if command == "flow":
            return self.folder / ".tpaw" / "logs" / "worker.log"
        return self.messages

    def stale(self) -> set[str]:
        """The stages that `dvc repro` would run."""
        return set(json.loads(self.run("dvc", "status", "--json").stdout))

    def lock(self) -> dict[str, dict[str, str]]:
        """Digest of every output by stage, from dvc.lock."""
        stages = YAML(typ="safe").load(self.folder / "dvc.lock")["stages"]
        return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}

    def params(self) -> dict[str, dict[str, object]]:
        return YAML(typ="safe").load(self.folder / "params.yaml")

    def digest(self, iteration: int) -> str:
        return json.loads((self.folder / "checkpoints" / str(iteration) / "manifest.json").read_text())["digest"]

    def team(self, iteration: int) -> list[int]:
        members = json.loads((self.folder / "teams" / f"{iteration}.json").read_text())["members"]
        return [member["iteration"] for member in members]

    def service(self, name: str) -> psutil.Process | None:
        """A running service's process."""
        records = self.folder / ".tpaw" / "services.json"
        try:
            return psutil.Process(json.loads(records.read_text())[name]["pid"])
        except (FileNotFoundError, KeyError, psutil.NoSuchProcess):
            return None

    def services(self) -> set[psutil.Process]:
        """The services with the processes that they consist of; a flow run is not part of the worker."""
        found = {process for name in ("prefect", "mlflow", "worker") if (process := self.service(name))}
        return found | {child for name in ("prefect", "mlflow") for child in self._children(self.service(name))}

    def _children(self, process: psutil.Process | None) -> list[psutil.Process]:
        return process.children(recursive=True) if process else []

    def client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(self.workspace.mlflow_database)


def _free_port() -> int:
    """Below those that the kernel gives to outgoing connections: the server may start minutes from now."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
