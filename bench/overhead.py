"""The fixed cost of four iterations: the whole pipeline on 32 rows, which take almost no time to compute.

Ours: `prefect deployment run tpaw/iterate --watch`, whose stages are forked from a process with the imports done.
The peer: `dvc repro` of the same stages, each of which starts Python and does its own imports.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import ratio

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
TINY = ["data.max_train_rows=32", "data.max_heldout_rows=16", "sft.num_train_epochs=1"]


class Workspace:
    """An empty workspace with its own ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dvc.yaml", "prefect.yaml", "prefect.toml", ".gitignore"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("recipes", "flows"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
        ports = [_free_port() for _ in range(2)]
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_TRACKING", "TPAW_"))},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "TPAW_PREFECT_PORT": str(ports[0]),
            "TPAW_MLFLOW_PORT": str(ports[1]),
            "PREFECT_API_URL": f"http://127.0.0.1:{ports[0]}/api",
        }
        self.run("git", "init", "--quiet")
        self.run("tpaw", "use", "demo", *TINY)

    def run(self, *command: str) -> float:
        """Run a command and return the seconds that it took."""
        started = time.perf_counter()
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return time.perf_counter() - started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _workspace() -> Iterator[Workspace]:
    with tempfile.TemporaryDirectory(prefix="tpaw-bench-") as folder:
        yield Workspace(Path(folder))


def flow(arguments: argparse.Namespace) -> dict[str, float]:
    with _workspace() as workspace:
        workspace.run("tpaw", "up")
        try:
            return {"seconds": workspace.run("prefect", "deployment", "run", "tpaw/iterate", "--watch")}
        finally:
            workspace.run("tpaw", "down")


def repro(arguments: argparse.Namespace) -> dict[str, float]:
    with _workspace() as workspace:
        seconds = workspace.run("tpaw", "data") + workspace.run("dvc", "add", "--quiet", "data")
        return {"seconds": seconds + workspace.run("dvc", "repro")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if arguments := ratio.run("bench.overhead", {"flow": flow, "repro": repro}, parser):
        found = ratio.in_turn(arguments, {"flow": {}, "repro": {}})
        seconds = [[figures["seconds"] for figures in side] for side in found.values()]
        ratio.report("overhead", "s", *seconds, peer_name="dvc repro")


if __name__ == "__main__":
    main()
