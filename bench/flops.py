"""The share of the machine's matrix-product rate that a training step reaches.

Counts the operations of the products that the loss and its gradient need: 6 per weight and token, plus those of
attention. What is computed twice to save memory counts once. The machine's rate is the best of several square products
in the same number format.
"""

from __future__ import annotations

import argparse
import time

import torch

from bench import ratio, training
from bench.rows import DEVICE, SHAPES, Shape, groups


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    figures = training.ours(arguments)
    shape = SHAPES[arguments.shape]
    per_triplet = step_flops(shape, arguments.team) / (shape.prompts * arguments.team)
    return {"tflops": figures["triplets_per_second"] * per_triplet / 1e12}


def product(arguments: argparse.Namespace) -> dict[str, float]:
    """The rate of matrix products, in TFLOP/s."""
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    best = 0.0
    for size in (1024, 2048, 4096) if DEVICE == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(max(1, (4096 // size) ** 2)):
                a @ b
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            best = max(best, max(1, (4096 // size) ** 2) * 2 * size**3 / (time.perf_counter() - started))
    return {"tflops": best / 1e12}


def step_flops(shape: Shape, team: int) -> float:
    """Operations of one optimiser step, with every prompt computed once."""
    head_dim = shape.hidden_size // shape.heads
    projections = shape.hidden_size * head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    weights = shape.layers * (projections + 3 * shape.hidden_size * shape.intermediate_size)
    total = 0.0
    for prompt, responses in groups(shape, team):
        own = [len(ids) - 1 for ids in responses]
        seen = len(prompt) * (len(prompt) + 1) / 2 + sum(n * len(prompt) + n * (n + 1) / 2 for n in own)
        total += 6 * weights * (len(prompt) + sum(own))
        total += 12 * shape.layers * shape.heads * head_dim * seen
        total += 6 * shape.hidden_size * shape.vocab_size * sum(map(len, responses))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ratio.add_shape(parser)
    parser.set_defaults(shape="wide", dtype="bf16")
    if arguments := ratio.run("bench.flops", {"ours": ours, "product": product}, parser):
        found = ratio.in_turn(arguments, {"ours": {}, "product": {}})
        rates = [[figures["tflops"] for figures in side] for side in found.values()]
        name = f"flops-{arguments.shape}-{arguments.dtype}"
        ratio.report(name, "TFLOP/s", *rates, peer_name="square matrix products")


if __name__ == "__main__":
    main()
