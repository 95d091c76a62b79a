from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw_core.config import params_file
from tpaw_core.engine import precision
from tpaw_core.errors import TpawError
from tpaw_core.stages import storage, train
from tpaw_core.stages.context import Context
from tpaw_core.workspace.paths import Workspace


class Runs:
    """Stands for MLflow's runs, and keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.warnings: list[str] = []

    def iteration_run(self, iteration: int) -> int:
        return iteration

    def log_metrics(self, run: int, entries: Any) -> None:
        for _, metrics in entries:
            self.metrics.update(metrics)

    def warn(self, iteration: int, warning: str) -> None:
        self.warnings.append(warning)


def context(folder: Path, *, registry: Any = None, **changes: Any) -> Context:
    steps = {"learning_rate": 1e-3, "num_train_epochs": 1, "train_batch_size": 1}
    tree: dict[str, Any] = {
        "recipe": "mine",
        "model": {"model_name_or_path": "base", "dtype": changes.get("dtype", "auto")},
        "data": {"path": "rows.jsonl"},
        "sft": {**steps, "enabled": changes.get("enabled", True)},
        "objective": {"name": changes.get("objective", "tpaw")},
        "team": {"players": 1},
        "training": {**steps, "bf16": changes.get("bf16", False)},
        "iterations": {"1": {"previous": 0}, "2": {"previous": 1}},
    }
    return Context(Workspace(folder), params_file.validate(tree, "mine.yaml"), registry)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    return LlamaForCausalLM(config).eval().bfloat16()


@pytest.fixture
def base(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The model as released, in bfloat16."""
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(model: LlamaForCausalLM, change: float) -> LlamaForCausalLM:
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + change
    return model


@pytest.mark.parametrize(
    ("dtype", "change", "kept", "warned"),
    [
        ("auto", 1e-6, 1.0, False),
        ("float32", 1e-6, 1.0, False),
        ("bfloat16", 1e-6, 0.0, True),
        ("bfloat16", 0.5, 1.0, False),
    ],
)
@pytest.mark.parametrize("from_nothing", [False, True])
def test_the_share_that_is_kept_is_said_recorded_and_warned_of(
    model: LlamaForCausalLM,
    base: Path,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    change: float,
    kept: float,
    warned: bool,
    from_nothing: bool,
) -> None:
    if from_nothing:  # all of the weights is update
        kept, warned = 1.0, False
    runs = Runs()
    asked = context(base.parent, registry=SimpleNamespace(runs=runs), dtype=dtype)
    with caplog.at_level(logging.INFO, "tpaw_core"):
        storage.report_kept(asked, 1, trained(model, change), None if from_nothing else base)

    assert runs.metrics["checkpoint/update_kept"] == pytest.approx(kept, abs=0.01)
    assert f"checkpoint 1 is stored in {asked.params.checkpoint_dtype} and keeps" in caplog.text
    assert [record.levelname for record in caplog.records].count("WARNING") == warned
    assert bool(runs.warnings) == warned
    assert ("set model.dtype=float32" in caplog.text) == warned
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # only looked at


def test_it_is_said_without_a_registry_too(model: LlamaForCausalLM, base: Path) -> None:
    storage.report_kept(context(base.parent), 1, trained(model, 1e-6), base)


@pytest.mark.parametrize(
    ("iteration", "enabled", "dtype", "stored"),
    [
        (0, False, "auto", "bfloat16"),  # a ready model as it came
        (0, False, "float32", "float32"),
        (0, True, "auto", "float32"),
        (1, False, "auto", "float32"),
        (1, True, "bfloat16", "bfloat16"),
    ],
)
def test_a_ready_model_stays_as_it_came(
    model: LlamaForCausalLM, tmp_path: Path, iteration: int, enabled: bool, dtype: str, stored: str
) -> None:
    assert storage.dtype(context(tmp_path, enabled=enabled, dtype=dtype), iteration, model) == stored


def test_sizes_are_said_before_a_run(model: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tpaw_core"):
        storage.report_size(context(tmp_path, enabled=False), model)

    parameters = 2 * 50 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    assert model.num_parameters() == parameters == 4208
    assert caplog.messages == [  # 2 * 4208 bytes for the ready model, 4 * 4208 for each of two that are trained
        "a checkpoint of 4,208 parameters in float32 takes 16.8 kB on disk; this run's 3 take 42.1 kB"
    ]
    assert precision.checkpoint_bytes(8_030_261_248, "float32") == 32_121_044_992


def weights(asked: Context, scored: str | None) -> Path:
    path = asked.workspace.weights(1)
    path.parent.mkdir()
    metadata = {"precision": scored} if scored else {}
    pq.write_table(pa.table({"prompt_id": ["a"]}).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize("scored", ["float32", "bfloat16"])
def test_auto_trains_as_the_judges_scored_on_whatever_device(tmp_path: Path, scored: str) -> None:
    asked = context(tmp_path, bf16="auto")
    weights(asked, scored)

    assert train._settings(asked, 1).bf16 is (scored == "bfloat16")


@pytest.mark.parametrize("objective", ["tpaw", "sft"])
def test_auto_asks_the_device_where_nothing_was_scored(tmp_path: Path, objective: str) -> None:
    asked = context(tmp_path, bf16="auto", objective=objective)
    if objective == "tpaw":  # from before it was recorded
        weights(asked, None)

    assert train._settings(asked, 1).bf16 is (precision.fastest().precision == "bfloat16")


@pytest.mark.parametrize(("scored", "bf16"), [("float32", True), ("bfloat16", False)])
def test_training_in_another_precision_than_the_judges_is_refused(tmp_path: Path, scored: str, bf16: bool) -> None:
    asked = context(tmp_path, bf16=bf16)
    path = weights(asked, scored)

    with pytest.raises(TpawError) as refused:
        train._settings(asked, 1)

    assert str(refused.value) == (
        f"{path}: was scored in {scored}, but training.bf16={str(bf16).lower()} asks for the other precision; "
        "recreate it with `tpaw weights --iteration 1`"
    )
