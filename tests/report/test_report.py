from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tpaw_core.artifacts.metrics import evaluated, read_samples
from tpaw_core.report import answers, table
from tpaw_core.report.page import write
from tpaw_core.workspace.paths import Workspace

PLOTS = {"accuracy", "rewards", "target_active", "player_weights"}
Measure = Callable[..., None]


@pytest.fixture
def measured(workspace: Workspace) -> Measure:
    """Write metrics/<t>.json and training/<t>.jsonl of one checkpoint."""

    def write(
        iteration: int,
        value: float,
        training: dict[str, float],
        log: list[dict[str, Any]] | None = None,
        parent: str | None = None,
    ) -> None:
        primary = {"benchmark": "heldout", "metric": "exact_match", "value": value, "stderr": 0.0123456, "n": 1000}
        lineage = {"checkpoint": f"digest {iteration}", "parent": parent or f"digest {iteration - 1}"}
        metrics = {"primary": primary, "benchmarks": {}, "training": training, **lineage}
        for path in (workspace.metrics(iteration), workspace.training_log(iteration)):
            path.parent.mkdir(exist_ok=True)
        workspace.metrics(iteration).write_text(json.dumps(metrics))
        if log is not None:
            lines = [json.dumps(entry) + "\n" for entry in log]
            workspace.training_log(iteration).write_text("".join(lines))

    return write


def entries(players: int) -> list[dict[str, Any]]:
    weights = {f"weights/player/{k}": 1 / players for k in range(players)}
    return [
        {
            "step": step,
            "loss": 1.0,
            "rewards/chosen": 0.1 * step,
            "rewards/rejected": -0.1,
            "weights/target_active": 0.5,
        }
        | weights
        for step in (1, 2, 3)
    ]


REWARDS = {"rewards_chosen": 0.25, "rewards_rejected": -1.5, "target_active": 0.125}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_one_row_per_checkpoint_in_order_and_dashes_where_nothing_was_trained(
    workspace: Workspace, measured: Measure
) -> None:
    for iteration in (10, 2, 0):
        measured(iteration, 0.5 + iteration / 100, REWARDS if iteration else {})
    head, rule, *rows = table.table(workspace).splitlines()
    assert cells(head) == [
        "checkpoint", "benchmark", "score", "stderr", "n", "target reward", "generated reward", "target weight active"
    ]  # fmt: skip
    assert [cells(row) for row in rows] == [
        ["0", "heldout exact_match", "0.5000", "0.0123", "1000", "-", "-", "-"],
        ["2", "heldout exact_match", "0.5200", "0.0123", "1000", "0.2500", "-1.5000", "0.1250"],
        ["10", "heldout exact_match", "0.6000", "0.0123", "1000", "0.2500", "-1.5000", "0.1250"],
    ]
    assert {len(line) for line in (head, rule, *rows)} == {len(head)}


def test_checkpoints_of_an_earlier_lineage_are_left_out_and_named(workspace: Workspace, measured: Measure) -> None:
    for iteration, parent in enumerate([None, None, "digest of an earlier 1", None]):
        measured(iteration, 0.5, REWARDS if iteration else {}, parent=parent)
    assert list(evaluated(workspace)) == [0, 1]
    lines = table.table(workspace).splitlines()
    assert len(lines) == 6
    assert cells(lines[3])[0] == "1"
    assert lines[-1] == "Not shown: 2, 3, made from an earlier version of checkpoint 1."


def test_the_report_holds_the_table_and_every_plot(workspace: Workspace, measured: Measure, tmp_path: Path) -> None:
    measured(0, 0.5, {}, log=[{"step": 1, "loss": 2.0}])
    for iteration in (1, 2, 3, 4):
        measured(iteration, 0.5, REWARDS, entries(players=min(iteration, 4)))
    (tmp_path / "report").mkdir()
    write(workspace, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert table.table(workspace) in text
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == PLOTS
    for name in PLOTS:
        assert f"![{name}]({name}.png)" in text
        with Image.open(tmp_path / "report" / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10, "more than an empty sheet"


def test_the_plots_are_the_same_bytes_for_the_same_measurements(
    workspace: Workspace, measured: Measure, tmp_path: Path
) -> None:
    measured(0, 0.5, {})
    measured(1, 0.6, REWARDS, entries(players=1))
    made = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write(workspace, tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


@pytest.mark.parametrize("measure", [lambda m: None, lambda m: m(0, 0.5, {}), lambda m: m(0, 0.5, {}, log=[])])
def test_a_report_can_be_made_before_any_iteration_is_done(
    measure: Callable[[Measure], None], workspace: Workspace, measured: Measure, tmp_path: Path
) -> None:
    measure(measured)
    (tmp_path / "report").mkdir()
    write(workspace, tmp_path / "report")
    assert (tmp_path / "report" / "report.md").read_text().startswith("# Result\n\n| checkpoint |")


def test_samples_of_a_checkpoint_without_any_are_none(workspace: Workspace) -> None:
    assert read_samples(workspace, 3) == []
    workspace.samples(3).parent.mkdir()
    workspace.samples(3).write_text('{"prompt": "é"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert read_samples(workspace, 3) == [{"prompt": "é"}, {"prompt": "b"}]


def test_answers_that_differ_stand_together_and_only_those_to_the_same_prompt(
    workspace: Workspace, measured: Measure, tmp_path: Path
) -> None:
    prompts = [["1+1?", "```\n2+2?", "3+3?", "same"], [], ["1+1?", "```\n2+2?", "other", "same"]]
    for iteration, own in enumerate(prompts):
        measured(iteration, 0.5, REWARDS if iteration else {})
        lines = [
            {
                "prompt": prompt,
                "target": "a\nb",
                "completion": "c" if prompt == "same" else f"of {iteration}",
                "correct": iteration / 2,
            }
            for prompt in own
        ]
        workspace.samples(iteration).parent.mkdir(exist_ok=True)
        workspace.samples(iteration).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if not iteration:
            assert answers.beside(workspace, 5) == []
    head = "Checkpoints 0 and 2 answer 2 of 3 held-out prompts differently."
    both = ["  target: a | b", "  checkpoint 0: of 0 (wrong)", "  checkpoint 2: of 2 (right)"]
    assert answers.beside(workspace, 1) == ["", head, "", "1+1?", *both]
    assert answers.beside(workspace, 5) == ["", head, "", "1+1?", *both, "", "``` | 2+2?", *both]
    (tmp_path / "report").mkdir()
    write(workspace, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"## Sample answers\n\n{head}\n\n    1+1?\n      target: a | b\n" in text
