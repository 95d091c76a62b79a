"""The page from made-up results: what a study by itself seldom shows."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tpaw_core.study import page
from tpaw_core.study.intervals import Interval
from tpaw_core.study.plan import Plan
from tpaw_core.study.results import Results

ONE = Interval(0.5, math.nan, math.nan, 1)


def plan(**changes: Any) -> Plan:
    methods = {"tpaw": [], "spin": ["objective.name=spin", "team.players=1"], "<b>mine": ["objective.eta=2"]}
    own = {"recipe": "demo", "methods": methods, "seeds": [1, 2], "learning_rates": [1e-4, 3e-4], "iterations": 2}
    return Plan(**{**own, "tuning_seeds": 1, "validation_rows": 8, **changes})


def results(made: Plan, stopped: str = "") -> Results:
    """Every method the same; ``stopped`` got to iteration 1 only."""
    rows = []
    for method in made.methods:
        for seed in made.seeds:
            for iteration in range(2 if method == stopped else 3):
                rows.append(
                    {
                        "task": "demo", "method": method, "learning_rate": 1e-4, "seed": seed, "iteration": iteration,
                        "accuracy": 0.5 + 0.1 * iteration + 0.01 * seed, "stderr": 0.02, "validation": 0.5,
                        "target_reward": 0.1 if iteration else None, "answer_reward": -0.1, "target_logp": -5.0,
                        "answer_logp": -6.0, "target_active": 0.3, "equal": 0.2, "seconds": 3.0 * iteration,
                        "tokens": 100 * iteration, "params": "x", "chosen": True,
                        "stopped": "train@2: not finite" if method == stopped else None,
                    }
                )  # fmt: skip
    steps = [
        {"method": method, "learning_rate": 1e-4, "seed": seed, "iteration": 1, "step": step, "params": "x"}
        | {"target_reward": 0.1 * step, "target_active": 0.5, "player_0": 1.0}
        for method in made.methods
        for seed in made.seeds
        for step in (1, 2)
    ]
    return Results(pd.DataFrame(rows), pd.DataFrame(steps))


def written(folder: Path, made: Plan, found: Results) -> tuple[str, str]:
    page.write(made, folder, found)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_one_seed_has_no_interval_and_the_page_says_no_nan(tmp_path: Path) -> None:
    made = plan(seeds=[1])
    for text in written(tmp_path, made, results(made)):
        assert "nan" not in re.sub("<svg.*?</svg>", "", text, flags=re.DOTALL).lower()
    assert page.points(ONE) == "50.0"
    assert page.signed(ONE) == "+50.0"


def test_a_method_that_stopped_has_its_last_figures_and_no_difference(tmp_path: Path) -> None:
    made = plan()
    html, markdown = written(tmp_path, made, results(made, stopped="spin"))
    line = next(line for line in markdown.splitlines() if line.startswith("| spin |"))
    assert [cell.strip() for cell in line.split("|")[1:-1]][2:] == ["51.5 [45.1, 57.9]", "61.5 [55.1, 67.9]", "-", "-"]
    assert "spin, learning rate 0.0001, seed 2: train@2: not finite" in html
    assert "| spin | 0.0001* |" in re.sub(" +", " ", page.table(made, results(made, stopped="spin")))


def test_names_are_text_in_the_page(tmp_path: Path) -> None:
    made = plan()
    html, _ = written(tmp_path, made, results(made))
    assert "<b>mine" not in html
    assert "&lt;b&gt;mine" in html


@pytest.mark.parametrize(
    ("interval", "scale", "text"),
    [
        (Interval(0.0123, -0.004, 0.0286, 5), 100.0, "+1.2 [-0.4, +2.9]"),
        (Interval(-0.0123, -0.02, -0.0046, 5), 1.0, "-0.0123 [-0.0200, -0.0046]"),
        (None, 100.0, "-"),
    ],
)
def test_a_difference_shows_its_sign_and_both_ends(interval: Interval | None, scale: float, text: str) -> None:
    assert page.signed(interval, scale) == text


def test_equal_results_make_equal_bytes(tmp_path: Path) -> None:
    made = plan()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert written(tmp_path / "a", made, results(made)) == written(tmp_path / "b", made, results(made))
