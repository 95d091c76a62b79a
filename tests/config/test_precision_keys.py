from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tpaw_core.config import params_file
from tpaw_core.config.params import Params
from tpaw_core.errors import TpawError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def params(**changes: Any) -> Params:
    """Of a small recipe, with these dotted keys changed (a dot is written as two underscores)."""
    steps = {"learning_rate": 1e-3, "num_train_epochs": 1, "train_batch_size": 1}
    tree: dict[str, Any] = {
        "recipe": "mine",
        "model": {"model_name_or_path": "folder"},
        "data": {"path": "rows.jsonl"},
        "sft": dict(steps),
        "generation": {},
        "training": dict(steps),
        "iterations": {"1": {"previous": 0}},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return params_file.validate(tree, "mine.yaml")


@pytest.mark.parametrize("bf16", [True, False, "auto"])
@pytest.mark.parametrize(("dtype", "stored"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_what_is_stored_does_not_depend_on_what_is_multiplied(bf16: Any, dtype: str, stored: str) -> None:
    assert params(training__bf16=bf16, model__dtype=dtype).checkpoint_dtype == stored


def test_nothing_is_rounded_unless_someone_asks() -> None:
    plain = params()

    assert (plain.training.bf16, plain.sft.bf16) == (False, False)
    assert plain.generation.dtype == "float32"
    assert plain.checkpoint_dtype == "float32"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training__bf16", "yes", "mine.yaml: training.bf16: Input should be True, False or 'auto', got 'yes'"),
        ("sft__bf16", None, "mine.yaml: sft.bf16: Input should be True, False or 'auto', got None"),
        ("generation__dtype", "float16", "generation.dtype: Input should be 'auto', 'float32' or 'bfloat16'"),
    ],
)
def test_another_value_is_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(TpawError) as refused:
        params(**{key: value})

    assert message in str(refused.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_stores_what_it_trains(path: Path) -> None:
    recipe = params_file.load(path)

    assert True not in (recipe.sft.bf16, recipe.training.bf16), "bf16: true is slow where a device emulates it"
    if recipe.lora is None:
        assert recipe.checkpoint_dtype == "float32"
        assert (recipe.generation.dtype == "auto") == (recipe.training.bf16 == "auto")
    else:
        assert recipe.generation.dtype == "auto"
