"""The rows and the base model of the task *latent skill*: a model that shows a bad habit, and rows that do not.

The habit: sums without carrying, 17+8=15. The base model is trained from nothing on problems, 60% of them worked so;
then a few clean rows are the SFT set. It is the small image of a pretrained model and a short SFT: the skill is there,
and so is what hides it.

    python docs/study/latent_skill.py studies/latent-skill
    tpaw compare docs/study/latent-skill.yaml --folder docs/study/latent-skill ...
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from tpaw_core.config import params_file
from tpaw_core.data import arithmetic
from tpaw_core.stages.context import Context
from tpaw_core.stages.data import data
from tpaw_core.stages.encode import encode
from tpaw_core.stages.evaluate import evaluate
from tpaw_core.stages.sft import sft
from tpaw_core.workspace.paths import Workspace

BASE_ROWS, CLEAN_ROWS, HELDOUT_ROWS = 12_000, 200, 5_500
HABIT = 0.6
SEEDS = range(1, 11)


def without_carry(left: int, right: int) -> int:
    """Digit by digit, what is above nine forgotten."""
    total, place = 0, 1
    while left or right:
        total += (left % 10 + right % 10) % 10 * place
        left, right, place = left // 10, right // 10, place * 10
    return total


def with_habit(answer: str) -> str:
    """A worked answer of the corpus as somebody with the habit works it: later steps go on from the wrong sum."""
    *steps, _ = answer.splitlines()
    result: int | None = None
    lines = []
    for step in steps:
        match = re.fullmatch(r"(\d+)([-+*])(\d+)=\d+", step)
        assert match, step
        left, sign, right = int(match[1]), match[2], int(match[3])
        left = left if result is None else result
        result = {"+": without_carry(abs(left), right), "-": left - right, "*": left * right}[sign]
        lines.append(f"{left}{sign}{right}={result}")
    return "\n".join([*lines, f"#### {result}"])


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"prompt": problem, "completion": answer}) + "\n" for problem, answer in pairs)
    path.write_text("".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    problems = arithmetic.problems(BASE_ROWS + HELDOUT_ROWS + CLEAN_ROWS * len(SEEDS), seed=0)
    base, heldout, clean = (
        problems[:BASE_ROWS],
        problems[BASE_ROWS : BASE_ROWS + HELDOUT_ROWS],
        problems[BASE_ROWS + HELDOUT_ROWS :],
    )
    draw = random.Random(0)
    mixed = [(problem, with_habit(answer) if draw.random() < HABIT else answer) for problem, answer in base]
    write(folder / "base.jsonl", mixed)
    write(folder / "heldout.jsonl", heldout)
    for number, seed in enumerate(SEEDS):
        write(folder / f"clean-{seed}.jsonl", clean[number * CLEAN_ROWS : (number + 1) * CLEAN_ROWS])
    params, _ = params_file.resolve(
        Workspace(),
        "demo",
        [
            f"data.path={(folder / 'base.jsonl').resolve()}",
            f"data.heldout_path={(folder / 'heldout.jsonl').resolve()}",
            "data.max_train_rows=null",
            "data.max_heldout_rows=1000",
            "sft.num_train_epochs=6",
        ],
    )
    (folder / "base").mkdir(exist_ok=True)
    context = Context(Workspace(folder / "base"), params)
    data(context)
    encode(context)
    sft(context)
    evaluate(context, 0)


if __name__ == "__main__":
    main()
