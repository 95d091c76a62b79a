"""Where everything lies in a workspace: one object, made from the root folder and handed down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tpaw_core.errors import TpawError
from tpaw_core.workspace import files, lock, sums

OUTPUTS = (
    "data", "encoded", "checkpoints", "synthetic", "teams", "weights", "training", "metrics", "samples", "report"
)  # fmt: skip


@dataclass(frozen=True)
class Workspace:
    """A folder with params.yaml, dvc.yaml and what the stages make of them. Iteration t makes checkpoint t."""

    root: Path = Path()
    source: Path | None = None  # where relative paths to rows and models start; None: the root
    shared_scores: Path | None = None  # a score store that several workspaces use
    remembers: bool = True  # the sums of untouched files; False: all files are read

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"

    @property
    def recipes(self) -> Path:
        return self.root / "recipes"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def train_rows(self) -> Path:
        return self.data / "train.jsonl"

    @property
    def heldout_rows(self) -> Path:
        return self.data / "heldout.jsonl"

    @property
    def validation_rows(self) -> Path:
        """Exists where data.validation_rows asks for it."""
        return self.data / "validation.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "encoded" / "tokenizer"

    def encoded(self, name: str) -> Path:
        """The token ids of data/<name>.jsonl."""
        return self.root / "encoded" / f"{name}.parquet"

    @property
    def state(self) -> Path:
        """Local state of services, training and the score store; never an output."""
        return self.root / ".tpaw"

    @property
    def scores(self) -> Path:
        return self.shared_scores or self.state / "scores"

    @property
    def sums(self) -> Path:
        """The sums of files as they were last read."""
        return self.state / "sums.json"

    @property
    def training_state(self) -> Path:
        return self.state / "training"

    @property
    def flow_seconds(self) -> Path:
        """How long each stage of the last flow run took."""
        return self.state / "flow_seconds.json"

    @property
    def mlflow(self) -> Path:
        """MLflow's database and artifacts, where no server is named."""
        return self.state / "mlflow"

    @property
    def mlflow_database(self) -> str:
        """The database as a URL; MLflow would make folders of a quoted path where the driver is not named."""
        return f"sqlite+pysqlite:///{quote(str((self.mlflow / 'mlflow.db').resolve()))}"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def refuse_links(self) -> None:
        """DVC refuses outputs behind a link, but only when the stage that made them has ended."""
        if linked := [name for name in OUTPUTS if (self.root / name).is_symlink()]:
            raise TpawError(
                f"{self.root / linked[0]}: is a link, which DVC does not follow; to keep its contents on another "
                "disk, replace the link with an empty folder and bind-mount a folder from that disk onto it "
                "(mount --bind), or put the whole workspace on that disk"
            )

    def checkpoint(self, iteration: int) -> Path:
        return self.root / "checkpoints" / str(iteration)

    def synthetic(self, iteration: int) -> Path:
        return self.root / "synthetic" / f"{iteration}.parquet"

    def team(self, iteration: int) -> Path:
        return self.root / "teams" / f"{iteration}.json"

    def weights(self, iteration: int) -> Path:
        return self.root / "weights" / f"{iteration}.parquet"

    def training_log(self, iteration: int) -> Path:
        return self.root / "training" / f"{iteration}.jsonl"

    def metrics(self, iteration: int) -> Path:
        return self.root / "metrics" / f"{iteration}.json"

    def samples(self, iteration: int) -> Path:
        return self.root / "samples" / f"{iteration}.jsonl"

    def pruned(self, iteration: int) -> Path:
        """The manifest of a checkpoint that `tpaw prune` has deleted."""
        return self.state / "pruned" / f"{iteration}.json"

    def iterations(self, kind: str) -> list[int]:
        """The iterations for which a folder (checkpoints, synthetic, teams, ...) holds something."""
        names = [path.name.partition(".")[0] for path in (self.root / kind).glob("*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def name(self, path: Path) -> str:
        """A path in this workspace as its records write it: relative to the root, with slashes."""
        return path.relative_to(self.root).as_posix()

    def place(self, name: str) -> Path:
        """The inverse of `name`."""
        return self.root / name

    def input(self, path: str) -> Path:
        """A path that the user wrote in params.yaml."""
        return (self.source or self.root) / path

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a file, wherever it lies; see `sums.recall`."""
        return self.sha256s([path])[0]

    def sha256s(self, paths: Sequence[Path]) -> list[str]:
        return sums.recall(paths, self.sums) if self.remembers else sums.read(paths)

    def publish(self, target: Path) -> AbstractContextManager[Path]:
        return files.publish(target)

    def exclusive(self, who: str, what: str = "lock") -> AbstractContextManager[None]:
        """Only one writer at a time holds a workspace; see `lock.exclusive`."""
        return lock.exclusive(self.state, who, what)
