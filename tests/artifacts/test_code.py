from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tpaw_core.artifacts import code

SOURCE = '''"""What it is."""

import math


class Half:
    """A half."""

    SHARE = 0.5  # of one

    def of(self, x: float) -> float:
        """x / 2.

        Several lines.
        """
        # a comment of its own

        return x * self.SHARE  # trailing
'''
BARE = """import math
class Half:
    SHARE = 0.5
    def of(self, x: float) -> float:
        return x * self.SHARE
"""


def test_prose_is_left_out_and_nothing_else() -> None:
    assert code.without_prose(SOURCE) == BARE
    assert code.without_prose(BARE) == BARE


@pytest.mark.parametrize(
    "line",
    [
        "x = '# no comment'",
        'x = """no docstring"""',
        'x = """\n# no comment\n"""',
        "x = {'a': 1}  # {",
        "x = 1 \\\n    + 2",
    ],
)
def test_strings_and_continued_lines_are_code(line: str) -> None:
    assert code.without_prose(f"{line}\n") == f"{line.removesuffix('  # {')}\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, whose digests are asked for."""
    for part in ("method", "engine", "data", "stages"):
        shutil.copytree(code.PACKAGE / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    code.digests.cache_clear()
    yield tmp_path
    code.digests.cache_clear()


def again() -> dict[str, str]:
    code.digests.cache_clear()
    return code.digests()


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


def test_each_part_has_a_digest_of_its_own(package: Path) -> None:
    assert list(code.digests()) == ["method", "engine", "encoding"]
    assert len(set(code.digests().values())) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in code.digests().values())
    assert again() == code.digests()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"# a comment\n{text}",
        lambda text: text.replace("\n\n", "\n\n\n\n"),
        lambda text: text.replace('"""', '"""Reworded: ', 1),
        lambda text: text.replace("\n\n\n", "\n\n\n# between functions\n"),
        lambda text: re.sub(r'(    """)(TRW)', r"\1Now known as \2", text),
    ],
    ids=["a comment", "blank lines", "the module's docstring", "comments between", "a function's docstring"],
)
def test_comments_docstrings_and_blank_lines_change_no_digest(change: Callable[[str], str], package: Path) -> None:
    before = code.digests()
    rewrite(package / "method" / "objectives" / "tpaw.py", change)
    assert again() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "part"),
    [
        ("method/objectives/tpaw.py", "eta, 1.0", "eta, 2.0", "method"),
        ("method/early_warnings.py", "MOSTLY_EQUAL = 0.9", "MOSTLY_EQUAL = 0.8", "method"),
        ("engine/scoring.py", "batch_tokens: int = 16384", "batch_tokens: int = 8192", "engine"),
        ("engine/generation/choice.py", "argmax(-1)", "argmin(-1)", "engine"),
        ("engine/training/loop.py", '"sft"', '"SFT"', "engine"),
        ("data/endings.py", '"stop"', '"end"', "encoding"),
        ("data/encoding.py", "add_special_tokens=False", "add_special_tokens=True", "encoding"),
    ],
)
def test_a_changed_constant_changes_the_digest_of_its_part_alone(
    file: str, old: str, new: str, part: str, package: Path
) -> None:
    before = code.digests()
    rewrite(package / file, lambda text: text.replace(old, new))
    now = again()
    assert [name for name in code.PARTS if now[name] != before[name]] == [part]
    assert code.changed(before) == [part]
    assert code.changed(now) == []


def test_a_new_or_renamed_module_changes_the_digest(package: Path) -> None:
    before = code.digests()
    (package / "engine" / "new.py").write_text("X = 1\n")
    again()
    assert code.changed(before) == ["engine"]
    (package / "engine" / "new.py").unlink()
    assert again() == before
    (package / "method" / "lengths.py").rename(package / "method" / "by_length.py")
    again()
    assert code.changed(before) == ["method"]


def test_code_that_decides_no_bytes_does_not_count(package: Path) -> None:
    before = code.digests()
    rewrite(package / "stages" / "train.py", lambda text: f"{text}\nX = 1\n")
    rewrite(package / "data" / "sources.py", lambda text: f"{text}\nX = 1\n")
    assert again() == before


def test_what_a_manifest_does_not_record_is_not_reported_as_changed() -> None:
    assert code.changed({}) == []
    assert code.changed({"method": code.digests()["method"]}) == []
    assert code.changed({"method": "0" * 64, "engine": code.digests()["engine"]}) == ["method"]
    assert code.changed({**code.digests(), "a part of another version": "0" * 64}) == []
