from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tpaw_core.artifacts import adapters, checkpoint, pretrained
from tpaw_core.config.params import Lora
from tpaw_core.errors import TpawError

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES |= {"image_size": 28, "patch_size": 14}
GEMMA3 = {
    "text_config": SIZES | {"query_pre_attn_scalar": 8},
    "vision_config": PICTURES | {"model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
}
LLAVA = {
    "text_config": SIZES | {"model_type": "llama"},
    "vision_config": PICTURES | {"model_type": "clip_vision_model", "projection_dim": 16},
}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
QWEN35 = {
    "text_config": SIZES | DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
}


def save(folder: Path, kind: str = "llama", loader: Any = AutoModelForCausalLM, **sizes: Any) -> Any:
    torch.manual_seed(0)
    model = loader.from_config(AutoConfig.for_model(kind, **(sizes or SIZES))).eval()
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_other_heads_or_kinds_of_models_hold_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    for name, kind, loader, sizes, reason in [
        ("labels", "llama", AutoModelForSequenceClassification, SIZES, "was saved as LlamaForSequenceClassification"),
        ("vectors", "qwen2", AutoModel, SIZES, "was saved as Qwen2Model, without the head of a language model"),
        ("t5", "t5", AutoModelForSeq2SeqLM, T5, r"is an encoder-decoder \(t5\)"),
        ("vit", "vit", AutoModel, PICTURES, "has type vit, which is not a text-only causal language model"),
        ("gemma3", "gemma3", AutoModelForImageTextToText, GEMMA3, "has type gemma3, a language model that also takes"),
        ("llava", "llava", AutoModelForImageTextToText, LLAVA, "has type llava with a part for images or sound"),
    ]:
        save(tmp_path / name, kind, loader, **sizes)
        (tmp_path / name / "model.safetensors").unlink()
        for load in (checkpoint.load_settings, checkpoint.load_model):
            with pytest.raises(TpawError, match=f"^model '{tmp_path / name}': {reason}.*use a "):
                load(tmp_path / name)


def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(tmp_path: Path) -> None:
    save(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(TpawError, match=r"is quantised \(gptq\).*use the 16- or 32-bit checkpoint"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_refused_with_its_base_and_what_to_do(tmp_path: Path, beside_a_model: bool) -> None:
    if beside_a_model:
        save(tmp_path)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for load in (checkpoint.load_settings, checkpoint.load_model):
        with pytest.raises(
            TpawError,
            match=r"is a PEFT adapter \(LORA\) of 'some/base', not a whole model; set lora.r and lora.alpha .*merge",
        ):
            load(tmp_path)


def test_of_a_wrapper_that_has_a_text_class_the_language_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = save(tmp_path, "qwen3_5", AutoModelForImageTextToText, **QWEN35)
    with caplog.at_level(logging.INFO, "tpaw_core"):
        model = checkpoint.load_model(tmp_path, device="cpu")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert "using only its language model" in caplog.text
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, both(ids).logits)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a_weight, r"1 of its weights are not in its files \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (
            lambda folder: edit_config(folder, intermediate_size=18),
            "6 of its weights have a different shape in its files",
        ),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "9 of its weights are not in its files"),
        (
            lambda folder: edit_config(folder, model_type="own", auto_map={"AutoConfig": "code.OwnConfig"}),
            "cannot be loaded. It needs custom code, which tpaw never runs",
        ),
        (cut_in_half, r"cannot be loaded\. The folder must hold"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), "cannot be loaded.*not a valid JSON"),
        (lambda folder: edit_config(folder, hidden_size="many"), "cannot be loaded.*expected int, got str"),
        (lambda folder: edit_config(folder, num_attention_heads=3), r"cannot be loaded\..*not a multiple"),
        (lambda folder: edit_config(folder, model_type="superllama"), "cannot be loaded.*model type `superllama`"),
        (lambda folder: (folder / "config.json").unlink(), r"cannot be loaded\."),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded.*no file named model.safetensors"),
    ],
)
def test_damage_is_one_message(tmp_path: Path, damage: Callable[[Path], Any], reason: str) -> None:
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(TpawError, match=f"^model '{tmp_path}': {reason}") as caught:
        checkpoint.load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "It does not fit into memory: use a smaller one"),
        (ImportError("needs optimum"), "It needs a package that is not installed"),
        (KeyError("rope_type"), "Use a folder that exists, or a hub id"),
    ],
)
def test_whatever_is_raised_gets_a_remedy(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", lambda *_, **__: None)
    with pytest.raises(TpawError, match=rf"^model 'some/name': cannot be loaded\. {remedy}"):
        pretrained.load_config("some/name")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an accelerator")
def test_nothing_can_be_offloaded_where_there_is_no_accelerator(tmp_path: Path) -> None:
    save(tmp_path, "llama", vocab_size=32, hidden_size=32, num_hidden_layers=1)
    sharding = pretrained.Sharding(2, cpu_offload=True)
    with pytest.raises(TpawError, match="cpu_offload: there is no accelerator here"):
        pretrained.load_model(tmp_path, dtype="float32", device="cpu", sharding=sharding)


def test_rwkv_is_not_saved_with_the_weights_that_evaluation_divides(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 7, "context_length": 64}
    before = save(tmp_path, "rwkv", **sizes).state_dict()
    model = checkpoint.load_model(tmp_path, device="cpu")
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        evaluated, trained = model(ids).logits, model.train()(ids).logits
    torch.testing.assert_close(evaluated, trained)
    torch.testing.assert_close(model.state_dict(), before)


def test_of_several_chat_templates_the_default_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = {"<pad>": 0, "<eos>": 1, "word": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>",
        chat_template={"default": "{{ messages[0]['content'] }}", "rag": "{{ documents }}"},
    )
    tokenizer.save_pretrained(tmp_path / "several")
    with caplog.at_level(logging.INFO, "tpaw_core"):
        loaded = checkpoint.load_tokenizer(tmp_path / "several")
    assert loaded.chat_template == "{{ messages[0]['content'] }}"
    assert "using its chat template 'default' (others: rag)" in caplog.text
    loaded.save_pretrained(tmp_path / "one")
    assert all(path.is_file() for path in (tmp_path / "one").iterdir())  # a checkpoint has no folders
    assert checkpoint.load_tokenizer(tmp_path / "one").chat_template == loaded.chat_template


def test_a_tokenizer_that_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(TpawError, match=rf"^model '{tmp_path}': cannot be loaded\."):
        checkpoint.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TpawError, match=rf"^model '{tmp_path}': cannot be loaded\."):
        checkpoint.load_tokenizer(tmp_path)


def test_a_model_that_is_spread_computes_as_one_that_is_not(tmp_path: Path) -> None:
    """With an adapter too. Here all layers come to one device."""
    save(tmp_path)
    ids, found = torch.tensor([[3, 4, 5, 6]]), []
    for device in ("cpu", pretrained.SPREAD):
        model = pretrained.load_model(tmp_path, dtype="float32", device=device)
        with torch.no_grad():
            plain = model(ids).logits
            adapters.attach(model, Lora(r=2), seed=1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
            found.append((plain, model(ids).logits))
        assert not model.training
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(*found[0])
    if not torch.cuda.is_available():
        assert pretrained.roomy_device(tmp_path, None, "bfloat16") == "cpu"
