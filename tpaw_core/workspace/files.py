"""Files and folders: written beside their target, then renamed into place; digests of what they hold."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_core.errors import TpawError


class Deletion(NamedTuple):
    """Something that `tpaw prune` can delete. ``delete`` may be called twice."""

    what: str
    bytes: int
    delete: Callable[[], None]


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """A temporary path for a file or a folder, which replaces ``target`` once the block has ended without an error.

    A failure, a full disk included, leaves ``target`` as it was.
    """
    with _cannot_be_written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    made = aside / target.name
    try:
        try:
            yield made
        except Exception as error:
            if full := disk_full(error, target.parent):
                raise full from None
            raise
        with _cannot_be_written(target):
            _replace(made, target, aside / "replaced")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(made: Path, target: Path, replaced: Path) -> None:
    """A folder cannot be renamed onto another one: the old one makes room first, and comes back on failure."""
    if not target.is_dir() or target.is_symlink():
        os.replace(made, target)
        return
    target.rename(replaced)
    try:
        os.replace(made, target)
    except OSError:
        replaced.rename(target)
        raise


@contextmanager
def _cannot_be_written(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{target}: could not be written ({error.strerror or error})"
        raise TpawError(f"{what}; free up space or fix the permissions") from None


def disk_full(error: BaseException, folder: Path) -> TpawError | None:
    """A message for an error that a full disk caused: libraries raise errors of their own that do not say so."""
    full = os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < 1 << 20
    if isinstance(error, TpawError) or not full:
        return None
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TpawError(
        f"{folder.resolve()}: the disk is full ({reason}); free up space and run the same command again. "
        "Finished stages are kept"
    )


def explanation(error: BaseException, folder: Path) -> str | None:
    """What to tell the user instead of a traceback; None where only a traceback can help."""
    if isinstance(error, TpawError):
        return str(error)
    if full := disk_full(error, folder):
        return str(full)
    if isinstance(error, OSError) and error.filename is not None:
        advice = "; fix its permissions" if isinstance(error, PermissionError) else ""
        return f"{error.filename}: {error.strerror}{advice}"
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def need(path: Path, remedy: str) -> Path:
    """``path``, which must exist."""
    if not path.exists():
        raise TpawError(f"{path}: does not exist; {remedy}")
    return path
