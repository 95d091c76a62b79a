from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Objective
from tpaw_core.engine import scoring
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group
from tpaw_core.engine.training.dropout import without_dropout

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}  # 0.1 in three places
OPT = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "layers left out": ("opt", OPT | {"layerdrop": 0.5, "max_position_embeddings": 64}),
    "attention": ("llama", LLAMA | {"attention_dropout": 0.3}),
    "experts drawn": ("phimoe", LLAMA | {"num_local_experts": 4, "num_key_value_heads": 2}),
}
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
CHOSEN, REJECTED = [[7, 8], [9, 3, 2], [4]], [[5, 3, 5], [8], [9, 7]]


def model(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=32, pad_token_id=0, **changes)).eval()


def released(own: Any) -> dict[str, Any]:
    """The config, without what Trainer writes as it saves a state."""
    return {name: value for name, value in own.config.to_dict().items() if name not in ("architectures", "dtype")}


def settings(**changes: Any) -> Optimisation:
    sizes = {"train_batch_size": 3, "num_train_epochs": 1, "logging_steps": 1, "save_steps": 100}
    return Optimisation.model_validate({"learning_rate": 1e-3, "bf16": False, **sizes, **changes})


def scores(own: Any, responses: list[list[int]]) -> list[float]:
    return scoring.score(own, list(zip(PROMPTS, responses, strict=True)), pad_id=0)


def play(own: Any, state: Path, **changes: Any) -> dict[str, float]:
    groups = [
        Group(prompt, chosen, [rejected], [of_chosen], [[of_rejected]], [[1.0]])
        for prompt, chosen, rejected, of_chosen, of_rejected in zip(
            PROMPTS, CHOSEN, REJECTED, scores(own, CHOSEN), scores(own, REJECTED), strict=True
        )
    ]
    return loop.self_play(
        own, groups, Objective(), settings(**changes), pad_id=0, seed=1, state=state, on_log=lambda *_: None
    )[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_the_first_reward_of_self_play_is_zero(name: str, checkpointing: bool, tmp_path: Path) -> None:
    own = model(*RANDOM[name])
    before = released(own)
    step = play(own, tmp_path, activation_checkpointing=checkpointing)
    assert step["rewards/chosen"] == 0
    assert step["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert released(own) == before
    assert "train" not in vars(own)
    assert not own.training


def test_checkpointed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    norms = [
        play(model(*RANDOM["gpt2"]), tmp_path / str(on), activation_checkpointing=on)["grad_norm"]
        for on in (False, True)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_layers_are_computed_again_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, run = model(*RANDOM["gpt2"]), loop._run
    calls: list[bool] = []

    def watched(*options: Any) -> Any:
        for block in own.transformer.h:
            block.mlp.register_forward_pre_hook(lambda module, _: calls.append(module.training))
        return run(*options)

    monkeypatch.setattr(loop, "_run", watched)
    play(own, tmp_path, activation_checkpointing=True)
    assert calls == [False] * 4  # two layers, forwards and once more backwards, in evaluation mode


@pytest.mark.parametrize("name", ["gpt2", "layers left out", "attention"])
def test_sft_keeps_the_dropout_of_the_config(name: str, tmp_path: Path) -> None:
    own = model(*RANDOM[name])
    pairs = list(zip(PROMPTS, CHOSEN, strict=True))
    plain = -sum(scores(own, CHOSEN)) / sum(map(len, CHOSEN))
    log = loop.sft(own, pairs, settings(), pad_id=0, seed=1, state=tmp_path, on_log=lambda *_: None)
    assert log[0]["loss"] == pytest.approx(plain, rel=0.2)
    assert log[0]["loss"] != pytest.approx(plain, abs=1e-5)


def test_the_mode_is_as_before_afterwards() -> None:
    own = model(*RANDOM["gpt2"])
    for mode in (True, False):
        own.train(mode)
        with without_dropout(own):
            assert own.train() is own
            assert not any(module.training for module in own.modules())
        assert all(module.training == mode for module in own.modules())
    assert own.train.__func__ is PreTrainedModel.train  # type: ignore[attr-defined]


def test_a_model_that_cannot_checkpoint_activations_is_named(tmp_path: Path) -> None:
    own = model(*RANDOM["gpt2"])
    own.supports_gradient_checkpointing = False
    with pytest.raises(Exception, match="GPT2LMHeadModel does not support activation checkpointing; set sft"):
        play(own, tmp_path, activation_checkpointing=True)
