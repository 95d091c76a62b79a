"""What the tests share: tiny models, rows of the demo's corpus, a workspace in tmp_path.

Imports torch and transformers where a fixture needs them, so that tests of plain code start at once.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", TOKENIZERS_PARALLELISM="false")
os.environ["OMP_NUM_THREADS"] = "1"  # two xdist workers share two cores

import pytest
from filelock import FileLock

from tests.support.rows import encode_rows
from tests.support.workspace import COMMANDS, Project
from tpaw_core.artifacts import checkpoint
from tpaw_core.config import params_file
from tpaw_core.config.params import Params, Scratch
from tpaw_core.data import arithmetic
from tpaw_core.data.rows import Row
from tpaw_core.workspace.paths import Workspace

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 128
TINY = Scratch(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that at the end no process of pytest-xdist works alone."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Trainer collects garbage after every run: what is imported by now need not be looked through each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _messages_reach_caplog() -> None:
    """Whatever a test or a command did to the package's logger before: it passes everything on to pytest's handler."""
    package = logging.getLogger("tpaw_core")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.INFO)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return [
        Row(f"{number:016d}", [{"role": "user", "content": problem}], answer)
        for number, (problem, answer) in enumerate(arithmetic.problems(24, seed=3))
    ]


@pytest.fixture(scope="session")
def tokenizer(rows: list[Row]) -> Any:
    from tpaw_core.engine import scratch

    return scratch.tokenizer([m["content"] + row.completion for row in rows for m in row.prompt], TINY, MAX_LENGTH)


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[[int], Any]:
    """A new tiny model (hidden 64, head_dim 32) for a seed; sharper than at random, so that log-probs differ."""
    import torch

    from tpaw_core.engine import scratch

    def make(seed: int) -> Any:
        model = scratch.model(TINY, tokenizer, max_length=MAX_LENGTH, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[[int], Any]) -> Any:
    """One tiny model for tests that only read it."""
    return make_model(0)


class Encoded(NamedTuple):
    prompt_ids: list[int]
    chosen_ids: list[int]


@pytest.fixture(scope="session")
def encoded(rows: list[Row], tokenizer: Any) -> list[Encoded]:
    made = encode_rows(rows, tokenizer, max_length=MAX_LENGTH)
    return [Encoded(list(p), list(c)) for p, c in zip(made.prompts, made.chosen, strict=True)]


@pytest.fixture
def workspace_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace, and the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mount_small_disk() -> Iterator[Callable[[Path], Path]]:
    """Mounts a file system of 2 MiB at a folder."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made: list[Path] = []

    def mount(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(mount_small_disk: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A file system of 2 MiB."""
    return mount_small_disk(tmp_path / "disk")


@pytest.fixture
def save_checkpoint(tokenizer: Any) -> Callable[..., checkpoint.Manifest]:
    """Save a model the way a stage does: model, tokenizer, manifest."""

    def save(model: Any, folder: Path, iteration: int = 0, parent: str | None = None) -> checkpoint.Manifest:
        folder.mkdir(parents=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return checkpoint.seal(folder, iteration, checkpoint.Origin(parent))

    return save


@pytest.fixture(scope="session")
def params() -> Params:
    """The demo's parameters."""
    return params_file.load(ROOT / "recipes" / "demo.yaml")


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def variant(tokenizer: Any) -> Callable[[str], Any]:
    """The tokenizer as it is, or with another template, or one that puts BOS before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    def make(kind: str) -> Any:
        made = copy.deepcopy(tokenizer)
        if kind != "plain":
            made.chat_template = CHATML
        if "bos" in kind:
            made.bos_token = made.eos_token
            made.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{made.bos_token} $A", special_tokens=[(made.bos_token, made.bos_token_id)]
            )
        if kind == "bos in template":
            made.chat_template = "{{ bos_token }}" + CHATML
        return made

    return make


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def architecture() -> Callable[..., Any]:
    """Makes a small model of another family, with weights large enough for log-probabilities to differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str, **changes: Any) -> Any:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """An empty folder, with the preloaded process from which the commands of all projects are forked."""
    made = Project(tmp_path_factory.mktemp("host"))
    made.preload()
    server = made.server
    yield made
    made.close()
    assert server is not None
    assert server.returncode == 0


@pytest.fixture(scope="session")
def finished(host: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project after `dvc repro` of SFT and two iterations. Tests that change something take a copy."""
    project = _shared(tmp_path_factory, "finished", partial(_two_iterations, host))
    project.fork_from(host)
    yield project
    project.close()


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the finished project."""
    made = finished.copy(tmp_path / "project")
    yield made
    made.close()


@pytest.fixture(scope="session")
def longer(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The finished project after two more iterations. Tests that change something take a copy."""
    made = _shared(tmp_path_factory, "longer", partial(_four_iterations, finished))
    made.fork_from(finished)
    yield made
    made.close()


def _two_iterations(host: Project, folder: Path) -> Project:
    made = Project.make(folder, "sft.num_train_epochs=2")
    made.fork_from(host)
    made.run(*COMMANDS["repro"])
    return made


def _four_iterations(finished: Project, folder: Path) -> Project:
    made = finished.copy(folder)
    made.keep_iterations(4)
    made.run(*COMMANDS["repro"])
    return made


def _shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Project]) -> Project:
    """A project that is made once for all processes of pytest-xdist."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder).close()
            done.touch()
    return Project(folder)
