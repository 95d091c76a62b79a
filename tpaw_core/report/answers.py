"""Where the first and the last checkpoint answer the same held-out prompt differently."""

from __future__ import annotations

from typing import Any

from tpaw_core.artifacts.metrics import evaluated, read_samples
from tpaw_core.workspace.paths import Workspace


def beside(workspace: Workspace, count: int) -> list[str]:
    """How many of the kept answers differ, and the first ``count`` that do; no lines where none can be compared."""
    made = list(evaluated(workspace))
    if len(made) < 2:
        return []
    first, last = made[0], made[-1]
    both = zip(read_samples(workspace, first), read_samples(workspace, last), strict=False)
    pairs = [(before, after) for before, after in both if before["prompt"] == after["prompt"]]
    if not pairs:
        return []
    different = [(before, after) for before, after in pairs if before["completion"] != after["completion"]]
    what = f"{len(different)} of {len(pairs)} held-out prompts differently"
    lines = ["", f"Checkpoints {first} and {last} answer {what}."]
    for before, after in different[:count]:
        lines += ["", _line(before["prompt"]), f"  target: {_line(before['target'])}"]
        lines += [f"  checkpoint {first}: {_answer(before)}", f"  checkpoint {last}: {_answer(after)}"]
    return lines


def _answer(sample: dict[str, Any]) -> str:
    return f"{_line(sample['completion'])} ({'right' if sample['correct'] else 'wrong'})"


def _line(text: str) -> str:
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())
