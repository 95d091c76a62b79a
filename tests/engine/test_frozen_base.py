"""Training of adapters on a frozen base: what the loop must not assume of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tpaw_core.artifacts import adapters
from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Lora, Objective
from tpaw_core.engine import scoring
from tpaw_core.engine.logps import token_logps
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group


@pytest.fixture
def policy(make_model: Callable[[int], Any]) -> Any:
    model = copy.deepcopy(make_model(0)).bfloat16()
    adapters.attach(model, Lora(r=4, alpha=8, dropout=0.5), seed=0)
    return model


def groups(model: Any) -> list[Group]:
    texts = [([n, n + 1, n + 2], [n + 3] * (2 + n % 3), [n + 4] * (1 + n % 4)) for n in range(3, 35)]
    chosen = scoring.score(model, [(prompt, y) for prompt, y, _ in texts], pad_id=0)
    rejected = scoring.score(model, [(prompt, g) for prompt, _, g in texts], pad_id=0)
    scored = enumerate(zip(texts, chosen, rejected, strict=True))
    return [Group(p, y, [g], [py], [[pg]], [[1.0]], None, n) for n, ((p, y, g), py, pg) in scored]


def play(model: Any, rows: list[Group], state: Path, **changes: Any) -> list[dict[str, float]]:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "num_train_epochs": 1, "train_batch_size": 4}
    steps = Optimisation(**{**settings, "logging_steps": 1, "warmup_ratio": 0.0, **changes})
    options: dict[str, Any] = {"pad_id": 0, "seed": 1, "state": state, "on_log": lambda step, metrics: None}
    return loop.self_play(model, rows, Objective.model_validate({}), steps, **options)


def test_the_base_keeps_its_bits_and_dropout_is_off(policy: Any, tmp_path: Path) -> None:
    """Rewards of the first step are those of a policy that is its own reference, however it is packed."""
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    log = play(policy, groups(policy), tmp_path, num_train_epochs=4)
    assert log[0]["rewards/chosen"] == 0.0
    assert abs(log[0]["rewards/rejected"]) < 1e-2
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    after = policy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "lora" not in name)
    assert all((after[name] != value).any() for name, value in before.items() if "lora_B" in name)


def test_checkpointed_activations_give_the_same_gradients(policy: Any, tmp_path: Path) -> None:
    """The embeddings of a frozen base have no gradient, so that a checkpoint could take there to be none at all."""
    rows, other = groups(policy), copy.deepcopy(policy)
    plain = play(policy, rows, tmp_path / "plain")
    saved = play(other, rows, tmp_path / "saved", activation_checkpointing=True)
    assert saved[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert saved[0]["grad_norm"] > 0


def test_a_frozen_output_projection_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    torch.manual_seed(0)
    weight, target = torch.randn(50, 8), torch.randint(50, (20,))
    found = []
    for frozen in (True, False):
        torch.manual_seed(1)
        hidden, own = torch.randn(20, 8, requires_grad=True), weight.clone().requires_grad_(not frozen)
        token_logps(hidden, own, target).sum().backward()
        found.append(hidden.grad)
        assert (own.grad is None) == frozen
    assert torch.equal(*found)
