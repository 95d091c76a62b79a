"""A campaign: one fault after another in one workspace; after each, the same command runs again and is checked.

Before a fault the pipeline is reset to a randomly drawn stage: its outputs and versions, those of all later stages, and
DVC's run cache are deleted, so that the command has real work to do. A fault that found nothing to strike is tried
again and does not count. Afterwards everything must be as the undisturbed run left it.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from ruamel.yaml import YAML

from chaos import faults, processes
from tests.support.workspace import COMMANDS, Project
from tpaw_core.tracking.registry import MODEL

PATIENCE = 300  # seconds that a command may take before it counts as hung
MOMENTS = 2.0  # a fault strikes within this many seconds of the start of its stage
TRIES = 10  # attempts to find something to strike
ORDER = (
    "encode",
    "sft",
    "evaluate-sft",
    *(f"{name}@{t}" for t in (1, 2) for name in ("generate", "team", "weights", "train", "evaluate")),
)


class Outcome(NamedTuple):
    """The outcome of one fault."""

    kind: str
    stage: str
    ended: int  # exit status of the command that was struck, or that met the damage first
    lost: str  # why the same command, run again, did not complete
    wrong: str  # what differs from the undisturbed run, or was damaged and not reported
    duplicates: int
    orphans: int
    seconds: float


class Campaign:
    """Faults in a workspace that has completed one undisturbed run."""

    def __init__(self, made: Project, seed: int) -> None:
        self.made, self.draw = made, random.Random(seed)
        self.outputs = {name: outs for name, outs in made.lock().items() if name != "report"}

    def suffer(self, kind: str) -> Outcome:
        """Cause one fault of a kind, run the same command again, and check the result."""
        started, fault = time.monotonic(), faults.KINDS[kind]
        if fault.services:
            self.made.up()
        if fault.damage:
            stage, wrong = self._damage(fault)
            ended = code = self._run(fault)
            if code != 0:  # it may report the damage and fix it
                code = self._run(fault)
        else:
            stage, ended = self._strike(fault)
            wrong = ""
            if fault.services:
                self.made.up()
            code = self._run(fault)
            if code != 0 and self._lock_is_broken():
                (self.made.folder / "dvc.lock").unlink()
                code = self._run(fault)
        return Outcome(
            kind,
            stage,
            ended,
            "" if code == 0 else f"the command ended with {code}",
            wrong or "; ".join(self._differences()),
            self._duplicates(),
            len(processes.orphans(self.made.folder, self.made.services())),
            round(time.monotonic() - started, 1),
        )

    def set_back(self, stage: str, *, scores: bool) -> None:
        """Make it as if ``stage`` and all later stages had never run; ``scores``: keep the scores."""
        folder = self.made.folder
        later = ORDER[ORDER.index(stage) :]
        yaml = YAML()
        lock = yaml.load(folder / "dvc.lock")
        for name in later:
            for out in self.outputs[name]:
                path = folder / out
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            lock["stages"].pop(name, None)
        yaml.dump(lock, folder / "dvc.lock")
        client = self.made.client()
        gone = {name.removeprefix("train@").replace("sft", "0") for name in later if name == "sft" or "train" in name}
        for version in client.search_model_versions(f"name='{MODEL}'"):
            if version.tags["iteration"] in gone:
                client.delete_model_version(MODEL, version.version)
        again = not scores and "weights@2" in later
        for path in (".dvc/cache/runs", ".tpaw/training", *([".tpaw/scores"] if again else [])):
            shutil.rmtree(folder / path, ignore_errors=True)
        (folder / ".tpaw" / "registered.json").unlink(missing_ok=True)

    def _damage(self, fault: faults.Kind) -> tuple[str, str]:
        """Reset to a stage after the one that made a file, and damage it. Returns the stage and what went unnoticed."""
        assert fault.damage
        path = self.draw.choice(sorted(self.made.folder.glob(fault.pattern)))
        name = path.relative_to(self.made.folder).as_posix()
        output = name.rpartition("/")[0] if name.startswith("checkpoints") else name
        makers = [ORDER.index(stage) for stage, outs in self.outputs.items() if output in outs]
        # A score that no stage reads again would stay damaged: reported, but without consequence.
        end = ORDER.index("weights@1") + 1 if fault.pattern == faults.SCORES else len(ORDER)
        stage = self.draw.choice(ORDER[max(makers, default=0) + 1 : end])
        self.set_back(stage, scores=True)
        fault.damage(path, self.draw)
        if name in ("dvc.lock", faults.SUMS):
            return stage, ""  # only the outcome of the next run counts
        said = self.made.run("tpaw", "verify", check=False).stdout
        return stage, "" if output in said else f"{name} was damaged, and nobody noticed"

    def _strike(self, fault: faults.Kind) -> tuple[str, int]:
        """Run the command, and break it within a stage. Returns the stage and the command's exit status."""
        for _ in range(TRIES):
            stage = self.draw.choice(ORDER)
            self.set_back(stage, scores=self.draw.random() < 0.5)
            struck, code = self._try(fault, stage)
            if struck:
                return stage, code
        raise RuntimeError("each stage was over before it could be struck")

    def _try(self, fault: faults.Kind, stage: str) -> tuple[bool, int]:
        log = self.made.log(fault.command)
        start = log.stat().st_size if log.exists() else 0
        with ExitStack() as held, self._running(fault) as process:
            while process.poll() is None and not _says(log, start, f"Running stage '{stage}'"):
                time.sleep(0.02)
            time.sleep(self.draw.uniform(0, MOMENTS))
            struck = process.poll() is None and (fault.strike is None or fault.strike(self.made))
            if fault.hold:
                folder = self.made.folder
                inside = folder / next(iter(self.outputs[stage])).partition("/")[0]
                inside.mkdir(exist_ok=True)
                held.enter_context(fault.hold(inside if fault.hold is faults.read_only else folder))
        return struck, int(process.returncode)

    def _run(self, fault: faults.Kind) -> int:
        with self._running(fault) as process:
            pass
        return int(process.returncode)

    def _lock_is_broken(self) -> bool:
        """Whether `tpaw verify` says to delete dvc.lock: DVC writes it in place, so a full disk truncates it."""
        said = self.made.run("tpaw", "verify", check=False).stdout
        return any(line.startswith("dvc.lock: cannot be read") for line in said.splitlines())

    @contextmanager
    def _running(self, fault: faults.Kind) -> Iterator[psutil.Popen]:
        """Run the fault's command with its output in a log; wait for it, and kill it if it hangs."""
        self.made.preload()
        environment = dict(self.made.environment)
        if fault.strike is faults.lost_connection and self.made.proxy:
            environment["MLFLOW_TRACKING_URI"] = self.made.proxy.url
        with self.made.log("repro").open("ab") as log:
            process = psutil.Popen(
                COMMANDS[fault.command],
                cwd=self.made.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
                process.wait(PATIENCE)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait()

    def _differences(self) -> Iterator[str]:
        """What differs from the undisturbed run."""
        found = self.made.lock()
        for name, outs in self.outputs.items():
            for path, md5 in outs.items():
                # A team also names its members' versions, and these are new: `tpaw verify` checks it.
                if found.get(name, {}).get(path) != md5 and not path.startswith("teams/"):
                    yield f"{path} has other bytes"
        said = self.made.run("tpaw", "verify", check=False)
        if said.returncode != 0:
            yield said.stdout.splitlines()[0]

    def _duplicates(self) -> int:
        versions = self.made.client().search_model_versions(f"name='{MODEL}'")
        return sum(count - 1 for count in Counter(version.tags["digest"] for version in versions).values())


def _says(log: Path, start: int, text: str) -> bool:
    return log.exists() and text in log.read_bytes()[start:].decode(errors="replace")
