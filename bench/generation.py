"""Generation, in kept tokens per second: ours against transformers' own loop on padded batches in the given order.

A random model ends its answers after a geometrically distributed number of tokens, ``response`` on average. Both sides
sample.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from types import SimpleNamespace
from typing import Any

import torch

from bench import ratio
from bench.rows import DEVICE, SHAPES, Shape, model

EOS, PAD = 2, 0


def ending(shape: Shape) -> Any:
    """The shape's model, with a bias that gives EOS a probability of one in ``response``."""
    made = model(shape).eval()
    head = torch.nn.Linear(shape.hidden_size, shape.vocab_size, device=DEVICE)
    with torch.no_grad():
        head.weight.copy_(made.lm_head.weight)
        head.bias.zero_()
        head.bias[EOS] = math.log(shape.vocab_size / shape.response)
    made.lm_head = head
    return made


def prompts(shape: Shape, count: int) -> list[list[int]]:
    draw = random.Random(0)
    low, high = shape.prompt // 2, shape.prompt * 3 // 2
    return [[draw.randrange(3, shape.vocab_size) for _ in range(draw.randint(low, high))] for _ in range(count)]


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    from tpaw_core.data.endings import Ending
    from tpaw_core.engine.generation import in_process

    shape = SHAPES[arguments.shape]
    settings: Any = SimpleNamespace(
        max_new_tokens=2 * shape.response, temperature=1.0, top_p=1.0, batch_size=arguments.batch
    )
    limits: Any = {"max_length": 10 * (shape.prompt + shape.response), "ending": Ending(EOS), "pad_id": PAD, "seed": 1}
    policy, asked = ending(shape), prompts(shape, arguments.prompts)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=arguments.dtype == "bf16"):
        in_process.generate(policy, asked[:4], settings, **limits)
        started = time.perf_counter()
        responses = in_process.generate(policy, asked, settings, **limits)
    return _figures(sum(len(response.ids) for response in responses), started)


def transformers_loop(
    policy: Any, prompts: list[list[int]], most: int, eos_id: int = EOS, pad_id: int = PAD
) -> list[list[int]]:
    """Sampled answers of one padded batch, cut after EOS."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    out = policy.generate(
        ids.to(DEVICE),
        attention_mask=(ids != pad_id).long().to(DEVICE),
        max_new_tokens=most,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    answers = out[:, longest:].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in answers]


def padded(arguments: argparse.Namespace) -> dict[str, float]:
    shape = SHAPES[arguments.shape]
    policy, asked = ending(shape), prompts(shape, arguments.prompts)

    torch.manual_seed(1)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=arguments.dtype == "bf16"):
        transformers_loop(policy, asked[:4], 4)
        started = time.perf_counter()
        kept = sum(
            len(ids)
            for i in range(0, len(asked), arguments.batch)
            for ids in transformers_loop(policy, asked[i : i + arguments.batch], 2 * shape.response)
        )
    return _figures(kept, started)


def _figures(kept: int, started: float) -> dict[str, float]:
    return {"tokens_per_second": kept / (time.perf_counter() - started), "memory": ratio.peak_memory(DEVICE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ratio.add_shape(parser)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    if arguments := ratio.run("bench.generation", {"ours": ours, "padded": padded}, parser):
        found = ratio.in_turn(arguments, {"ours": {}, "padded": {}})
        for measured, suffix, unit in (("tokens_per_second", "", "tokens/s"), ("memory", "-memory", "GB")):
            ours_, peer = ([figures[measured] for figures in side] for side in found.values())
            name = f"generation-{arguments.shape}-{arguments.dtype}{suffix}"
            ratio.report(name, unit, ours_, peer, peer_name="transformers' loop, padded batches")


if __name__ == "__main__":
    main()
