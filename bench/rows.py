"""The rows and models that both sides of a benchmark get: seeded random ids, and shapes by name."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """Lengths are means; each actual length lies within a quarter of its mean."""

    prompt: int
    response: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    prompts: int  # per optimiser step
    steps: int  # measured
    peer_batch: int  # the peer's batch size in pairs: the fastest of 4, 8, 16, 32 where measured


SHAPES = {
    "tiny": Shape(6, 5, 100, 32, 64, 2, 4, 2, 4, 1, 4),  # for a test that the benchmarks run
    "long": Shape(100, 100, 32000, 256, 768, 4, 8, 8, 16, 2, 8),  # a 12M-parameter model
    "short": Shape(25, 20, 512, 128, 384, 3, 4, 4, 32, 20, 32),  # the demo's
    "wide": Shape(100, 100, 8192, 512, 1536, 4, 16, 16, 16, 2, 8),
    "answers": Shape(60, 250, 32000, 256, 768, 4, 8, 8, 8, 2, 4),
    "prompts": Shape(300, 40, 32000, 256, 768, 4, 8, 8, 8, 2, 4),
    "135m": Shape(100, 50, 49152, 576, 1536, 30, 9, 3, 4, 1, 4),  # SmolLM2-135M's
    "smollm2": Shape(60, 60, 49152, 576, 1536, 30, 9, 3, 8, 1, 4),  # the same with shorter texts
    "qwen2.5-1.5b": Shape(256, 256, 151936, 1536, 8960, 28, 12, 2, 16, 3, 4),  # for an accelerator
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model(shape: Shape, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * (shape.prompt + shape.response),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(DEVICE):  # a CPU would take long to draw a billion random weights
        return LlamaForCausalLM(config)


def groups(shape: Shape, team: int, seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """``shape.prompts`` prompts, each with a target and ``team`` responses."""
    draw = random.Random(seed)

    def ids(mean: int) -> list[int]:
        return [draw.randrange(3, shape.vocab_size) for _ in range(draw.randint(mean * 3 // 4, mean * 5 // 4))]

    return [(ids(shape.prompt), [ids(shape.response) for _ in range(1 + team)]) for _ in range(shape.prompts)]
