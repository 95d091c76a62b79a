"""What else changed: figures of a study's checkpoints beside held-out accuracy.

    python docs/study/diagnose.py docs/study/latent-skill      (needs the study's cells; writes a CSV file there)

sampled: accuracy of answers at temperature 1. entropy: nats a token of those answers. heldout_logp: nats a token of
held-out targets. calibration: expected error of the greedy answer's probability, ten bins. wider: greedy accuracy on
numbers of 20-39. phrased: the same sums in other words. habit: greedy answers that do sums without carrying, where that
is wrong. cut: answers without an end.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from latent_skill import without_carry

from tpaw_core.artifacts import checkpoint
from tpaw_core.artifacts.encoded import read_encoded, read_encoding
from tpaw_core.config.params import Generation, Params
from tpaw_core.data import arithmetic, turns
from tpaw_core.data.endings import Response
from tpaw_core.data.rows import read_rows
from tpaw_core.data.tokens import Ids
from tpaw_core.engine import scoring
from tpaw_core.engine.generation import in_process
from tpaw_core.evaluation.answers import answer
from tpaw_core.study import results
from tpaw_core.study.plan import PLAN_FILE, Plan
from tpaw_core.workspace.paths import Workspace

ROWS, PATTERN = 500, r"#### (-?\d+)"
Problem = tuple[str, str]  # its text and the answer


def wider(count: int) -> list[Problem]:
    """The corpus's first kind of problem with numbers that it never has."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        name, other = draw.sample(arithmetic.NAMES, 2)
        thing = draw.choice(arithmetic.THINGS)
        have, more, less = (draw.randint(20, 39) for _ in range(3))
        text = f"{name} has {have} {thing}. {name} buys {more} more and then gives {less} to {other}. "
        found.append((f"{text}How many {thing} does {name} have now?", str(have + more - less)))
    return found


def phrased(count: int) -> list[Problem]:
    """Numbers of the corpus, words it never puts so."""
    draw = random.Random(2)
    found = []
    for _ in range(count):
        name, thing = draw.choice(arithmetic.NAMES), draw.choice(arithmetic.THINGS)
        have, more = draw.randint(3, 19), draw.randint(3, 19)
        less = draw.randint(2, min(have + more - 1, 19))
        text = f"There are {have} {thing} and {name} adds {more} more. Then {name} takes {less} of them. "
        found.append((f"{text}How many {thing} are there now?", str(have + more - less)))
    return found


def carries(count: int) -> list[tuple[str, str, str]]:
    """Problems whose first step carries: text, answer, and the answer of somebody who does not carry."""
    draw = random.Random(3)
    found = []
    while len(found) < count:
        name, other = draw.sample(arithmetic.NAMES, 2)
        thing, place = draw.choice(arithmetic.THINGS), draw.choice(arithmetic.PLACES)
        have, more, less = (draw.randint(3, 19) for _ in range(3))
        wrong = without_carry(without_carry(have, more), less)
        if wrong != have + more + less:
            text = f"A {place} holds {have} {thing}. {name} puts in {more} and {other} puts in {less}. "
            found.append((f"{text}How many {thing} are in the {place}?", str(have + more + less), str(wrong)))
    return found


def diagnose(workspace: Workspace, iteration: int, params: Params) -> dict[str, float]:
    """The figures of one checkpoint."""
    folder, (ending, pad_id) = workspace.checkpoint(iteration), read_encoding(workspace)
    model, tokenizer = checkpoint.load_model(folder), checkpoint.load_tokenizer(folder)
    options: dict[str, Any] = {"ending": ending, "pad_id": pad_id, "seed": 0}
    settings = Generation(max_new_tokens=params.generation.max_new_tokens, batch_size=500)

    def prompts_of(texts: Sequence[str]) -> list[Ids]:
        chats = ([{"role": "user", "content": text}] for text in texts)
        kwargs = params.model.chat_template_kwargs
        shown = [turns.render(tokenizer, chat, kwargs, add_generation_prompt=True) for chat in chats]
        return list(tokenizer(shown, add_special_tokens=False)["input_ids"])

    def answers(prompts: Sequence[Ids], temperature: float) -> tuple[list[Response], list[str]]:
        own = settings.model_copy(update={"temperature": temperature})
        found = in_process.generate(model, prompts, own, max_length=params.model.max_length, **options)
        said = tokenizer.batch_decode([list(r.ids) for r in found], skip_special_tokens=True)
        return found, [answer(text, PATTERN) or "" for text in said]

    def right(problems: Sequence[Problem]) -> float:
        _, said = answers(prompts_of([text for text, _ in problems]), 0.0)
        return sum(a == b for a, (_, b) in zip(said, problems, strict=True)) / len(problems)

    encoded = read_encoded(workspace, "heldout", ROWS)
    rows, prompts = list(read_rows(workspace.heldout_rows)), encoded.prompts
    truth = [answer(rows[place].completion, PATTERN) for place in encoded.places]
    sampled, said = answers(prompts, 1.0)
    logps = scoring.score(model, [(p, r.ids) for p, r in zip(prompts, sampled, strict=True)], pad_id=pad_id)
    targets = list(zip(prompts, encoded.chosen, strict=True))
    greedy, best = answers(prompts, 0.0)
    sure = scoring.score(model, [(p, r.ids) for p, r in zip(prompts, greedy, strict=True)], pad_id=pad_id)
    correct = [a == b for a, b in zip(best, truth, strict=True)]
    _, carried = answers(prompts_of([text for text, _, _ in carries(ROWS)]), 0.0)
    return {
        "greedy": sum(correct) / len(correct),
        "sampled": sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth),
        "entropy": -math.fsum(logps) / sum(len(r.ids) for r in sampled),
        "heldout_logp": math.fsum(scoring.score(model, targets, pad_id=pad_id)) / sum(len(ids) for _, ids in targets),
        "calibration": calibration([math.exp(logp) for logp in sure], correct),
        "wider": right(wider(ROWS)),
        "phrased": right(phrased(ROWS)),
        "habit": sum(a == b for a, (_, _, b) in zip(carried, carries(ROWS), strict=True)) / ROWS,
        "cut": sum(r.finish_reason == "length" for r in greedy) / len(greedy),
    }


def calibration(sure: Sequence[float], correct: Sequence[bool]) -> float:
    """Expected calibration error: the mean over ten bins, weighted by rows, of |share right - mean probability|."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, is_right in zip(sure, correct, strict=True):
        bins.setdefault(min(9, int(10 * probability)), []).append((probability, is_right))
    gaps = (abs(sum(r for _, r in rows) - sum(p for p, _ in rows)) for rows in bins.values())
    return sum(gaps) / len(sure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many of the plan's first seeds")
    parser.add_argument("--rate", type=float, help="this learning rate instead of each method's best")
    parser.add_argument("--name", default="diagnosis", help="of the CSV file")
    arguments = parser.parse_args()
    plan = Plan.model_validate_json((arguments.study / PLAN_FILE).read_text())
    best = results.best_rates(plan, results.read_csv(arguments.study, results.GRID_FILE))
    found = []
    for seed in plan.seeds[: arguments.seeds]:
        for number, method in enumerate(plan.methods):
            cell = plan.cell(method, arguments.rate or best[method], seed)
            workspace = cell.workspace(arguments.study)
            if number == 0:  # all methods start from one checkpoint
                figures = diagnose(workspace, 0, cell.params)
                found.append({"method": "SFT, the start", "seed": seed, "iteration": 0, **figures})
            figures = diagnose(workspace, plan.iterations, cell.params)
            found.append({"method": method, "seed": seed, "iteration": plan.iterations, **figures})
    table = pd.DataFrame(found)
    table.to_csv(arguments.study / f"{arguments.name}.csv", index=False, float_format="%.5g")
    print(table.groupby(["iteration", "method"], sort=False).mean(numeric_only=True).drop(columns="seed").round(3))


if __name__ == "__main__":
    main()
