"""What every stage gets: its workspace, the parameters, and the registry if there is one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import read_encoded
from tpaw_core.config.params import Params
from tpaw_core.data.rows import Row, read_rows
from tpaw_core.errors import TpawError
from tpaw_core.method.team import Candidate
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    from tpaw_core.data.encoding import EncodedRows
    from tpaw_core.engine.training.log import OnLog
    from tpaw_core.tracking.registry import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    workspace: Workspace
    params: Params
    registry: Registry | None = None

    def parent(self, iteration: int) -> Path:
        """The checkpoint that ``iteration`` starts from. Raises TpawError where it is missing."""
        folder = self.workspace.checkpoint(iteration - 1)
        if not folder.exists():
            how = "tpaw sft" if iteration == 1 else f"tpaw train --iteration {iteration - 1}"
            raise TpawError(f"{folder}: does not exist, but iteration {iteration} starts from it; make it with `{how}`")
        return folder

    def playing(self) -> Iterable[Row]:
        """The training rows that self-play uses."""
        return islice(read_rows(self.workspace.train_rows), self.params.data.max_self_play_rows)

    def encoded(self) -> EncodedRows:
        """The rows that self-play uses, as token ids."""
        return read_encoded(self.workspace, "train", self.params.data.max_self_play_rows)

    @property
    def encoded_digest(self) -> str:
        """Of the encoded training rows: what is made from them carries it."""
        return self.workspace.sha256(self.workspace.encoded("train"))

    @property
    def rows(self) -> tuple[Path, Path]:
        """The training rows as texts and as token ids, as a manifest names them."""
        return self.workspace.train_rows, self.workspace.encoded("train")

    def sums(self, paths: Sequence[Path]) -> dict[str, str]:
        """Files of the workspace and their digests, as a manifest records them."""
        return dict(zip(map(self.workspace.name, paths), self.workspace.sha256s(paths), strict=True))

    def source(self, name: str) -> str:
        """A base model: the folder of this name, if there is one, else a hub id."""
        folder = self.workspace.input(name)
        return str(folder) if folder.exists() else name

    def candidates(self, before: int) -> list[Candidate]:
        """The checkpoints before ``before`` that are in the registry or, without one, in checkpoints/."""
        workspace = self.workspace
        there = [t for t in range(before) if workspace.checkpoint(t).exists() or not workspace.pruned(t).exists()]
        if self.registry:
            return self.registry.candidates(there)
        return [Candidate(t, t + 1, checkpoint.manifest(workspace, t).digest) for t in there]

    def register(self, *, again: bool = False) -> list[tuple[int, int | None]]:
        """Make every checkpoint of the workspace a version of the registered model: (iteration, version) pairs."""
        if self.registry is None:
            raise TpawError("register: needs MLflow; `pip install mlflow`")
        made = [t for t in range(len(self.params.iterations) + 1) if self.workspace.checkpoint(t).exists()]
        return [(t, self.registry.register(t, again=again)) for t in made]

    def warn(self, warning: str | None, iteration: int) -> None:
        if warning is None:
            return
        logger.warning("iteration %d: %s", iteration, warning)
        if self.registry:
            self.registry.runs.warn(iteration, warning)

    @contextmanager
    def recorded(self, iteration: int) -> Iterator[OnLog]:
        """An ``on_log`` that sends training metrics to the iteration's run, ten entries at a time."""
        if self.registry is None:
            yield lambda step, metrics: None
            return
        registry, run = self.registry, self.registry.runs.iteration_run(iteration)
        waiting: list[tuple[int, dict[str, float]]] = []

        def flush() -> None:
            registry.runs.log_metrics(run, waiting)
            waiting.clear()

        def on_log(step: int, metrics: dict[str, float]) -> None:
            waiting.append((step, metrics))
            if len(waiting) >= 10:
                flush()

        yield on_log
        flush()


def open_context(workspace: Workspace, params: Params) -> Context:
    """With MLflow as the registry; without it where it is not installed, as on a bare machine that only trains.

    Raises TpawError where the workspace cannot hold outputs.
    """
    workspace.refuse_links()
    try:
        from tpaw_core.tracking.registry import Registry
    except ImportError as error:
        # "mlflow.entities" where a folder mlflow/ in the current one passes for the package.
        if (error.name or "").split(".")[0] != "mlflow":
            raise
        logger.warning("mlflow is not installed: this stage is not recorded")
        return Context(workspace, params)
    return Context(workspace, params, Registry(workspace, params))
