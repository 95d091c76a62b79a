"""The plan of a study: methods, seeds, learning rates, and the cells that they make."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, PrivateAttr, ValidationError

from tpaw_core.config import params_file
from tpaw_core.config.params import Count, Params, Positive
from tpaw_core.config.section import Section
from tpaw_core.errors import TpawError
from tpaw_core.study.methods import find as find_methods
from tpaw_core.workspace import files, records
from tpaw_core.workspace.paths import Workspace

PLAN_FILE = "plan.json"
AGAIN = "delete it, and `tpaw compare` recreates it from its options"


class Plan(Section):
    """What a study runs; <folder>/plan.json."""

    recipe: str
    methods: dict[str, list[str]]  # name -> overrides
    seeds: list[int]
    learning_rates: list[Positive]
    iterations: Count
    tuning_seeds: Count  # the first N seeds run at every rate, the others at the rate that was best on these
    validation_rows: Count  # held-out rows that choose the rate, and are not reported
    overrides: list[str] = Field(default_factory=list)  # for all methods; {seed} stands for the seed
    _workspace: Workspace = PrivateAttr(default_factory=Workspace)  # the project's: it has the recipe
    _made: dict[tuple[str, float, int], Cell] = PrivateAttr(default_factory=dict)  # reading a recipe takes a while

    @property
    def name(self) -> str:
        """The recipe's, without folder and ending where it is a file."""
        return Path(self.recipe).stem

    def cells(self, rates: Iterable[float], seeds: Iterable[int]) -> list[Cell]:
        """Seeds first: what cells of one seed have in common is then made while others work."""
        return [self.cell(method, rate, seed) for method in self.methods for rate in rates for seed in seeds]

    def cell(self, method: str, learning_rate: float, seed: int) -> Cell:
        """One cell with its parameters.

        Raises TpawError where the recipe and the method's overrides make none.
        """
        if (known := self._made.get((method, learning_rate, seed))) is not None:
            return known
        own = [
            *self.overrides,
            *self.methods[method],
            f"seed={seed}",
            f"training.learning_rate={learning_rate}",
            f"data.validation_rows={self.validation_rows}",
            "evaluation.tasks=[heldout, validation]",
        ]
        late = tuple(f"iterations.{t}." for t in range(self.iterations + 1, 100))
        own = [entry.replace("{seed}", str(seed)) for entry in own if not entry.startswith(late)]
        params, _ = params_file.resolve(self._workspace, self.recipe, own, self.iterations)
        kept = {key: entry for key, entry in params.iterations.items() if int(key) <= self.iterations}
        made = Cell(method, learning_rate, seed, params.model_copy(update={"iterations": kept}))
        return self._made.setdefault(made.key, made)


class Cell(NamedTuple):
    method: str
    learning_rate: float
    seed: int
    params: Params

    @property
    def key(self) -> tuple[str, float, int]:
        return self[:3]

    @property
    def name(self) -> str:
        return f"{self.method}, learning rate {self.learning_rate:g}, seed {self.seed}"

    @property
    def digest(self) -> str:
        """Of the parameters: cells of a changed plan do not find what others left."""
        return files.digest(self.params.model_dump(mode="json", by_alias=True))[:12]

    def folder(self, study: Path) -> Path:
        return study / "cells" / self.method / f"{self.learning_rate:g}" / f"{self.seed}-{self.digest}"

    def workspace(self, study: Path) -> Workspace:
        return Workspace(self.folder(study))


def home(workspace: Workspace, recipe: str | None, folder: Path | None) -> Path:
    """The study's folder: the one that is given, or the recipe's in studies/."""
    if folder is not None:
        return folder
    name = Path(recipe).stem if recipe else params_file.load(workspace.params_file).recipe
    return workspace.root / "studies" / name


def make(
    workspace: Workspace,
    recipe: str | None,
    overrides: list[str],
    *,
    methods: list[str] | None,
    seeds: str | None,
    learning_rates: str | None,
    folder: Path | None,
    **numbers: int | None,
) -> tuple[Path, Plan]:
    """The folder and the plan of a study: options first, then the folder's plan, then defaults.

    Raises TpawError for an unknown method, text that is not seeds or rates, or a damaged plan.
    """
    folder = home(workspace, recipe, folder)
    path = folder / PLAN_FILE
    known = records.read(path, dict[str, Any], AGAIN) if path.exists() else {}
    name = recipe or known.get("recipe") or str(workspace.params_file)
    params, _ = params_file.resolve(workspace, name, [entry.replace("{seed}", "1") for entry in overrides])
    rate = params.training.learning_rate
    default = {
        "methods": find_methods(["tpaw", "spin", "sft"]),
        "seeds": [1, 2, 3],
        "learning_rates": [float(f"{rate * factor:.3g}") for factor in (1 / 3, 1, 3)],
        "iterations": len(params.iterations),
        "tuning_seeds": 2,
        "validation_rows": 500,
    }
    given = {
        "recipe": name,
        "overrides": overrides or None,
        "methods": find_methods(methods) if methods else None,
        "seeds": _seeds(seeds) if seeds else None,
        "learning_rates": _rates(learning_rates) if learning_rates else None,
        **numbers,
    }
    tree = {**default, **known, **{key: value for key, value in given.items() if value is not None}}
    tree["tuning_seeds"] = min(tree["tuning_seeds"], len(tree["seeds"]))
    try:
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise TpawError(f"{path}: {where}: {error.errors()[0]['msg']}; {AGAIN}") from None
    plan._workspace = workspace
    return folder, plan


def _seeds(text: str) -> list[int]:
    """ "1-3,7" to [1, 2, 3, 7]."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise TpawError(f"--seeds {text!r}: write them as 1-5 or 1,2,7")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise TpawError(f"--rates {text!r}: write them as 1e-4,3e-4")
    return found
