from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import settings
from tpaw_core.data import prepare
from tpaw_core.data.rows import read_rows
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace

SHARED = Path(__file__).parents[3] / "shared" / "data"
Make = Callable[..., dict[str, int]]
MAWPS = {"Question": "Tom has number0 pens and buys number1 .", "Numbers": "3.0 4.5", "Equation": "+ number0 number1"}


@pytest.mark.parametrize(
    ("equation", "answer"),
    [
        ("+ number0 number1", "7.5"),
        ("- number0 number1", "-1.5"),
        ("/ number0 number1", "0.67"),
        ("* + number0 number1 2", "15.0"),
        ("* + number0 2 + number1 1", "27.5"),
        ("number1", "4.5"),
    ],
)
def test_a_mawps_row_keeps_its_numbers_masked_and_its_target_is_the_equation(
    equation: str, answer: str, make: Make, workspace: Workspace
) -> None:
    row = {**MAWPS, "Equation": equation, "Answer": answer}
    make([row], [{**row, "Question": "other"}], format="mawps")
    (found,) = read_rows(workspace.train_rows)
    assert found.prompt == [{"role": "user", "content": MAWPS["Question"]}]
    assert found.completion == f"#### {equation}"


@pytest.mark.parametrize(
    "changes",
    [
        {"Numbers": "three 4"},
        {"Equation": "+ number0"},
        {"Equation": "number0 number1"},
        {"Equation": "+ number0 number2"},
        {"Equation": "/ number0 0"},
        {"Answer": "8.5"},
        {"Answer": "?"},
        {"Answer": None},
    ],
)
def test_a_broken_mawps_row_is_refused(changes: dict[str, Any], make: Make) -> None:
    with pytest.raises(TpawError, match=r"1 of 1 rows cannot be used; the first reasons: row 1: "):
        make([{**MAWPS, "Answer": "7.5", **changes}], format="mawps")


@pytest.mark.skipif(not SHARED.exists(), reason=f"the real rows are not at {SHARED}")
def test_mawps_fold_0_is_read_and_its_equations_hold(workspace: Workspace) -> None:
    fold = SHARED / "mwp" / "mawps" / "fold0"
    lines = {name: len(list(csv.DictReader((fold / name).open()))) for name in ("train.csv", "dev.csv")}
    counts = prepare.prepare(
        workspace,
        settings(path=str(fold / "train.csv"), heldout_path=str(fold / "dev.csv"), format="mawps", drop_overlap=True),
        1,
    )
    assert counts["train"] > 0.8 * lines["train.csv"]
    assert counts["heldout"] > 0.6 * lines["dev.csv"]
    assert all(re.fullmatch(r"#### [-+*/ \d.number]+", row.completion) for row in read_rows(workspace.train_rows))
