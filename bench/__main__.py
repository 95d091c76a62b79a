"""`python -m bench` runs every benchmark in turn. `python -m bench gpu` runs those for an accelerator, without TRL."""

from __future__ import annotations

import subprocess
import sys

LAPTOP = (
    *(f"training --shape {shape} --dtype {dtype}" for shape in ("long", "short") for dtype in ("float32", "bf16")),
    *(f"training --shape {shape} --dtype bf16" for shape in ("wide", "answers", "prompts")),
    "training --shape long --peer live",
    *(f"scoring --shape {shape} --dtype {dtype}" for shape in ("long", "short") for dtype in ("float32", "bf16")),
    "generation --shape long",
    "generation --shape short --prompts 1000 --batch 500",
    "iteration",
    "flops --shape wide --dtype bf16",
    "growth --shape long",
    "many_rows --repeats 1",
    "overhead",
    "sums",
    "sums --parts 4",
    "lora --repeats 1",
)
GPU = (
    "equality --shape wide",
    "training --shape qwen2.5-1.5b --dtype bf16 --peer pairs",
    "scoring --shape qwen2.5-1.5b --dtype bf16 --peer pairs",
    "flops --shape qwen2.5-1.5b --dtype bf16",
)

if __name__ == "__main__":
    failed = []
    for line in GPU if sys.argv[1:] == ["gpu"] else LAPTOP:
        name, *options = line.split()
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *options]).returncode:
            failed.append(line)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")
