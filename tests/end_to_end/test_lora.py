"""LoRA through DVC, MLflow and the command line: nothing is left to do, a killed training resumes, a base is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.workspace import BIN, COMMANDS, TINY, Project
from tpaw_core.artifacts import adapters, checkpoint
from tpaw_core.artifacts.training_log import read_log

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The demo with `lora.r=4`, tiny, after four iterations."""
    made = Project.make(tmp_path_factory.mktemp("lora") / "project", "lora.r=4", "sft.num_train_epochs=2", iterations=4)
    made.preload()
    made.run(*COMMANDS["repro"])
    yield made
    made.close()


def test_every_checkpoint_after_the_first_is_an_adapter_of_which_each_service_knows(adapted: Project) -> None:
    assert adapted.stale() == set()
    assert adapted.team(4) == [3, 2, 1]
    base = adapted.digest(0)
    for iteration in range(1, 5):
        manifest = checkpoint.verify(adapted.workspace, iteration)
        assert manifest.base is not None
        assert manifest.base.digest == base
        assert read_log(adapted.workspace, iteration)[0]["players/0/rewards/chosen"] == 0.0
    versions = {v.tags["iteration"]: v.tags for v in adapted.client().search_model_versions("name='tpaw-policy'")}
    assert {t: tags.get("base") for t, tags in versions.items()} == {"0": None, **dict.fromkeys("1234", base)}
    assert "no problems found" in adapted.run("tpaw", "verify").stdout
    assert adapted.run("tpaw", "lineage", "-t", "4").stdout.count("an adapter on: checkpoints/0") == 4


def test_a_killed_training_of_an_adapter_resumes_and_ends_in_the_same_bytes(adapted: Project) -> None:
    workspace = adapted.workspace
    folder, log = workspace.checkpoint(2), workspace.training_log(2).read_bytes()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    process = adapted.start(str(BIN / "tpaw"), "train", "-t", "2")
    state = workspace.training_state
    while process.poll() is None and not list(state.glob("2-*/checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not folder.exists(), "training ended before it could be killed"
    (left,) = state.glob("2-*/checkpoint-*")
    assert sum(path.stat().st_size for path in left.iterdir()) < 10 * len(before[adapters.WEIGHTS]), "no base in it"
    assert "resuming from" in adapted.run("tpaw", "train", "-t", "2").stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert workspace.training_log(2).read_bytes() == log


def test_pruning_keeps_the_base_and_an_export_needs_nothing_else(adapted: Project, tmp_path: Path) -> None:
    project = adapted.copy(tmp_path / "project")
    project.run("tpaw", "prune", "--yes")
    kept = {path.name for path in (project.folder / "checkpoints").iterdir()}
    assert {"0", "4"} <= kept
    assert "no problems found" in project.run("tpaw", "verify").stdout
    project.run("tpaw", "export", "-t", "4", str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").exists()
    project.close()


def test_a_study_compares_methods_on_adapters(adapted: Project, tmp_path: Path) -> None:
    made = Project.bare(tmp_path / "study")
    made.environment = adapted.environment
    small = ["lora.r=4", "data.max_train_rows=32", "data.max_heldout_rows=24", "sft.num_train_epochs=1"]
    options = [
        "--seeds",
        "1-2",
        "--rates",
        "1e-3",
        "--iterations",
        "2",
        "--validation-rows",
        "8",
        "--tuning-seeds",
        "1",
    ]
    methods = ["--method", "tpaw", "--method", "spin", "--method", "sft"]
    made.run("tpaw", "compare", "demo", *TINY, *small, *methods, *options)
    manifests = list((made.folder / "studies" / "demo").glob("cells/**/checkpoints/2/manifest.json"))
    assert len(manifests) == 6
    assert all('"source": "checkpoints/0"' in path.read_text() for path in manifests)
