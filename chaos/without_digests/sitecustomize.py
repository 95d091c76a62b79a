"""Loaded by every Python of `python -m chaos --without-digests`: checkpoints and scores are used unchecked."""

from pathlib import Path

from tpaw_core.artifacts import checkpoint, score_store


class _Blind:
    """`files` as the score store sees it: each file has the sum that its name gives."""

    @staticmethod
    def sha256(path: Path) -> str:
        return path.stem


score_store.files = _Blind  # type: ignore[assignment]
checkpoint.verify = checkpoint.manifest
