"""Every recipe: the memory it plans for the model it names, and one iteration of a tiny model like that one."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from tpaw_core.artifacts.metrics import read_metrics
from tpaw_core.config import params_file
from tpaw_core.data import arithmetic
from tpaw_core.errors import TpawError
from tpaw_core.stages.check import check
from tpaw_core.stages.context import Context
from tpaw_core.stages.encode import encode
from tpaw_core.stages.evaluate import evaluate
from tpaw_core.stages.generate import generate
from tpaw_core.stages.sft import sft
from tpaw_core.stages.team import team
from tpaw_core.stages.train import train
from tpaw_core.stages.weights import weights
from tpaw_core.workspace.paths import Workspace

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
FAMILIES: dict[str, tuple[Any, str | None, list[str]]] = {  # config, template, special tokens: EOS, BOS if there is one
    "Qwen": (Qwen2Config, QWEN, ["<|endoftext|>", "", "<|im_start|>", "<|im_end|>"]),
    "Llama": (
        LlamaConfig,
        None,
        ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "": (LlamaConfig, QWEN, ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]),
}
PROBLEMS = list(arithmetic.problems(12, seed=1))
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
REAL = {  # config.json of the models that recipes name
    "Qwen/Qwen2.5-1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-70B": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
SMALL = [
    "data.max_train_rows=6",
    "data.max_heldout_rows=3",
    "model.max_length=256",
    "sft.num_train_epochs=1",
    "training.num_train_epochs=1",
    "generation.max_new_tokens=4",
    "evaluation.max_new_tokens=4",
]
ALONE = ["machine.processes=1", "machine.tensor_parallel=1", "sft.sharded=false", "training.sharded=false"]
HELDOUT = ["evaluation.tasks=[heldout]", "evaluation.primary=heldout", "evaluation.metric=exact_match"]


def family(model: str) -> tuple[Any, str | None, list[str]]:
    return next(found for name, found in FAMILIES.items() if name in model)


def publish(folder: Path, model: str, *, weights: bool, **sizes: Any) -> None:
    """A model of the same architecture with a tokenizer of the same kind."""
    config, template, special = family(model)
    special = [token for token in special if token]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([text for row in PROBLEMS for text in row], trainer)
    bpe.add_special_tokens(special)
    eos, bos = family(model)[2][:2]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, bos_token=bos or None, chat_template=template
    )
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    made = config(**{"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "dtype": "bfloat16"} | ids | sizes)
    made.save_pretrained(folder)
    if weights:
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)


def write_rows(path: Path, recipe: str, rows: list[tuple[str, str]]) -> Path:
    """Problems with their solutions in the layout of the recipe's own data."""
    if recipe == "mawps":
        made: list[dict[str, Any]] = [
            {"Question": f"{n} pens and number0 more", "Numbers": f"{n}", "Equation": "number0", "Answer": f"{n}"}
            for n in range(len(rows))
        ]
        with path.with_suffix(".csv").open("w") as file:
            writer = csv.DictWriter(file, list(made[0]))
            writer.writeheader()
            writer.writerows([{**row, "Question": f"{path.stem} {row['Question']}"} for row in made])
        return path.with_suffix(".csv")
    if "gsm8k" in recipe:
        made = [{"question": problem, "answer": solution} for problem, solution in rows]
    elif "ultrachat" in recipe:
        made = [
            {
                "prompt": "Hello",
                "prompt_id": "0" * 64,
                "messages": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hello! What can I do?"},
                    {"role": "user", "content": problem},
                    {"role": "assistant", "content": solution},
                ],
            }
            for problem, solution in rows
        ]
    else:
        made = [{"prompt": problem, "completion": solution} for problem, solution in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def context(folder: Path, recipe: str, *overrides: str, weights: bool = True, **sizes: Any) -> Context:
    """The recipe in a folder with rows and a model of this size, if it names one."""
    (folder / "recipes").symlink_to(RECIPES)
    params = params_file.load(RECIPES / f"{recipe}.yaml")
    own = ["model.scratch.hidden_size=32", "model.scratch.num_hidden_layers=1", "model.scratch.vocab_size=300"]
    if (model := params.model.model_name_or_path) is not None:
        publish(folder / "model", model, weights=weights, **sizes)
        own = [f"model.model_name_or_path={folder / 'model'}"]
    if params.data.path != "arithmetic":
        for key, some in (("path", PROBLEMS[:8]), ("heldout_path", PROBLEMS[8:])):
            own.append(f"data.{key}={write_rows(folder / f'{key}.jsonl', recipe, some)}")
    workspace = Workspace(folder)
    return Context(workspace, params_file.switch(workspace, recipe, [*SMALL, *own, *overrides]))


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_runs_through_all_stages(recipe: str, tmp_path: Path) -> None:
    overrides = ["generation.backend=transformers", *ALONE, *HELDOUT]
    made = context(tmp_path, recipe, *overrides, **TINY, num_key_value_heads=2)
    check(made)
    encode(made)
    sft(made)
    evaluate(made, 0)
    for stage in (generate, team, weights, train, evaluate):
        stage(made, 1)
    assert read_metrics(made.workspace, 1).primary.n == 3


@pytest.mark.parametrize(
    "recipe", [name for name in NAMES if params_file.load(RECIPES / f"{name}.yaml").model.model_name_or_path in REAL]
)
def test_a_recipe_says_what_its_model_needs(recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`tpaw check` finds nothing but what this machine lacks, and the card has room for what it counts."""
    text = (RECIPES / f"{recipe}.yaml").read_text()
    model = params_file.load(RECIPES / f"{recipe}.yaml").model.model_name_or_path
    assert model is not None
    made = context(tmp_path, recipe, weights=False, **REAL[model])
    problems = ""
    try:
        check(made)
    except TpawError as error:
        problems = str(error)
    assert all(re.match("- (memory|disk|generation.python)", line) for line in problems.splitlines()[1:]), problems
    says = re.search(r"# For (one card|eight cards) with (\d+) GB.* Planned: about ([\d.]+) GB", text)
    assert says is not None
    assert made.params.machine.world_size == {"one card": 1, "eight cards": 8}[says[1]]
    planned = max(map(float, re.findall(r"memory of each process in \w+: about ([\d.]+) GB", caplog.text)))
    assert planned == float(says[3])
    assert planned * 1e9 <= 0.9 * float(says[2]) * 2**30
