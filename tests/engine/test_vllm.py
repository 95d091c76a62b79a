from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rows import eos_ending
from tpaw_core.artifacts import adapters
from tpaw_core.config.params import Generation, Lora
from tpaw_core.data.endings import Ending, Response
from tpaw_core.engine.generation import in_process, vllm_client
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"


def ask(
    model: Path,
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
    python: Path,
    adapter: tuple[Path, int] | None = None,
) -> list[Response]:
    settings, ending = Generation(temperature=0.0, max_new_tokens=20), Ending(stop_ids[0], stop_ids)
    options: dict[str, Any] = {"max_length": 128, "ending": ending, "seed": 1, "dtype": "float32"}
    return vllm_client.generate(str(model), prompts, settings, **options, python=python, adapter=adapter)


@pytest.mark.parametrize(
    ("python", "reason"), [("none", "no such interpreter"), ("false", "this interpreter has no vllm")]
)
def test_an_interpreter_that_cannot_serve_is_named(python: str, reason: str, workspace: Workspace) -> None:
    (workspace.root / "false").symlink_to("/bin/false")
    with pytest.raises(TpawError, match=rf"generation\.python '.*{python}': {reason}; `make vllm` installs it"):
        vllm_client.interpreter(workspace, Generation(python=python))


@pytest.mark.parametrize("python", ["/bin/false", "/bin/true"])
def test_an_interpreter_that_fails_or_answers_nothing_is_an_error(python: str, tmp_path: Path) -> None:
    with pytest.raises(TpawError, match=rf"vllm \({python}\) failed with status [01]; see its output above"):
        ask(tmp_path, [[1]], (1,), Path(python))


STAND_IN = """
import json, os
from types import SimpleNamespace as Namespace

SamplingParams = dict

class LoRARequest(tuple):
    def __new__(cls, *values):
        return super().__new__(cls, values)

class LLM:
    def __init__(self, model, **options):
        self.given = {"model": model, **options}

    def generate(self, prompts, sampling, use_tqdm=True, lora_request=None):
        with open(os.environ["STAND_IN_LOG"], "w") as file:
            json.dump({**self.given, "sampling": sampling, "use_tqdm": use_tqdm, "lora": lora_request}, file)
        return [Namespace(outputs=[Namespace(token_ids=(*p["prompt_token_ids"], 1, 9))]) for p in prompts]
"""


def test_the_worker_asks_vllm_for_what_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for vllm that answers each prompt with its own ids, EOS and one more."""
    (tmp_path / "vllm" / "lora").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "lora" / "request.py").write_text("from vllm import LoRARequest")
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log.json"))
    responses = ask(tmp_path / "0", [[5, 6], [7] * 120], (1, 4), Path(sys.executable))
    assert [(list(r.ids), r.finish_reason) for r in responses] == [([5, 6, 1], "stop"), ([7] * 8, "length")]
    asked = json.loads((tmp_path / "log.json").read_text())
    assert asked["model"] == str(tmp_path / "0")
    assert asked["max_model_len"] == 128
    assert not asked["trust_remote_code"]
    assert asked["lora"] is None
    assert "enable_lora" not in asked
    assert not asked["use_tqdm"]
    assert [(s["max_tokens"], s["seed"], s["stop_token_ids"]) for s in asked["sampling"]] == [
        (20, 1, [1, 4]),
        (8, 2, [1, 4]),
    ]

    ask(tmp_path / "0", [[5, 6]], (1,), Path(sys.executable), adapter=(tmp_path / "1", 12))
    asked = json.loads((tmp_path / "log.json").read_text())
    assert asked["model"] == str(tmp_path / "0")
    assert (asked["enable_lora"], asked["max_lora_rank"]) == (True, 16)
    assert asked["lora"] == ["policy", 1, str(tmp_path / "1")]


@pytest.mark.vllm
def test_vllm_generates_what_transformers_generates(
    make_model: Callable[[int], Any],
    encoded: list[Any],
    tokenizer: Any,
    save_checkpoint: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as in a flow
    assert VLLM_PYTHON.exists(), "`make vllm` makes the interpreter that this test needs"
    prompts = [e.prompt_ids[: 3 + 7 * number % 40] for number, e in enumerate(encoded * 3)]
    assert len(prompts) >= 64
    model, ending = make_model(4), eos_ending(tokenizer)
    with torch.inference_mode():  # EOS's row of the output is raised towards the states that the model passes through
        states = model.model(torch.tensor([prompts[0]])).last_hidden_state[0]
        model.lm_head.weight[ending.end_id] = states.mean(0) * 0.45
    save_checkpoint(model, tmp_path / "0")
    settings = Generation(temperature=0.0, max_new_tokens=20, batch_size=1)
    end_id = ending.end_id

    def expected(stop_ids: tuple[int, ...]) -> list[Response]:
        own = Ending(end_id, stop_ids)
        return in_process.generate(
            model, prompts, settings, max_length=128, ending=own, pad_id=tokenizer.pad_token_id, seed=1
        )

    one = expected((end_id,))
    assert {response.finish_reason for response in one} == {"stop", "length"}, "the model must do both"
    assert ask(tmp_path / "0", prompts, (end_id,), VLLM_PYTHON) == one
    other = next(response for response in one if response.finish_reason == "length").ids[5]
    two = expected((end_id, other))
    assert {response.ids[-1] for response in two if response.finish_reason == "stop"} == {end_id, other}
    assert ask(tmp_path / "0", prompts, (end_id, other), VLLM_PYTHON) == two


@pytest.mark.vllm
def test_vllm_generates_with_an_adapter_what_transformers_generates(
    make_model: Callable[[int], Any],
    encoded: list[Any],
    tokenizer: Any,
    save_checkpoint: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model, ending = make_model(4), eos_ending(tokenizer)
    save_checkpoint(model, tmp_path / "base")
    adapters.attach(model, Lora(r=4, alpha=8), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapters.write(model, tmp_path / "adapter")
    prompts = [e.prompt_ids[: 3 + 7 * number % 40] for number, e in enumerate(encoded)]
    settings = Generation(temperature=0.0, max_new_tokens=20, batch_size=1)
    options: dict[str, Any] = {"max_length": 128, "ending": ending, "pad_id": tokenizer.pad_token_id, "seed": 1}
    expected = in_process.generate(model, prompts, settings, **options)
    adapter = tmp_path / "adapter", 4
    assert ask(tmp_path / "base", prompts, ending.stop_ids, VLLM_PYTHON, adapter=adapter) == expected
    adapters.use(model, None, "")
    assert in_process.generate(model, prompts, settings, **options) != expected
