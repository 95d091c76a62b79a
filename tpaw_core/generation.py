"""Generation: one response for every prompt. Backends: transformers (in this process), vllm (its own interpreter).

Knows models and token ids; must not know rows, teams or stages.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpaw_core.errors import TpawError
from tpaw_core.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config import Generation

WORKER = Path(__file__).with_name("vllm_worker.py")


class Response(NamedTuple):
    ids: list[int]  # as generated; EOS is the last one exactly when the model ended the answer itself
    finish_reason: str  # "stop" or "length"


def limits(prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_length: int) -> list[int]:
    """Tokens each response may have: what the prompt leaves of ``max_length``, at most ``max_new_tokens``."""
    return [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    *,
    max_length: int,
    eos_id: int,
    pad_id: int,
    seed: int,
) -> list[Response]:
    """One response a prompt with the transformers backend, in their order; the same bytes for the same seed on a CPU.

    Prompts are batched by length, so the pads are few.
    """
    import torch
    from transformers import GenerationConfig, set_seed

    room = limits(prompts, max_new_tokens=settings.max_new_tokens, max_length=max_length)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    sample = settings.temperature > 0
    responses: dict[int, Response] = {}
    own, model.generation_config = model.generation_config, GenerationConfig()  # or its penalties are mixed in below
    set_seed(seed)
    for batch in progress(batches, "generating", size=len):
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
            mask[row, longest - len(prompts[index]) :] = 1
        config = GenerationConfig(
            max_new_tokens=max(room[i] for i in batch),
            do_sample=sample,
            temperature=settings.temperature if sample else None,
            top_p=settings.top_p if sample else None,
            top_k=0 if sample else None,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            use_cache=True,
        )
        with torch.inference_mode():
            out: torch.Tensor = model.generate(  # type: ignore[operator]
                ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
        for index, row in zip(batch, out[:, longest:].tolist(), strict=True):
            responses[index] = _cut(row, eos_id, room[index])
    model.generation_config = own
    return [responses[i] for i in range(len(prompts))]


def generate_vllm(
    model: Path,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    *,
    max_length: int,
    eos_id: int,
    seed: int,
    dtype: str,
) -> list[Response]:
    """One response a prompt with vllm, in a process of its own that gives the accelerator back when it ends.

    Raises TpawError where the interpreter is missing or vllm fails.
    """
    python = settings.python or ".venv-vllm/bin/python"
    if not Path(python).exists():
        raise TpawError(f"generation.python {python!r}: no such interpreter; `make vllm` makes one that has vllm")
    room = limits(prompts, max_new_tokens=settings.max_new_tokens, max_length=max_length)
    request = {
        "model": str(model),
        "dtype": dtype,
        "prompts": [list(p) for p in prompts],
        "max_tokens": room,
        "max_length": max_length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "eos_id": eos_id,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="tpaw-vllm-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "responses.json")
        asked.write_text(json.dumps(request))
        code = subprocess.run([python, str(WORKER), str(asked), str(answered)], env=_quiet()).returncode
        if code != 0 or not answered.exists():
            raise TpawError(f"vllm ({python}) ended with status {code}; its own message is above")
        rows = json.loads(answered.read_text())
    return [_cut(ids, eos_id, tokens) for ids, tokens in zip(rows, room, strict=True)]


def _cut(ids: list[int], eos_id: int, room: int) -> Response:
    """What follows EOS is padding; what exceeds ``room`` was never allowed; no EOS is added to a cut answer."""
    ids = ids[:room]
    if eos_id in ids:
        return Response(ids[: ids.index(eos_id) + 1], "stop")
    return Response(ids, "length")


def _quiet() -> dict[str, str]:
    return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
