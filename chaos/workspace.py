"""A small workspace of the project's own pipeline, and commands run in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from mlflow import MlflowClient
from tpaw_core import preload

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = [
    "model.scratch.hidden_size=64",
    "model.scratch.num_hidden_layers=1",
    "model.scratch.num_attention_heads=2",
    "model.scratch.intermediate_size=128",
    "data.max_train_rows=48",
    "data.max_heldout_rows=16",
    "sft.num_train_epochs=10",
    "training.per_device_train_batch_size=1",
    "training.save_steps=2",
    "training.logging_steps=2",
]


class Workspace:
    """A folder with the project's pipeline in it; a model so small that a stage takes a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_TRACKING", "TPAW_"))},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "TPAW_PREFECT_PORT": str(_free_port()),
            "TPAW_MLFLOW_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
        }
        self.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{self.environment['TPAW_PREFECT_PORT']}/api"

    @classmethod
    def make(cls, folder: Path, *settings: str, iterations: int = 2) -> Workspace:
        """The pipeline's files, params.yaml and rows; nothing has run yet."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("dvc.yaml", "prefect.yaml", "prefect.toml", ".gitignore", "recipes", "flows"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
        (folder / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
        made = cls(folder)
        made.run("git", "init", "--quiet")
        made.run("tpaw", "use", "demo", *TINY, *settings)
        text = (folder / "params.yaml").read_text()
        kept = "".join(f"  '{t}': {{previous: {t - 1}}}\n" for t in range(1, iterations + 1))
        (folder / "params.yaml").write_text(re.sub(r"(?m)(^iterations:\n)(^  '\d+': .*\n)+", rf"\g<1>{kept}", text))
        made.run("tpaw", "data")
        made.run("dvc", "add", "--quiet", "data")
        return made

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def flow(self, *parameters: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        given = [word for parameter in parameters for word in ("--param", parameter)]
        return self.run("prefect", "deployment", "run", "tpaw/iterate", "--watch", *given, check=check)

    @contextmanager
    def preloaded(self) -> Iterator[None]:
        """While this holds, commands are forked from a process that has done the imports, as in a flow."""
        with tempfile.TemporaryDirectory(prefix="tpaw-") as folder:
            address = f"{folder}/socket"
            command = [sys.executable, "-m", "tpaw_core", "preload", address]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=self.environment)
            while not Path(address).exists() and process.poll() is None:
                time.sleep(0.05)
            self.environment[preload.ADDRESS] = address
            try:
                yield
            finally:
                del self.environment[preload.ADDRESS]
                process.communicate()

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

    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / '.tpaw' / 'mlflow' / 'mlflow.db'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
