from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tpaw_core.artifacts import checkpoint
from tpaw_core.config.optimisation import Optimisation
from tpaw_core.config.params import Objective
from tpaw_core.engine import precision, scoring
from tpaw_core.engine.training import loop
from tpaw_core.engine.training.batches import Group

OPTIMISATION = {"num_train_epochs": 1, "train_batch_size": 4, "optim": "rmsprop", "warmup_ratio": 0}


def optimisation(**changes: Any) -> Optimisation:
    return Optimisation(**{**OPTIMISATION, "learning_rate": 5e-7, "logging_steps": 1, "save_steps": 100, **changes})


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    precision.fastest.cache_clear()
    yield
    precision.fastest.cache_clear()


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this device a processor with these flags."""

    def make(flags: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nflags\t\t: fpu avx2 {flags}\nbugs\t\t:\n")
        monkeypatch.setattr(precision, "CPU_FLAGS", path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return make


def released(seed: int = 0) -> LlamaForCausalLM:
    """A million parameters with values that bfloat16 holds, as models are released."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # not the buffers: loading makes those anew, in float32
        parameter.data = parameter.data.bfloat16().float()
    return model


def pairs(number: int) -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(7)
    return [tuple(torch.randint(2, 1000, (2, 8), generator=draw).tolist()) for _ in range(number)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "best"), [("avx512_bf16", "bfloat16"), ("amx_bf16 amx_tile", "bfloat16"), ("avx512f", "float32")]
)
def test_a_processor_is_asked_for_its_instructions(processor: Any, flags: str, best: str) -> None:
    processor(flags)

    assert precision.fastest().precision == best
    assert precision.of_products("auto") == precision.of_generation("auto") == best


def test_a_processor_that_does_not_say_multiplies_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "CPU_FLAGS", tmp_path / "none")

    assert precision.fastest().precision == "float32"


@pytest.mark.parametrize(("has", "best"), [(True, "bfloat16"), (False, "float32")])
def test_an_accelerator_that_emulates_bfloat16_does_not_count(
    monkeypatch: pytest.MonkeyPatch, has: bool, best: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Accelerator")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)

    found = precision.fastest()

    assert found.precision == best
    assert "Some Accelerator" in found.reason


def test_what_auto_becomes_is_said_in_a_line(processor: Any, caplog: pytest.LogCaptureFixture) -> None:
    processor("avx512f")
    with caplog.at_level(logging.INFO):
        precision.of_products("auto", "training.bf16")

    (line,) = caplog.messages
    assert line == "training.bf16=auto: float32, as this processor has no bfloat16 arithmetic and would emulate it"


@pytest.mark.parametrize(("flags", "warned"), [("avx512f", True), ("avx512_bf16", False)])
def test_bf16_where_it_is_emulated_is_a_warning(
    processor: Any, caplog: pytest.LogCaptureFixture, flags: str, warned: bool
) -> None:
    processor(flags)

    assert precision.of_products(True, "sft.bf16") == "bfloat16"
    assert precision.of_products(False, "sft.bf16") == "float32"
    assert ("sft.bf16: bfloat16, but this processor has no bfloat16 arithmetic" in caplog.text) == warned


@pytest.mark.parametrize("flags", ["avx512f", "avx512_bf16"])
def test_settled_settings_follow_what_was_scored(processor: Any, flags: str) -> None:
    processor(flags)
    auto = optimisation(bf16="auto")

    assert precision.settled(auto, "training").bf16 is (flags == "avx512_bf16")
    assert precision.settled(auto, "training", "bfloat16").bf16 is True
    assert precision.settled(auto, "training", "float32").bf16 is False
    assert precision.settled(optimisation(bf16=True), "training").bf16 is True


@pytest.mark.parametrize("flags", ["avx512f", "avx512_bf16"])
def test_training_never_takes_auto_for_true(processor: Any, flags: str, tmp_path: Path) -> None:
    processor(flags)

    def trained(bf16: Any) -> list[torch.Tensor]:
        model, state = released(), tmp_path / str(bf16)
        settings = optimisation(bf16=bf16, learning_rate=1e-3)
        loop.sft(model, pairs(4), settings, pad_id=0, seed=1, state=state, on_log=lambda step, metrics: None)
        return list(model.parameters())

    found, same, other = trained("auto"), trained(flags == "avx512_bf16"), trained(flags != "avx512_bf16")

    assert all(map(torch.equal, found, same))
    assert not all(map(torch.equal, found, other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bytes_of_a_checkpoint_are_those_on_disk(tmp_path: Path, dtype: str) -> None:
    model = released().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)

    expected = precision.checkpoint_bytes(model.num_parameters(), dtype)

    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(expected, rel=0.01)


def layer(*weights: float) -> torch.nn.Linear:
    made = torch.nn.Linear(len(weights), 1, bias=False)
    made.weight.data = torch.tensor([weights])
    return made


@pytest.mark.parametrize(
    ("before", "trained", "kept"),
    [
        ([1.0, 2.0], [1.0 + 2**-10, 2.0], 0.0),  # bfloat16 has 8 bits: 1 + 2^-10 becomes 1 again
        ([1.0, 2.0], [1.5, 2.5], 1.0),  # exact in bfloat16
        ([1.0, 2.0], [1.0 + 9 * 2**-10, 2.0], 1 - 1 / 9),  # of an update of 9/1024, 1/1024 is lost
        ([1.0, 1.0], [1.0 + 9 * 2**-10, 1.0 + 10 * 2**-10], 1 - (5 / 181) ** 0.5),  # 1/1024 and 2/1024 are lost
        ([1.0, 2.0], [1.0, 2.0], 1.0),  # nothing was changed, nothing is lost
        ([1.0 + 2**-10, 2.0], [1.0 + 2**-10, 2.0], 0.0),  # nothing was changed, and yet it is rounded
        (None, [1.0 + 2**-10, 2.0], 1 - 2**-10 / 5**0.5),  # from nothing: all of it is update
    ],
)
def test_the_share_of_an_update_that_is_kept(before: list[float] | None, trained: list[float], kept: float) -> None:
    parent = None if before is None else layer(*before)

    assert precision.update_kept(layer(*trained), parent, "float32") == 1.0
    assert precision.update_kept(layer(*trained), parent, "bfloat16") == pytest.approx(kept, rel=1e-3)


def test_a_parent_in_bfloat16_counts_as_what_it_holds() -> None:
    parent = released()
    trained = copy.deepcopy(parent)
    with torch.no_grad():
        trained.model.norm.weight += 2**-10

    assert precision.update_kept(trained, parent.bfloat16(), "bfloat16") == 0.0


def test_at_a_low_rate_bfloat16_keeps_next_to_nothing_and_float32_all(tmp_path: Path) -> None:
    before, rows = released(), pairs(100)
    trained = copy.deepcopy(before)

    loop.sft(trained, rows, optimisation(), pad_id=0, seed=1, state=tmp_path, on_log=lambda step, metrics: None)

    kept = {dtype: precision.update_kept(trained, before, dtype) for dtype in ("float32", "bfloat16")}
    changed = [
        (new != new.bfloat16().float(), new.bfloat16().float() != old)
        for new, old in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    stored = sum(int(after.sum()) for _, after in changed) / before.num_parameters()
    assert kept["float32"] == 1.0
    assert kept["bfloat16"] < 0.3
    assert stored < 0.1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("learning_rate", [5e-7, 1e-5])
def test_the_first_step_after_loading_continues_the_log(tmp_path: Path, learning_rate: float, bf16: bool) -> None:
    policy, rows = released(), pairs(8)
    answers = pairs(16)[8:]
    chosen = [(prompt, target) for prompt, target in rows]
    rejected = [(prompt, answer) for (prompt, _), (_, answer) in zip(rows, answers, strict=True)]
    players = [scoring.score(policy, some, pad_id=0, bf16=bf16) for some in (chosen, rejected)]

    def groups() -> list[Group]:
        numbered = enumerate(zip(rows, answers, *players, strict=True))
        return [Group(p, y, [g], [py], [[pg]], [[1.0]], None, n) for n, ((p, y), (_, g), py, pg) in numbered]

    def play(model: Any, state: str, epochs: int) -> list[dict[str, float]]:
        rate, batch = {"learning_rate": learning_rate}, {"train_batch_size": 8}
        settings = optimisation(**rate, **batch, num_train_epochs=epochs, bf16=bf16, lr_scheduler_type="cosine")
        objective = Objective.model_validate({"name": "spin"})
        options: dict[str, Any] = {"pad_id": 0, "seed": 1, "state": tmp_path / state, "on_log": lambda step, m: None}
        return loop.self_play(model, groups(), objective, settings, **options)

    log = play(policy, "first", 25)  # one batch holds all rows, and the last step's rate is next to 0
    policy.save_pretrained(tmp_path / "stored")
    loaded = checkpoint.load_model(tmp_path / "stored", dtype="float32", device="cpu")
    scores = [scoring.score(model, chosen, pad_id=0, bf16=bf16) for model in (policy, loaded)]
    again = play(loaded, "second", 1)

    assert scores[0] == scores[1]
    assert log[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert abs(log[-1]["rewards/margins"]) > 1e-5  # something was learnt
    scale, tokens = 0.1, 8
    for name in ("rewards/chosen", "rewards/rejected"):
        assert again[0][name] == pytest.approx(log[-1][name], abs=scale * tokens * 1e-3)
    weights = load_file(tmp_path / "stored" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
