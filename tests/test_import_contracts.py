"""The contracts in pyproject.toml catch a wrong import, wherever it is planted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in (ROOT / "tpaw_core").glob("*/__init__.py"))
LINTER = Path(sys.executable).with_name("lint-imports")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in ("tpaw_core", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def verdict(folder: Path) -> str:
    return subprocess.run([LINTER, "--no-cache"], cwd=folder, capture_output=True, text=True).stdout


def test_the_code_as_it_is_keeps_them(copied: Path) -> None:
    assert "0 broken" in verdict(copied)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_from_a_package_above_is_caught(package: str, copied: Path) -> None:
    planted = copied / "tpaw_core" / package / "planted.py"
    planted.write_text("def late() -> None:\n    from tpaw_core import cli\n\n    cli.main()\n")
    try:
        said = verdict(copied)
        assert "0 broken" not in said
        assert f"tpaw_core.{package}.planted -> tpaw_core.cli" in said
    finally:
        planted.unlink()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine/planted.py", "from tpaw_core.artifacts import checkpoint"),
        ("study/planted.py", "from tpaw_core.upkeep import verify"),
        ("report/planted.py", "import mlflow"),
        ("stages/planted.py", "import lm_eval"),
        ("data/planted.py", "from flows import dvc"),
        ("method/planted.py", "import transformers"),
        ("engine/planted.py", "import peft"),
        ("homeless.py", "import math"),
    ],
)
def test_so_are_neighbours_services_and_modules_without_a_room(module: str, line: str, copied: Path) -> None:
    planted = copied / "tpaw_core" / module
    planted.write_text(f"{line}\n")
    try:
        assert "0 broken" not in verdict(copied)
    finally:
        planted.unlink()
