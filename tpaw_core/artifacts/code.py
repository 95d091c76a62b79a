"""The code that decides bytes: a digest per part, which a manifest names.

What counts is the text of a part's modules without comments, docstrings and blank lines. Nothing is made again because
a digest differs: `tpaw verify` and `tpaw lineage` report it, and a rerun is something to ask for.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PARTS = {
    "method": ("method/**/*.py",),
    "engine": ("engine/**/*.py",),
    "encoding": ("data/encoding.py", "data/endings.py"),
}


@cache
def digests() -> dict[str, str]:
    """SHA-256 of each part as it is installed."""
    return {part: _digest(part) for part in PARTS}


def changed(recorded: Mapping[str, str]) -> list[str]:
    """The parts whose code differs from what a manifest records; none where it records nothing."""
    return [part for part, digest in digests().items() if recorded.get(part, digest) != digest]


def _digest(part: str) -> str:
    total = hashlib.sha256()
    for path in sorted(path for pattern in PARTS[part] for path in PACKAGE.glob(pattern)):
        total.update(
            f"{path.relative_to(PACKAGE).as_posix()}\n{without_prose(path.read_text(encoding='utf-8'))}".encode()
        )
    return total.hexdigest()


def without_prose(source: str) -> str:
    """A module's text without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for row in range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1):
                lines[row - 1] = ""
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())
