"""The walls between the parts: who imports whom, and what runs where half of the stack is missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path for part in ("tpaw_core", "flows") for path in (ROOT / part).glob("*.py")
}
PURE = {"__future__", "collections", "dataclasses", "math", "typing", "numpy", "torch"}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def run(code: str, folder: Path, *options: str, **environment: str) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("module", "more"), [("objective", set()), ("weights", set()), ("team", set()), ("alarms", set())]
)
def test_the_method_knows_nothing_of_files_models_or_services(module: str, more: set[str]) -> None:
    roots = {name.split(".")[0] for name in imported(SOURCES[f"tpaw_core/{module}.py"]) if name not in more}
    assert roots
    assert roots <= PURE


@pytest.mark.parametrize("module", ["training", "scoring", "logps", "attention", "packing"])
def test_the_engine_needs_torch_and_transformers_only(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(SOURCES[f"tpaw_core/{module}.py"])}
    assert roots <= PURE | {"contextlib", "functools", "json", "math", "pathlib", "transformers", "tpaw_core"}


@pytest.mark.parametrize("source", [name for name in SOURCES if name.startswith("flows/")])
def test_flows_import_no_model_library(source: str) -> None:
    roots = {name.split(".")[0] for name in imported(SOURCES[source])}
    assert not roots & {"torch", "transformers", "lm_eval", "datasets"}


@pytest.mark.parametrize(
    ("service", "home"),
    [
        ("prefect", ("flows/",)),
        ("mlflow", ("tpaw_core/registry.py", "tpaw_core/study_record.py")),
        ("lm_eval", ("tpaw_core/evaluation.py",)),
    ],
)
def test_each_service_is_known_in_its_place(service: str, home: tuple[str, ...]) -> None:
    users = {name for name, path in SOURCES.items() if service in {n.split(".")[0] for n in imported(path)}}
    assert users
    assert all(name.startswith(home) for name in users - {"tpaw_core/services.py"})


@pytest.mark.parametrize("source", [name for name in SOURCES if name.startswith("tpaw_core/")])
def test_the_engine_does_not_import_the_flows(source: str) -> None:
    assert "flows" not in {name.split(".")[0] for name in imported(SOURCES[source])}


def test_importing_the_flow_loads_no_torch() -> None:
    code = "import sys, flows.tpaw; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    assert run(code, ROOT).strip() == "[]"


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys; sys.argv = ['tpaw', '--help']\n"
        "from tpaw_core.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'transformers', 'mlflow', 'prefect', 'lm_eval', 'pandas') if m in sys.modules])"
    )
    *text, loaded = run(code, ROOT).strip().splitlines()
    assert loaded == "[]"
    assert any("Usage" in line for line in text)


STEP = """
import importlib.util
from pathlib import Path

assert not any(map(importlib.util.find_spec, ("prefect", "mlflow", "dvc")))
from tpaw_core import config, scoring, scratch, training

own = config.Scratch(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
tokenizer = scratch.tokenizer(["some text"], own, 32)
model = scratch.model(own, tokenizer, max_length=32, seed=0)
logps = scoring.score(model, [([5, 6], [7, 8]), ([5, 6], [9])], pad_id=0)
group = training.Group([5, 6], [7, 8], [[9]], [logps[0]], [[logps[1]]], [[1.0]])
settings = config.Optimisation(learning_rate=1e-3, num_train_epochs=1, per_device_train_batch_size=1, warmup_ratio=0)
options = {"pad_id": 0, "seed": 0, "state": Path("state"), "on_log": lambda step, metrics: None}
log = training.self_play(model, [group], config.Objective(), settings, **options)
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


def test_scoring_and_training_run_on_a_machine_without_prefect_mlflow_and_dvc(bare: Path, tmp_path: Path) -> None:
    assert run(STEP, tmp_path, "-S", PYTHONPATH=str(bare)).splitlines() == ["1 step"]


@pytest.mark.parametrize("folders", [[], ["mlflow"]], ids=["elsewhere", "beside the project's folder mlflow/"])
def test_without_mlflow_a_stage_goes_on_and_is_not_recorded(folders: list[str], bare: Path, tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    code = "from tpaw_core import config, stages; print(stages.open_registry(config.load(config.Path({!r}))))"
    assert run(code.format(str(ROOT / "recipes" / "demo.yaml")), tmp_path, "-S", PYTHONPATH=str(bare)) == "None\n"
