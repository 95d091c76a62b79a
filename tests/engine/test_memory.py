from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw_core.config.optimisation import Optimisation
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


def test_an_optimiser_that_steps_all_weights_at_once_copies_them(model: Any) -> None:
    """As torch does on an accelerator; a small pass takes less."""
    small: dict[str, Any] = {"max_tokens": 1, "activation_checkpointing": True}
    copied = [
        memory.plan(model, None, settings(optim=name, **small), ranks=1, bf16=False).passing
        for name in ("rmsprop", "adamw_torch", "adamw_torch_fused", "adafactor")
    ]
    assert copied[:2] == [4 * model.num_parameters()] * 2
    assert copied[2] == copied[3] < 10_000
    weights = [torch.nn.Parameter(torch.zeros(2**20)) for _ in range(4)]
    optimiser = torch.optim.RMSprop(weights, foreach=True)
    for weight in weights:
        weight.grad = torch.ones(2**20)
    optimiser.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimiser.step()
    made = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert made == pytest.approx(4 * 4 * 2**20, rel=0.1)


def test_casts_of_autocast_are_kept_through_a_forward_pass_with_checkpointing_too(model: Any) -> None:
    tiny = settings(optim="sgd", max_tokens=1, activation_checkpointing=True)
    plain, cast = (memory.plan(model, None, tiny, ranks=1, bf16=bf16).passing for bf16 in (False, True))
    assert cast - plain == pytest.approx(2 * model.num_parameters(), rel=0.1)
    layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(3)]
    hidden = torch.ones(1, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(profile_memory=True) as profile:
        for layer in layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
    kept = sum(event.self_cpu_memory_usage for event in profile.events())
    assert kept == pytest.approx(2 * 3 * 256**2, rel=0.1)


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
    assert sum(kept.values()) == pytest.approx(plan.passing, rel=0.25)
