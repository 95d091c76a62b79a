"""Packed batches compared with the plain forward pass: log-probabilities and gradients, for every packed attention.

Errors are relative to plain float32, in the L2 norm. Needs only torch and transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from bench import plain, ratio
from bench.rows import DEVICE, SHAPES, groups, model
from tpaw_core.engine import attention, packing
from tpaw_core.engine.logps import response_logps

TEAM, PROMPTS = 3, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="wide")
    shape = parser.parse_args().shape
    policy, prompts = model(SHAPES[shape]), groups(SHAPES[shape], TEAM)[:PROMPTS]
    pack = packing.pack(prompts).to(policy.device)
    rows = [(prompt, response) for prompt, responses in prompts for response in responses]
    expected = _with_gradient(policy, partial(plain.logps, policy, rows), bf16=False)
    errors: dict[str, dict[str, float]] = {}
    for way in ("plain", *attention.packed_attentions(policy)):
        for bf16 in (False, True):
            with nullcontext() if way == "plain" else attention.packed(policy, way):
                logps = partial(plain.logps, policy, rows) if way == "plain" else partial(response_logps, policy, pack)
                found = _with_gradient(policy, logps, bf16=bf16)
            first, *gradients = [_error(own, true) for own, true in zip(found, expected, strict=True)]
            name = f"{way}, {'bf16' if bf16 else 'float32'}"
            errors[name] = {"logps": first, "gradient": max(gradients)}
            print(f"{name}: log-probabilities {first:.2g}, gradient {max(gradients):.2g}", flush=True)
    ratio.write({"name": f"equality-{shape}-{DEVICE}", "relative_error": errors})


def _with_gradient(policy: torch.nn.Module, logps: Callable[[], Tensor], *, bf16: bool) -> list[Tensor]:
    """The log-probabilities, then the gradient of their mean for each parameter."""
    policy.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        values = logps()
    values.mean().backward()
    return [values.detach(), *(p.grad.detach().clone() for p in policy.parameters() if p.grad is not None)]


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
