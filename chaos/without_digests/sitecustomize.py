"""Loaded by every Python of `python -m chaos --without-digests`: checkpoints and scores are taken as they are."""

from pathlib import Path

from tpaw_core.artifacts import checkpoint


class _Blind:
    """`workspace` as the score store sees it: each file has the sum that it is named for."""

    @staticmethod
    def sha256(path: Path) -> str:
        return path.stem


score_store.workspace = _Blind  # type: ignore[assignment]
checkpoint.verify = checkpoint.manifest
