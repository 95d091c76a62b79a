"""The score store: what log-probability a frozen checkpoint gave a row; computed once, kept for ever.

Keyed by (checkpoint digest, digest of the row's token ids, scoring settings): a path or a name is not an identity.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tpaw_core import workspace
from tpaw_core.errors import TpawError
from tpaw_core.scoring import Pair


def key(pair: Pair) -> bytes:
    """Digest of a row's ids; where the prompt ends is part of it."""
    prompt, response = pair
    return hashlib.sha256(array("q", [len(prompt), *prompt, *response]).tobytes()).digest()[:16]


class ScoreStore:
    """Scores of one checkpoint under one setting: a folder of Parquet files, each complete or absent."""

    def __init__(self, root: Path, checkpoint_digest: str, settings: str) -> None:
        self.folder = root / checkpoint_digest[:32] / settings
        self._scores: dict[bytes, float] = {}
        for file in sorted(self.folder.glob("*.parquet")):
            try:
                table = pq.read_table(file)
                self._scores.update(zip(table["key"].to_pylist(), table["logp"].to_pylist(), strict=True))
            except (pa.ArrowException, KeyError) as error:
                raise TpawError(f"{file}: is damaged ({error}); delete it, its rows are scored again") from None

    def scores(self, pairs: Sequence[Pair], score: Callable[[list[Pair]], list[float]]) -> tuple[list[float], int]:
        """The score of each pair, and how many were new; ``score`` is called once, with the distinct new pairs."""
        keys = [key(pair) for pair in pairs]
        new = {k: pair for k, pair in zip(keys, pairs, strict=True) if k not in self._scores}
        if new:
            values = score(list(new.values()))
            self._scores.update(zip(new, values, strict=True))
            number = max((int(file.stem) for file in self.folder.glob("*.parquet")), default=-1) + 1
            with workspace.publish(self.folder / f"{number:06d}.parquet") as aside:
                pq.write_table(pa.table({"key": list(new), "logp": pa.array(values, pa.float64())}), aside)
        return [self._scores[k] for k in keys], len(new)
