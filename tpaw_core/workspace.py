"""Where things lie in a workspace, and how they get there: written aside, then renamed; one writer at a time."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from tpaw_core.errors import TpawError

STATE = Path(".tpaw")  # local state of services, training and the score store; never an output
DATA = Path("data")
TRAIN_ROWS = DATA / "train.jsonl"
HELDOUT_ROWS = DATA / "heldout.jsonl"
VALIDATION_ROWS = DATA / "validation.jsonl"  # where data.validation_rows asks for it
SCORES = STATE / "scores"
TRAINING_STATE = STATE / "training"
FLOW_SECONDS = STATE / "flow_seconds.json"  # what each stage of the last flow run took


class Removal(NamedTuple):
    """Something that can go. ``remove`` may be called twice."""

    what: str
    bytes: int
    remove: Callable[[], None]


def checkpoint(iteration: int) -> Path:
    return Path("checkpoints") / str(iteration)


def synthetic(iteration: int) -> Path:
    return Path("synthetic") / f"{iteration}.parquet"


def team(iteration: int) -> Path:
    return Path("teams") / f"{iteration}.json"


def weights(iteration: int) -> Path:
    return Path("weights") / f"{iteration}.parquet"


def training_log(iteration: int) -> Path:
    return Path("training") / f"{iteration}.jsonl"


def metrics(iteration: int) -> Path:
    return Path("metrics") / f"{iteration}.json"


def samples(iteration: int) -> Path:
    return Path("samples") / f"{iteration}.jsonl"


def pruned(iteration: int) -> Path:
    """The manifest of a checkpoint that `tpaw prune` has removed."""
    return STATE / "pruned" / f"{iteration}.json"


def iterations(kind: str) -> list[int]:
    """The iterations that a folder (checkpoints, synthetic, teams, ...) has something of."""
    names = [path.name.partition(".")[0] for path in Path(kind).glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file or a folder at; it becomes ``target`` only when all went well.

    A failure, a full disk included, leaves what ``target`` held before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    made = aside / target.name
    try:
        yield made
        if target.is_dir() and not target.is_symlink():
            target.rename(aside / "replaced")
            try:
                os.replace(made, target)
            except OSError:
                (aside / "replaced").rename(target)
                raise
        else:
            os.replace(made, target)
    except OSError as error:
        raise TpawError(
            f"{target}: could not be written ({error.strerror or error}); free space or mend rights"
        ) from None
    except Exception as error:
        if said := disk_full(error):
            raise said from None
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def disk_full(error: Exception) -> TpawError | None:
    """What to say instead where the disk is full: libraries raise errors of their own that do not tell."""
    told = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(".").free < 1 << 20
    if isinstance(error, TpawError) or not told:
        return None
    return TpawError(
        f"{Path.cwd()}: the disk is full ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
        "free space and run the same command again, what was finished before is kept"
    )


@contextmanager
def exclusive(who: str, what: str = "lock") -> Iterator[None]:
    """Hold the workspace while a stage writes, or "flow", its parameters while a flow runs.

    Whoever comes second waits, and says for whom. Freed when the holder dies.
    """
    STATE.mkdir(exist_ok=True)
    holder = STATE / f"{what}.holder"
    lock = FileLock(STATE / what)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text() if holder.exists() else "another one"
        print(f"{who}: waiting for {name} in this workspace", flush=True)
        lock.acquire()
    try:
        holder.write_text(f"{who} (process {os.getpid()})")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need(path: Path, remedy: str) -> Path:
    if not path.exists():
        raise TpawError(f"{path}: does not exist; {remedy}")
    return path
