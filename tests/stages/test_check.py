"""`tpaw check`: everything that a run would refuse, in one list, and nothing where there is nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw_core.config import params_file
from tpaw_core.engine import scratch
from tpaw_core.errors import TpawError
from tpaw_core.stages.check import check
from tpaw_core.stages.context import Context
from tpaw_core.workspace.paths import Workspace

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["data.max_train_rows=40", "data.max_heldout_rows=10"]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "recipes").symlink_to(RECIPES)
    return Workspace(tmp_path)


def checked(workspace: Workspace, recipe: str, *overrides: str) -> str:
    """What `tpaw check` refuses; empty where it refuses nothing."""
    params = params_file.switch(workspace, recipe, overrides)
    try:
        check(Context(workspace, params))
    except TpawError as error:
        return str(error)
    return ""


def test_the_demo_has_nothing_to_fix(workspace: Workspace) -> None:
    assert checked(workspace, "demo", *SMALL) == ""


def test_checkpoints_on_another_disk_need_room_there(
    workspace: Workspace, mount_small_disk: Callable[[Path], Path]
) -> None:
    disk = mount_small_disk(workspace.root / "checkpoints")
    found = checked(workspace, "demo", *SMALL)
    assert (
        f"- disk: the checkpoints of all iterations need 14.0 MB, but only 2.1 MB is free in {disk}; free up" in found
    )


@pytest.fixture
def own(workspace: Workspace) -> Callable[..., str]:
    """Checks a tiny Llama and rows of one's own, with something broken."""
    made = [(f"How many wheels have {n} carts?", f"{n} times 2 is {2 * n}.\n#### {2 * n}") for n in range(60)]
    for name, some in (("train", made[:40]), ("heldout", made[40:])):
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in some]
        (workspace.root / f"{name}.jsonl").write_text("\n".join(lines))
    settings = params_file.load(RECIPES / "demo.yaml").model.scratch
    assert settings is not None
    tokenizer = scratch.tokenizer([text for pair in made for text in pair], settings, 64)

    def run(*overrides: str, break_model: Callable[[Path], None] | None = None, **config: Any) -> str:
        folder = workspace.root / "model"
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(tokenizer), **sizes, **ids, **config})).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
        if break_model is not None:
            break_model(folder)
        paths = ["model.model_name_or_path=model", "data.path=train.jsonl", "data.heldout_path=heldout.jsonl"]
        return checked(workspace, "own", *paths, "model.max_length=64", *overrides)

    return run


def change(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def test_a_sound_model_and_rows_have_nothing_to_fix(own: Callable[..., str]) -> None:
    assert own() == ""


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        (["data.path=nowhere.jsonl"], {}, r"nowhere\.jsonl: does not exist"),
        (["model.model_name_or_path=nowhere"], {}, "model 'nowhere': cannot be loaded"),
        (["model.max_length=5"], {}, r"train\.jsonl: .* \(model\.max_length is 5\)"),
        (["evaluation.answer_pattern=@@ (\\d+)"], {}, "finds no answer in its target"),
        (["evaluation.metric=acc"], {}, "heldout is scored by exact_match"),
        pytest.param(["evaluation.tasks=[heldout, gsm9k]"], {}, "has no task named 'gsm9k'", marks=pytest.mark.slow),
        (
            ["model.chat_template={% for m in messages %}{{ 'x' }}{% endfor %}"],
            {},
            "leaves out this row's 'user' message",
        ),
        (["model.chat_template={% for m in %}"], {}, "not valid Jinja"),
        (["training.optim=foo"], {}, "training: .*optim=foo.* not a valid"),
        (["sft.lr_scheduler_type=cosine_with_min_lr"], {}, "sft: .*min_lr"),
        (["generation.backend=vllm", "generation.python=/nowhere/python"], {}, "no such interpreter"),
        (["generation.backend=vllm", "generation.python=/usr/bin/env"], {}, "has no vllm"),
        (["model.chat_template=missing.jinja"], {}, r"missing\.jinja: does not exist"),
        ([], {"vocab_size": 200}, "have no embedding"),
        ([], {"break_model": change("config.json", quantization_config={"quant_method": "awq"})}, "is quantised"),
        ([], {"break_model": change("config.json", model_type="t5")}, "model"),
        ([], {"break_model": lambda folder: (folder / "model.safetensors").unlink()}, "cannot be loaded"),
    ],
)
def test_one_broken_thing_is_named(
    own: Callable[..., str], overrides: list[str], options: dict[str, Any], reason: str
) -> None:
    said = own(*overrides, **options)
    assert re.search(reason, said), said


@pytest.mark.slow  # reads the harness's list of tasks
def test_several_are_listed_together(own: Callable[..., str]) -> None:
    said = own(
        "model.max_length=5",
        "evaluation.metric=acc",
        "evaluation.tasks=[heldout, gsm9k]",
        "sft.optim=foo",
        vocab_size=200,
    )
    for part in ("optim=foo", "model.max_length is 5", "scored by exact_match", "no task named", "have no embedding"):
        assert part in said
    assert said.startswith(f"{said.count(chr(10) + '- ')} problems to fix before a run:")


def test_broken_rows_alone_are_one_thing_to_fix(workspace: Workspace) -> None:
    """Neither that data/ is missing, nor what the rows of another recipe lack, which data/ still holds."""
    for name, line in (("train", '{"prompt": "2 + 2"}'), ("heldout", '{"prompt": "3 + 3", "completion": "#### 6"}')):
        (workspace.root / f"{name}.jsonl").write_text(line)
    broken = ["data.path=train.jsonl", "data.heldout_path=heldout.jsonl", "data.max_train_rows=null"]
    alone = f"1 problem to fix before a run:\n- {workspace.root / 'train.jsonl'}: "
    assert checked(workspace, "demo", *broken).startswith(alone)
    assert checked(workspace, "demo", *SMALL) == ""
    other = [*broken, "evaluation.answer_pattern=@@ (\\d+)"]
    assert checked(workspace, "demo", *other).startswith(alone)
