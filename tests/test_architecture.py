"""What runs where half of the stack is missing, and what a start loads. Who may import whom: see pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "mlflow", "prefect", "dvc", "lm_eval", "datasets", "pandas", "pyarrow", "matplotlib")


def run(code: str, folder: Path, *options: str, **environment: str) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_flow_loads_no_torch() -> None:
    code = "import sys, flows.tpaw; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    assert run(code, ROOT).strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_answers_without_the_heavy_libraries(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['tpaw', *{arguments}]\n"
        "from tpaw_core.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    *text, loaded = run(code, ROOT).strip().splitlines()
    assert loaded == "[]"
    assert any("Usage" in line for line in text)


STEP = """
import importlib.util
from pathlib import Path

assert not any(map(importlib.util.find_spec, ("prefect", "mlflow", "dvc")))
from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Objective, Scratch
from tpaw_core.engine import scoring, scratch
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group

own = Scratch(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
tokenizer = scratch.tokenizer(["some text"], own, 32)
model = scratch.model(own, tokenizer, max_length=32, seed=0)
logps = scoring.score(model, [([5, 6], [7, 8]), ([5, 6], [9])], pad_id=0)
group = Group([5, 6], [7, 8], [[9]], [logps[0]], [[logps[1]]], [[1.0]])
settings = Optimisation(learning_rate=1e-3, num_train_epochs=1, train_batch_size=1, warmup_ratio=0)
options = {"pad_id": 0, "seed": 0, "state": Path("state"), "on_log": lambda step, metrics: None}
log = loop.self_play(model, [group], Objective(), settings, **options)
assert scoring.score(model, [([5, 6], [7, 8])], pad_id=0)[0] != logps[0]
print(len(log), "step")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a machine that only trains: every installed one but Prefect, MLflow and DVC, and tpaw_core."""
    folder = tmp_path_factory.mktemp("packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.lower().startswith(("prefect", "mlflow", "dvc")):
            (folder / package.name).symlink_to(package)
    (folder / "tpaw_core").symlink_to(ROOT / "tpaw_core")
    return folder


@pytest.mark.slow
def test_scoring_and_training_run_on_a_machine_without_prefect_mlflow_and_dvc(bare: Path, tmp_path: Path) -> None:
    assert run(STEP, tmp_path, "-S", PYTHONPATH=str(bare)).splitlines() == ["1 step"]


@pytest.mark.parametrize("folders", [[], ["mlflow"]], ids=["elsewhere", "beside the project's folder mlflow/"])
def test_without_mlflow_a_stage_runs_unrecorded(folders: list[str], bare: Path, tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    recipe = ROOT / "recipes" / "demo.yaml"
    code = (
        "from pathlib import Path\n"
        "from tpaw_core import console\n"
        "from tpaw_core.config import params_file\n"
        "from tpaw_core.stages.context import open_context\n"
        "from tpaw_core.workspace.paths import Workspace\n"
        "console.show()\n"
        f"print(open_context(Workspace(), params_file.load(Path({str(recipe)!r}))).registry)"
    )
    warning = "warning: mlflow is not installed: this stage is not recorded"
    assert run(code, tmp_path, "-S", PYTHONPATH=str(bare)).splitlines() == [warning, "None"]
