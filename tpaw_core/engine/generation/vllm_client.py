"""Generation by vllm, which has an interpreter of its own.

Knows how to ask `vllm_worker` and how its answers end; must not import vllm or torch. Not called vllm.py: the worker
runs in this folder, where `import vllm` would find it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpaw_core.data.endings import Ending, Response, limits
from tpaw_core.data.tokens import Ids
from tpaw_core.errors import TpawError

if TYPE_CHECKING:
    from tpaw_core.config.params import Generation
    from tpaw_core.workspace.paths import Workspace

PYTHON = ".venv-vllm/bin/python"  # where `make vllm` puts it
WORKER = Path(__file__).with_name("vllm_worker.py")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vllm has room
OF_A_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # not vllm's own
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def interpreter(workspace: Workspace, settings: Generation) -> Path:
    """The one that has vllm. Raises TpawError if it does not exist or has none."""
    python = workspace.input(settings.python or PYTHON)
    if not python.exists():
        raise TpawError(f"generation.python {str(python)!r}: no such interpreter; `make vllm` installs it")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([str(python), "-c", look]).returncode != 0:
        raise TpawError(f"generation.python {str(python)!r}: this interpreter has no vllm; `make vllm` installs it")
    return python


def generate(
    model: str,
    prompts: Sequence[Ids],
    settings: Generation,
    *,
    max_length: int,
    ending: Ending,
    seed: int,
    dtype: str,
    python: Path,
    adapter: tuple[Path, int] | None = None,
    tensor_parallel: int = 1,
    numbers: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Response]:
    """One response per prompt, from a process that gives the accelerator back when it ends.

    ``adapter``: the folder of a LoRA adapter on ``model``, and its rank. ``numbers``: of these prompts among all, which
    decide their seeds. ``environment``: what else the process finds there.

    Raises TpawError if vllm fails.
    """
    room = limits(prompts, max_new_tokens=settings.max_new_tokens, max_length=max_length)
    request = {
        "model": model,
        "adapter": str(adapter[0].absolute()) if adapter else None,
        "rank": next((rank for rank in RANKS if adapter and rank >= adapter[1]), RANKS[-1]),
        "dtype": dtype,
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": room,
        "max_length": max_length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stop_ids": list(ending.stop_ids),
        "seed": seed,
        "seeds": [seed + number for number in (range(len(prompts)) if numbers is None else numbers)],
        "tensor_parallel": tensor_parallel,
    }
    with tempfile.TemporaryDirectory(prefix="tpaw-vllm-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "responses.json")
        asked.write_text(json.dumps(request))
        own = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        code = subprocess.run(
            [str(python), str(WORKER), str(asked), str(answered)], env={**own, **QUIET, **(environment or {})}
        ).returncode
        if code != 0 or not answered.exists():
            raise TpawError(f"vllm ({python}) failed with status {code}; see its output above")
        answers = json.loads(answered.read_text())
    return [ending.cut(ids, tokens) for ids, tokens in zip(answers, room, strict=True)]
