"""One small iteration of a pretrained model through every stage, and its numbers beside transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.support.workspace import Project
from tpaw_core.artifacts import checkpoint, smollm2
from tpaw_core.artifacts.encoded import read_encoded, read_encoding
from tpaw_core.config.params import Generation
from tpaw_core.engine.generation import in_process, vllm_client
from tpaw_core.report.table import rows

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".tpaw" / "models" / "SmolLM2-135M-Instruct"
VLLM = ROOT / vllm_client.PYTHON
BACKENDS = ["transformers", pytest.param("vllm", marks=pytest.mark.skipif(not VLLM.exists(), reason="no vllm"))]
SETTINGS = [
    f"model.model_name_or_path={FOLDER}",
    "data.max_train_rows=12",
    "data.max_heldout_rows=8",
    "sft.bf16=false",
    "training.bf16=false",
    "generation.dtype=float32",
    f"generation.python={VLLM}",
    "generation.max_new_tokens=24",
    "evaluation.max_new_tokens=24",
]
ANSWERS = Generation(temperature=0, max_new_tokens=24, batch_size=4)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Checkpoint 0, evaluated."""
    smollm2.fetch(FOLDER)
    made = Project.bare(tmp_path_factory.mktemp("real"))
    made.run("tpaw", "use", "smollm2", *SETTINGS)
    made.preload()
    for command in ("check", "encode", "sft"):
        made.run("tpaw", command)
    made.run("tpaw", "evaluate", "--iteration", "0")
    yield made
    made.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_iteration_goes_through_every_stage(before: Project, backend: str) -> None:
    before.run("tpaw", "use", f"generation.backend={backend}")
    for command in ("generate", "team", "weights", "train", "evaluate"):
        before.run("tpaw", command, "--iteration", "1")
    table = before.run("tpaw", "table").stdout
    assert [row["n"] for row in rows(before.workspace)] == [8, 8]
    assert "Checkpoints 0 and 1 answer " in table
    _compare_log_probabilities(before)


def _compare_log_probabilities(project: Project) -> None:
    """Of every target and answer, with a plain forward pass of transformers over each text alone."""
    workspace = project.workspace
    model = _plain(project)
    encoded = read_encoded(workspace, "train")
    answers = pq.read_table(workspace.synthetic(1)).to_pydict()
    scored = pq.read_table(workspace.weights(1)).to_pydict()
    assert answers["prompt_id"] == scored["prompt_id"] == encoded.row_ids
    for column, texts in (("players_chosen", list(encoded.chosen)), ("players_rejected", answers["rejected_ids"])):
        expected = [_log_probability(model, list(p), list(t)) for p, t in zip(encoded.prompts, texts, strict=True)]
        assert [value for (value,) in scored[column]] == pytest.approx(expected, abs=2e-3, rel=1e-4)


def _plain(project: Project) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(project.workspace.checkpoint(0), attn_implementation="eager").eval()


def _log_probability(model: Any, prompt: list[int], text: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_answers_and_where_they_stop_are_those_of_transformers(before: Project, backend: str) -> None:
    workspace = before.workspace
    folder, encoding = workspace.checkpoint(0), read_encoding(workspace)
    prompts = list(read_encoded(workspace, "heldout").prompts)
    options: dict[str, Any] = {"max_length": 256, "ending": encoding.ending, "seed": 1}
    if backend == "vllm":
        found = vllm_client.generate(folder, prompts, ANSWERS, **options, dtype="float32", python=VLLM)
    else:
        model = checkpoint.load_model(folder, device="cpu")
        found = in_process.generate(model, prompts, ANSWERS, **options, pad_id=encoding.pad_id)
    plain = _plain(before)
    for prompt, response in zip(prompts, found, strict=True):
        made = plain.generate(torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=ANSWERS.max_new_tokens)
        assert list(response.ids) == made[0, len(prompt) :].tolist()
        assert (response.finish_reason == "stop") == (response.ids[-1] == encoding.ending.end_id)
    assert "stop" in {response.finish_reason for response in found}


def test_the_folder_has_the_published_model_and_the_tokens_of_its_tokenizer() -> None:
    """Sizes and special tokens as HuggingFaceTB publishes them; digits alone, blank lines and runs of spaces whole."""
    smollm2.fetch(FOLDER)
    config, generation = checkpoint.load_settings(FOLDER)
    tokenizer = checkpoint.load_tokenizer(FOLDER)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (576, 30, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert (config.rope_parameters["rope_theta"], config.tie_word_embeddings) == (100000, True)
    assert config.max_position_embeddings == tokenizer.model_max_length == 8192
    for settings in (config, generation):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *2 * ["<|im_end|>"])
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.tokenize("\n\n12  345") == ["ĊĊ", "1", "2", "ĠĠ", "3", "4", "5"]
    assert tokenizer("12").input_ids == tokenizer("12", add_special_tokens=False).input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )
