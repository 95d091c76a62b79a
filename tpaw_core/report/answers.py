"""The same held-out prompts as the first and the last checkpoint answer them."""

from __future__ import annotations

from itertools import islice
from typing import Any

from tpaw_core.artifacts.metrics import evaluated, read_samples
from tpaw_core.workspace.paths import Workspace


def beside(workspace: Workspace, count: int) -> list[str]:
    """Lines for the first ``count`` prompts whose answers were kept; none with fewer than two checkpoints."""
    made = list(evaluated(workspace))
    if len(made) < 2:
        return []
    first, last = made[0], made[-1]
    lines = []
    for before, after in islice(
        zip(read_samples(workspace, first), read_samples(workspace, last), strict=False), count
    ):
        if before["prompt"] == after["prompt"]:
            lines += ["", _line(before["prompt"]), f"  target: {_line(before['target'])}"]
            lines += [f"  checkpoint {first}: {_answer(before)}", f"  checkpoint {last}: {_answer(after)}"]
    return lines


def _answer(sample: dict[str, Any]) -> str:
    return f"{_line(sample['completion'])} ({'right' if sample['correct'] else 'wrong'})"


def _line(text: str) -> str:
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())
