"""A study through the command line: real models, tiny. Tests share one that is finished, or have a copy of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.support.workspace import TINY, Project
from tpaw_core.processes import fork_server
from tpaw_core.study import plan, run

SETTINGS = [
    *TINY,
    "data.max_train_rows=32",
    "data.max_heldout_rows=24",
    "sft.num_train_epochs=4",
    "training.train_batch_size=4",
]
OPTIONS = ["--seeds", "1-2", "--rates", "1e-3,1e-2"]
OPTIONS += ["--iterations", "2", "--validation-rows", "8", "--tuning-seeds", "1"]
METHODS = ["--method", "tpaw", "--method", "spin", "--method", "sft"]
COLUMNS = ["task", "method", "seed", "iteration", "accuracy", "stderr", "target_reward", "tokens"]


pytestmark = pytest.mark.slow


class Study(Project):
    """A project in which studies run."""

    def start_study(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "-m", "tpaw_core", "compare", *arguments)

    def compare(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "tpaw_core", "compare", *arguments, check=check)

    def study(self, name: str = "demo") -> Path:
        return self.folder / "studies" / name

    def made(self, name: str = "demo") -> dict[str, int]:
        """What is kept of finished stages, with the time it was made."""
        folders = [path for path in (self.study(name) / "made").iterdir() if path.is_dir()]
        return {path.name: (path / "seconds").stat().st_mtime_ns for path in folders}


@pytest.fixture(scope="module")
def done(host: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """After a study of three methods, two seeds and two iterations, that chooses the rate on the first seed.

    Tests that change something take a copy.
    """
    made = Study.bare(tmp_path_factory.mktemp("study") / "project")
    made.fork_from(host)
    made.compare("demo", *METHODS, *OPTIONS, *SETTINGS)
    yield made
    made.close()


@pytest.fixture
def project(done: Study, tmp_path: Path) -> Study:
    """A copy of the finished study."""
    made = Study(done.copy(tmp_path / "project").folder)
    made.fork_from(done)
    return made


@pytest.fixture
def empty(done: Study, tmp_path: Path) -> Study:
    """A project without a study."""
    made = Study.bare(tmp_path / "empty")
    made.fork_from(done)
    return made


def results(project: Study, name: str = "demo") -> pd.DataFrame:
    return pd.read_csv(project.study(name) / "results.csv")


def test_every_method_and_seed_has_one_row_per_iteration(done: Study) -> None:
    found = results(done)
    assert set(COLUMNS) <= set(found.columns)
    counts = found.groupby(["method", "seed"])["iteration"].apply(list)
    assert all(iterations == [0, 1, 2] for iterations in counts)
    assert len(counts) == 6
    assert found["accuracy"].between(0, 1).all()
    assert (found["task"] == "demo").all()
    seconds = pd.read_csv(done.study() / "seconds.csv")
    assert (seconds[seconds["iteration"] == 2]["seconds"] > 0).all()
    assert (found[found["iteration"] == 2]["tokens"] > 0).all()
    learnt = found[(found["method"] != "sft") & (found["iteration"] > 0)]
    assert learnt[["target_reward", "equal"]].notna().all(axis=None)


def test_the_rate_is_the_best_on_validation_rows_and_only_the_tuning_seed_runs_at_all(done: Study) -> None:
    grid = pd.read_csv(done.study() / "grid.csv")
    last = grid[grid["iteration"] == 2]
    assert sorted(last[last["seed"] == 1].groupby("method").size()) == [2, 2, 2]
    assert sorted(last[last["seed"] == 2].groupby("method").size()) == [1, 1, 1]
    for _, own in last[last["seed"] == 1].groupby("method"):
        best = own.sort_values(["validation", "learning_rate"], ascending=[False, True]).iloc[0]
        assert best["chosen"]
    assert last[last["seed"] == 2]["chosen"].all()


def test_methods_of_one_seed_share_the_sft_model_and_its_answers(done: Study) -> None:
    cells = [path for path in (done.study() / "cells").glob("*/*/1-*") if path.parts[-3] != "sft"]
    assert len(cells) == 4
    for name in ("checkpoints/0/model.safetensors", "synthetic/1.parquet"):
        assert len({(cell / name).stat().st_ino for cell in cells}) == 1
    found = results(done)
    first = found[found["iteration"] == 0].groupby("seed")["accuracy"]
    assert (first.nunique() == 1).all()


def test_seeds_differ(done: Study) -> None:
    rows = [next(done.study().glob(f"cells/tpaw/*/{seed}-*/data/heldout.jsonl")).read_text() for seed in "12"]
    assert rows[0] != rows[1]


def test_validation_rows_are_neither_trained_on_nor_reported(done: Study) -> None:
    (data,) = {cell / "data" for cell in list((done.study() / "cells").glob("tpaw/*/1-*"))[:1]}
    rows = {
        name: {json.loads(line)["prompt_id"] for line in (data / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation", "heldout")
    }
    assert [len(rows[name]) for name in rows] == [32, 8, 16]
    assert not rows["train"] & rows["validation"] | rows["validation"] & rows["heldout"]


def test_again_nothing_is_made_and_the_report_has_the_same_bytes(project: Study) -> None:
    before, study = project.made(), project.study()
    files = {name: (study / name).read_bytes() for name in ("results.csv", "report.md", "report.html")}
    out = project.compare("demo", *METHODS, *OPTIONS, *SETTINGS).stdout
    assert project.made() == before
    assert {name: (study / name).read_bytes() for name in files} == files
    assert "| tpaw |" in out.replace("  ", "")


def test_the_csv_files_alone_are_enough_to_continue(done: Study, empty: Study) -> None:
    """On another machine: no cell is run again, and the report is the same."""
    study = done.study()
    empty.study().mkdir(parents=True)
    for name in ("plan.json", "grid.csv", "seconds.csv", "steps.csv"):
        shutil.copy(study / name, empty.study() / name)
    empty.compare("--folder", "studies/demo")
    assert not (empty.study() / "made").exists()
    for name in ("results.csv", "grid.csv", "seconds.csv", "steps.csv", "report.md", "report.html"):
        assert (empty.study() / name).read_bytes() == (study / name).read_bytes(), name


def rows_of(project: Study, name: str) -> set[tuple[object, ...]]:
    """The rows that a study's file names, by cell and iteration."""
    table = pd.read_csv(project.study() / name)
    return set(table[["method", "learning_rate", "seed", "params", "iteration"]].itertuples(index=False, name=None))


def test_rows_made_under_other_parameters_do_not_count(done: Study, empty: Study) -> None:
    empty.study().mkdir(parents=True)
    for name in ("grid.csv", "steps.csv"):
        shutil.copy(done.study() / name, empty.study() / name)
    before = rows_of(empty, "grid.csv")
    one = ("--method", "sft", "--seeds", "1", "--rates", "1e-3", *OPTIONS[4:], *SETTINGS)
    empty.compare("demo", *one)
    assert not (empty.study() / "made").exists()
    assert rows_of(empty, "grid.csv") == before, "cells that a smaller plan does not name stay"
    empty.compare("demo", *one, "training.weight_decay=0.5")
    assert (empty.study() / "made").exists()
    assert rows_of(empty, "grid.csv") > before
    assert list(pd.read_csv(empty.study() / "results.csv")["seed"].unique()) == [1]


def test_another_seed_is_one_more_option(project: Study) -> None:
    before = project.made()
    project.compare("--folder", "studies/demo", "--seeds", "1-3")
    found = results(project)
    assert sorted(found["seed"].unique()) == [1, 2, 3]
    after = project.made()
    assert before.items() <= after.items()
    project.compare("--folder", "studies/demo", "--seeds", "1-2")
    assert sorted(results(project)["seed"].unique()) == [1, 2]


def test_a_killed_study_repeats_no_finished_stage_and_ends_with_the_same_bytes(done: Study, empty: Study) -> None:
    address = empty.environment.pop(fork_server.ADDRESS)  # its processes are to be its children
    arguments = ("demo", "--method", "tpaw", *OPTIONS[:2], "--rates", "1e-3", *OPTIONS[4:], *SETTINGS)
    process = empty.start_study(*arguments)
    made = empty.study() / "made"
    while len(list(made.glob("*/seconds"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    empty.environment[fork_server.ADDRESS] = address
    before = empty.made()
    assert len(before) >= 5
    empty.compare(*arguments)
    after = empty.made()
    assert before.items() <= after.items()
    assert len(after) > len(before)
    model = "*/checkpoints/2/model.safetensors"  # of the same cells, run without a break in another folder
    for seed in "12":
        ours, theirs = (
            {
                hashlib.sha256(path.read_bytes()).hexdigest()
                for path in p.study().glob(f"cells/tpaw/0.001/{seed}-{model}")
            }
            for p in (empty, done)
        )
        assert len(ours) == 1
        assert theirs <= ours


def test_a_study_that_lost_a_process_says_that_it_can_be_run_again(empty: Study) -> None:
    del empty.environment[fork_server.ADDRESS]  # its processes are to be its children
    process = empty.start_study("demo", "--method", "tpaw", "--rates", "1e-3", *OPTIONS[4:], *SETTINGS)
    while not list(empty.study().glob("cells/*/*/*/.tpaw/cell.lease")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    psutil.Process(process.pid).children()[0].kill()
    _, said = process.communicate()
    assert process.returncode == 75
    assert "error: a process that ran a cell was killed, perhaps because memory ran out; run the same" in said


def test_a_method_that_breaks_is_reported_and_the_others_continue(empty: Study) -> None:
    arguments = (
        "demo", "--method", "tpaw", "--method", "broken:training.max_grad_norm=0,training.optim=sgd",
        "--seeds", "1", "--rates", "1e-3,1e30", "--iterations", "1", "--validation-rows", "8",
        "--folder", "studies/broken", *SETTINGS,
    )  # fmt: skip
    out = empty.compare(*arguments).stdout
    assert "stopped: broken, learning rate 1e+30, seed 1: train@1: training:" in out
    assert "not finite (seen at step" in out
    found = results(empty, "broken")
    assert sorted(found[found["iteration"] == 1]["method"]) == ["broken", "tpaw"]
    assert "Runs that stopped" in (empty.study("broken") / "report.html").read_text()
    before = empty.made("broken")
    for path in empty.study("broken").glob("*.csv"):
        path.unlink()
    assert empty.compare(*arguments).stdout == out, "also where another run of the study found that it breaks"
    assert empty.made("broken") == before


def test_a_study_that_a_stage_refuses_says_which_cell_and_why(empty: Study) -> None:
    arguments = ("--method", "tpaw", "--seeds", "1", "--rates", "1e-3", "--folder", "studies/nothing", *SETTINGS)
    found = empty.compare("demo", *arguments, check=False)
    assert found.returncode == 1
    assert "error: tpaw, learning rate 0.001, seed 1: data.validation_rows: 500 leaves no held-out rows" in found.stderr


class Page(HTMLParser):
    """Counts what a page holds, and checks that its tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_everything_in_it(done: Study) -> None:
    page = Page((done.study() / "report.html").read_text())
    assert page.open == []
    assert page.counts["svg"] == 10
    assert page.counts["h3"] == 6  # claims
    assert not [link for link in page.links if link.startswith(("http", "//"))]


def test_the_markdown_shows_the_same_table_and_its_plots_exist(done: Study) -> None:
    text = (done.study() / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| tpaw |"))
    assert row.count("|") == 8
    final = results(done)
    final = final[(final["method"] == "tpaw") & (final["iteration"] == 2)]["accuracy"].mean()
    assert f"{100 * final:.1f} [" in row
    for line in text.splitlines():
        if line.startswith("!["):
            assert (done.study() / line.split("(")[1].rstrip(")")).exists()


def test_mlflow_has_one_run_per_cell_under_the_studys(done: Study) -> None:
    client = done.client()
    experiment = client.get_experiment_by_name("tpaw-compare").experiment_id
    runs = client.search_runs([experiment], "tags.`mlflow.runName` = 'demo'")
    assert len(runs) == 1
    cells = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{runs[0].info.run_id}'")
    first_two = [run for run in cells if run.data.params["seed"] in "12"]
    assert len(first_two) == 9
    assert {run.data.params["method"] for run in first_two} == {"tpaw", "spin", "sft"}
    assert all("iterations/accuracy" in run.data.metrics for run in cells)
    history = client.get_metric_history(first_two[0].info.run_id, "iterations/accuracy")
    assert [point.step for point in history] == [0, 1, 2]
    assert {a.path for a in client.list_artifacts(runs[0].info.run_id)} >= {"report.html", "results.csv", "plots"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--method", "spim"], "method 'spim': unknown"),
        (["demo", "--seeds", "a-b"], "--seeds 'a-b': write them as 1-5"),
        (["demo", "--rates", "fast"], "--rates 'fast': write them as 1e-4"),
        (["dema"], "recipe 'dema': no such recipe (did you mean 'demo'?)"),
        (["demo", "objective.etaa=3"], "did you mean 'eta'?"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(arguments: list[str], said: str, empty: Study) -> None:
    found = empty.compare(*arguments, "--folder", "studies/none", check=False)
    assert found.returncode == 1
    assert said in found.stderr
    assert not empty.study("none").exists()


def test_a_study_leaves_the_current_folder_as_it_is(
    empty: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in the process that asks for it, from whatever folder, and all is written in the study's."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    options = {"methods": ["sft"], "seeds": "1", "learning_rates": "1e-3", "iterations": 1, "validation_rows": 8}
    folder, made = plan.make(empty.workspace, "demo", SETTINGS, folder=None, tuning_seeds=1, **options)
    found = run.run(empty.workspace, made, folder)
    assert Path.cwd() == elsewhere
    assert list(elsewhere.iterdir()) == []
    assert folder == empty.study()
    assert list(found.grid["iteration"]) == [0, 1]
    assert (folder / "results.csv").exists()


def test_the_diagnosis_of_a_study_measures_every_methods_last_checkpoint(
    project: Study, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "docs" / "study"))
    monkeypatch.chdir(project.folder)
    diagnose = importlib.import_module("diagnose")
    monkeypatch.setattr(diagnose, "ROWS", 6)
    monkeypatch.setattr("sys.argv", ["diagnose.py", "studies/demo", "--seeds", "1"])
    diagnose.main()
    found = pd.read_csv(project.study() / "diagnosis.csv")
    assert found["method"].tolist() == ["SFT, the start", "tpaw", "spin", "sft"]
    assert found["iteration"].tolist() == [0, 2, 2, 2]
    assert found[["greedy", "sampled", "calibration", "wider", "phrased", "habit", "cut"]].stack().between(0, 1).all()
    assert (found["heldout_logp"] < 0).all()
    assert (found["entropy"] > 0).all()
