from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpaw_core.artifacts import adapters
from tpaw_core.config.params import Lora
from tpaw_core.errors import TpawError

LORA = Lora(r=4, alpha=8)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def base(make_model: Callable[[int], Any]) -> Any:
    return copy.deepcopy(make_model(0)).bfloat16()


def trained(model: Any, seed: int) -> Any:
    """``model`` with an adapter whose B is not 0."""
    adapters.attach(model, LORA, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def saved(base: Any, folder: Path, seed: int) -> torch.Tensor:
    """Writes an adapter; the logits with it."""
    model = trained(copy.deepcopy(base), seed)
    adapters.write(model, folder)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_a_new_adapter_changes_no_bit_and_is_alone_in_being_trained_in_float32(base: Any) -> None:
    before = logits(base)
    adapters.attach(base, LORA, seed=1)
    assert torch.equal(logits(base), before)
    trainable = [(name, p.dtype) for name, p in base.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2
    assert all("lora_" in name and dtype == torch.float32 for name, dtype in trainable)
    assert base.dtype == torch.bfloat16
    assert not base.training
    assert adapters.parameters(base, LORA) == sum(p.numel() for p in base.parameters() if p.requires_grad)


def test_its_size_is_known_before_it_is_there(base: Any) -> None:
    known = adapters.parameters(base, LORA)
    assert adapters.active(base) is None
    adapters.attach(base, LORA, seed=1)
    assert known == adapters.parameters(base, LORA)


def test_switching_gives_each_adapter_and_the_base_the_same_bits_in_any_order(base: Any, tmp_path: Path) -> None:
    plain = logits(base)
    expected = {name: saved(base, tmp_path / name, seed) for seed, name in enumerate("ab")}
    for name in ("a", "b", None, "a", None, "b", "b"):
        adapters.use(base, None if name is None else tmp_path / name, str(name))
        assert torch.equal(logits(base), plain if name is None else expected[name])
    assert not torch.equal(expected["a"], expected["b"])


def test_the_same_weights_are_written_as_the_same_bytes_wherever_the_base_was(base: Any, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", 1)
    base.config._name_or_path = "/somewhere/else"
    adapters.use(base, tmp_path / "a", "as another name")
    adapters.write(base, tmp_path / "b")
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / adapters.CONFIG).read_text())["base_model_name_or_path"] is None
    assert {value.dtype for value in load_file(tmp_path / "a" / adapters.WEIGHTS).values()} == {torch.float32}


def test_what_is_written_loads_with_peft_itself(base: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = saved(base, tmp_path / "a", 1)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "a")), expected)


def test_merging_in_float32_leaves_a_plain_model_with_the_same_log_probabilities(base: Any, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", 1)
    adapters.use(base, tmp_path / "a", "a")
    expected = logits(base.float()).log_softmax(-1)
    names = {name for name, _ in copy.deepcopy(base).named_parameters() if "lora" not in name}
    adapters.merge(base)
    assert {name for name, _ in base.named_parameters()} == {name.replace(".base_layer", "") for name in names}
    torch.testing.assert_close(logits(base).log_softmax(-1), expected, rtol=0, atol=1e-4)
    base.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_and_the_output_projection_are_not_targets(base: Any, target: str) -> None:
    with pytest.raises(TpawError, match=r"lora\.target_modules: names the embeddings or the output projection"):
        adapters.attach(base, Lora(target_modules=["q_proj", target]), seed=1)


def test_a_target_that_the_model_lacks_is_named(base: Any) -> None:
    with pytest.raises(TpawError, match=r"lora.target_modules=\['no_such'\]: Target modules .* not found"):
        adapters.attach(base, Lora(target_modules=["no_such"]), seed=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "is an adapter of the kind IA3, not LoRA; merge it"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save, which is not LoRA on linear layers alone; merge it"),
        ({"use_dora": True}, "has use_dora"),
        ({"bias": "all"}, "has bias=all"),
        ({"r": "four"}, "is damaged"),
        ({"target_modules": None}, "is damaged"),
        ({"base_model_name_or_path": 3}, "is damaged"),
        ({"something_new": True}, "has something_new, which is not LoRA"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(
    base: Any, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    saved(base, tmp_path / "a", 1)
    path = tmp_path / "a" / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TpawError, match=reason):
        adapters.read(base, tmp_path / "a")


@pytest.mark.parametrize("damage", ["missing", "more", "shape", "bytes", "no file"])
def test_weights_that_do_not_fit_are_refused(base: Any, tmp_path: Path, damage: str) -> None:
    saved(base, tmp_path / "a", 1)
    path = tmp_path / "a" / adapters.WEIGHTS
    weights = load_file(path)
    name = next(iter(weights))
    if damage == "missing":
        del weights[name]
    elif damage == "more":
        weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = weights[name].clone()
    elif damage == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, path)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "no file":
        path.unlink()
    with pytest.raises(TpawError, match="does not exist; save" if damage == "no file" else "does not fit its base"):
        adapters.read(base, tmp_path / "a")


def test_training_goes_on_only_from_an_adapter_of_the_same_shape(base: Any, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", 1)
    adapters.require(tmp_path / "a", LORA)
    with pytest.raises(TpawError, match=r"has r=4 and alpha=8, not lora.r=16 .*; set lora.r=4 lora.alpha=8"):
        adapters.require(tmp_path / "a", Lora(r=16, alpha=8))
