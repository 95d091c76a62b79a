"""Generation: one response for every prompt. Backends: transformers (in this process), vllm (its own interpreter).

Knows models and token ids; must not know rows, teams or stages.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpaw_core.errors import TpawError
from tpaw_core.progress import progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tpaw_core.config import Generation

Ids = Sequence[int]
WORKER = Path(__file__).with_name("vllm_worker.py")


class Response(NamedTuple):
    ids: Ids  # array("i"), as generated; EOS is the last one exactly when the model ended the answer itself
    finish_reason: str  # "stop" or "length"


def limits(prompts: Sequence[Ids], *, max_new_tokens: int, max_length: int) -> list[int]:
    """Tokens each response may have: what the prompt leaves of ``max_length``, at most ``max_new_tokens``."""
    return [min(max_new_tokens, max_length - len(prompt)) for prompt in prompts]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    settings: Generation,
    *,
    max_length: int,
    eos_id: int,
    pad_id: int,
    seed: int,
) -> list[Response]:
    """One response a prompt with the transformers backend, in their order; the same bytes for the same seed on a CPU.

    Prompts are batched by length, so pads are few. A row's chances depend on the seed and its place, not on its batch.
    """
    room = limits(prompts, max_new_tokens=settings.max_new_tokens, max_length=max_length)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    responses: dict[int, Response] = {}
    for batch in progress(batches, "generating", size=len):
        draws = np.zeros((len(batch), max(room[i] for i in batch)))
        if settings.temperature > 0:
            for row, index in enumerate(batch):
                draws[row] = np.random.Generator(np.random.Philox(key=[seed, index])).random(draws.shape[1])
        answers = _decode(
            model,
            [prompts[i] for i in batch],
            [room[i] for i in batch],
            draws,
            settings,
            eos_id=eos_id,
            pad_id=pad_id,
        )
        for index, ids in zip(batch, answers, strict=True):
            responses[index] = _cut(ids, eos_id, room[index])
    return [responses[i] for i in range(len(prompts))]


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    room: Sequence[int],
    draws: NDArray[np.float64],
    settings: Generation,
    *,
    eos_id: int,
    pad_id: int,
) -> list[list[int]]:
    """Token by token, all rows at once; finished rows leave when they are an eighth of those that are computed."""
    import torch
    from transformers import DynamicCache

    device, rows, longest = model.device, len(prompts), max(map(len, prompts))
    ids = torch.full((rows, longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask, left, chances = (x.to(device) for x in (ids, mask, torch.tensor(room), torch.from_numpy(draws)))
    answers = torch.full((rows, max(room)), pad_id, device=device)
    here = torch.arange(rows, device=device)  # the rows that are still computed
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    going = torch.ones(rows, dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for step in range(max(room)):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
            logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            token = _choose(logits, chances[here, step], settings)
            answers[here, step] = token
            going &= (token != eos_id) & (left[here] > step + 1)
            count = int(going.sum())
            if count == 0:
                break
            if count <= 7 * len(here) // 8:
                stay = going.nonzero()[:, 0]
                cache.batch_select_indices(stay)
                here, mask, position, token, going = (x[stay] for x in (here, mask, position, token, going))
            ids, position = token[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return answers.tolist()


def _choose(logits: Tensor, chance: Tensor, settings: Generation) -> Tensor:
    """Tokens [B] for logits [B, V]: the likeliest, or where ``chance`` [B] in [0, 1) falls among the cumulated
    probabilities of those that temperature and top_p leave."""
    import torch

    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= settings.top_p] = 0
    cumulated = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulated, chance[:, None] * cumulated[:, -1:], right=True)
    place = place.clamp(max=logits.shape[-1] - 1)
    return (tokens.gather(-1, place) if settings.top_p < 1 else place)[:, 0]


def generate_vllm(
    model: Path,
    prompts: Sequence[Ids],
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


def _cut(answer: list[int], eos_id: int, room: int) -> Response:
    """What follows EOS is padding; what exceeds ``room`` was never allowed; no EOS is added to a cut answer."""
    ids = array("i", answer[:room])
    if eos_id in ids:
        return Response(ids[: ids.index(eos_id) + 1], "stop")
    return Response(ids, "length")


def _quiet() -> dict[str, str]:
    return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
