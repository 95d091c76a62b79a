from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw_core.config.params import Optimisation
from tpaw_core.engine import memory


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4))


def settings(**changes: Any) -> Optimisation:
    return Optimisation(**{"learning_rate": 1e-3, "num_train_epochs": 1, "train_batch_size": 1, **changes})


def test_all_weights_take_four_bytes_each_and_so_do_gradients(model: Any) -> None:
    size = model.num_parameters()
    plan = memory.plan(model, None, settings(optim="rmsprop"), ranks=1, bf16=False)
    assert plan[:4] == (4 * size, 4 * size, 4 * size, 0)
    assert memory.plan(model, None, settings(), ranks=1, bf16=False).states == 8 * size


def test_a_divided_model_takes_its_share_and_what_is_gathered(model: Any) -> None:
    size, one = model.num_parameters(), settings(sharded=True)
    plan = memory.plan(model, None, one, ranks=8, bf16=True)
    assert plan[:3] == (4 * (size // 8), 4 * (size // 8), 8 * (size // 8))
    assert 0 < plan.gathered < 2 * size
    assert memory.plan(model, None, one, ranks=8, bf16=False).gathered == 2 * plan.gathered
    offloaded = memory.plan(model, None, settings(sharded=True, cpu_offload=True), ranks=8, bf16=True)
    assert offloaded.certain == plan.gathered


def test_under_an_adapter_the_base_has_two_bytes_and_the_adapter_is_whole_everywhere(model: Any) -> None:
    size = model.num_parameters()
    assert memory.plan(model, 100, settings(), ranks=1, bf16=False)[:3] == (2 * size + 400, 400, 800)
    assert memory.plan(model, 100, settings(sharded=True), ranks=4, bf16=False)[:3] == (2 * size // 4 + 400, 400, 800)


def test_activations_of_a_pass_are_near_those_that_autograd_keeps() -> None:
    """Measured as the bytes of the tensors saved for the backward pass, weights left out."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    )
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model.model(input_ids=torch.randint(50, (1, 512)), use_cache=False)
    assert outputs.last_hidden_state.requires_grad
    plan = memory.plan(model, None, settings(max_tokens=512), ranks=1, bf16=False)
    assert sum(kept.values()) == pytest.approx(plan.activations, rel=0.25)
