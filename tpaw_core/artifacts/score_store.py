"""The score store: the log-probability that a frozen checkpoint gave a row; computed once, kept for ever.

Keyed by (checkpoint digest, digest of the row's token ids, scoring settings and code): a path is not an identity. A
score's last bits depend on the rows it was computed with. So each file is tied to the sequence of requests that
produced it, and files of other sequences are ignored: the same requests always give the same bytes. Files are added and
never changed, each named by the digest of its bytes: a truncated or altered file is detected, and writers need no lock.
They are mapped, not read, so a store may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpaw_core.data.tokens import Pair, Some
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files

ENTRY = np.dtype([("key", "S16"), ("logp", "<f8")])
ENTRIES_PER_FILE = 1 << 16  # at most this many new scores are lost when a process is killed
logger = logging.getLogger(__name__)
Scorer = Callable[[Sequence[Pair]], Iterable[tuple[Sequence[int], Sequence[float]]]]


def key(pair: Pair) -> bytes:
    """Digest of a row's ids; where the prompt ends is part of it."""
    prompt, response = pair
    return hashlib.sha256(array("q", [len(prompt), *prompt, *response]).tobytes()).digest()[:16]


def keys(pairs: Sequence[Pair]) -> NDArray[np.bytes_]:
    return np.frombuffer(b"".join(map(key, pairs)), ENTRY["key"])


class Request(NamedTuple):
    """Pairs that are scored together, by their keys."""

    named: NDArray[np.bytes_]  # [pairs]
    asked: NDArray[np.bytes_]  # the distinct ones, sorted
    first: NDArray[np.int64]  # where each of them is named first
    where: NDArray[np.int64]  # [pairs] -> asked

    @classmethod
    def of(cls, named: NDArray[np.bytes_]) -> Request:
        return cls(named, *np.unique(named, return_index=True, return_inverse=True))


class ScoreStore:
    """Scores of one checkpoint under one setting, along one sequence of requests."""

    def __init__(self, root: Path, checkpoint_digest: str, settings: str) -> None:
        self._root = root / checkpoint_digest[:32] / settings
        self._requests = hashlib.sha256()
        self._files: list[NDArray[np.void]] = []

    def scores(
        self, pairs: Sequence[Pair], score: Scorer, request: Request | None = None
    ) -> tuple[NDArray[np.float64], int]:
        """The score of each pair, and how many were computed now.

        ``score`` is called with the distinct new pairs, if there are any, and yields (positions, scores).
        ``request``: that of ``pairs``, where the caller has it.
        """
        named, asked, first, where = request or Request.of(keys(pairs))
        self._requests.update(named.tobytes() + b"end of a request")
        folder = self._root / self._requests.hexdigest()[:32]
        self._files += _whole(folder)
        values = np.full(len(asked), np.nan)
        new = np.ones(len(asked), bool)
        for file in self._files:  # each is small, and looked up in what is asked
            place = np.searchsorted(asked, file["key"]).clip(max=len(asked) - 1)
            hit = asked[place] == file["key"]
            values[place[hit]] = file["logp"][hit]
            new[place[hit]] = False
        missing = np.flatnonzero(new)
        if len(missing):
            missing = missing[np.argsort(first[missing])]  # in the order of the pairs
            waiting: list[NDArray[np.int64]] = []
            for positions, found in score(Some(pairs, first[missing])):
                waiting.append(missing[np.asarray(positions)])
                values[waiting[-1]] = found
                if sum(map(len, waiting)) >= ENTRIES_PER_FILE:
                    _add(folder, asked, values, waiting)
            _add(folder, asked, values, waiting)
            self._files += [read(path) for path in sorted(folder.glob("*.npy"))]
        return values[where], len(missing)


def _whole(folder: Path) -> list[NDArray[np.void]]:
    """The files of one request; none where one is damaged, so that all are computed as they were then."""
    try:
        return [read(path) for path in sorted(folder.glob("*.npy"))]
    except TpawError as error:
        logger.warning("%s", error)
        shutil.rmtree(folder)
        return []


def _add(
    folder: Path, asked: NDArray[np.bytes_], values: NDArray[np.float64], waiting: list[NDArray[np.int64]]
) -> None:
    """Write what waits as one more file, sorted by key."""
    if not waiting:
        return
    places = np.sort(np.concatenate(waiting))
    waiting.clear()
    entries = np.empty(len(places), ENTRY)
    entries["key"], entries["logp"] = asked[places], values[places]
    content = io.BytesIO()
    np.save(content, entries)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{uuid.uuid4().hex}"
    try:
        aside.write_bytes(content.getbuffer())
        os.replace(aside, folder / f"{name(content.getbuffer())}.npy")
    finally:
        aside.unlink(missing_ok=True)


def name(content: bytes | memoryview) -> str:
    """What a file with these bytes is called."""
    return hashlib.sha256(content).hexdigest()[:32]


def read(path: Path) -> NDArray[np.void]:
    """One file's entries, mapped.

    Raises TpawError where its bytes are not those it is named for, or not entries.
    """
    try:
        if not files.sha256(path).startswith(path.stem):
            raise ValueError("its contents do not match the digest in its name")
        entries: NDArray[np.void] = np.lib.format.open_memmap(path, mode="r")
        if entries.dtype != ENTRY or entries.ndim != 1:
            raise ValueError("it does not hold scores")
        return entries
    except Exception as error:  # numpy has many for a broken header
        raise TpawError(f"{path}: is damaged ({error}); its rows will be scored again by `tpaw weights`") from None
