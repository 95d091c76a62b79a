from __future__ import annotations

from pathlib import Path

import pytest

from tpaw_core.config import params_file
from tpaw_core.errors import TpawError
from tpaw_core.study import methods
from tpaw_core.workspace.paths import Workspace


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_method_is_a_change_of_the_demo_that_the_parameters_take(name: str, root: Path) -> None:
    plain, _ = params_file.resolve(Workspace(root), "demo")
    params, _ = params_file.resolve(Workspace(root), "demo", methods.METHODS[name].overrides)
    assert (params == plain) == (name == "tpaw")
    assert params.training == plain.training
    assert methods.METHODS[name].source


def test_spin_has_two_data_sets_and_one_judge() -> None:
    assert methods.METHODS["spin"].overrides == ("objective.name=spin", "team.size=2", "team.players=1")


def test_a_method_of_ones_own_is_written_with_its_overrides() -> None:
    found = methods.find(["tpaw", "mine:objective.eta=2,team.size=2"])
    assert found == {"tpaw": [], "mine": ["objective.eta=2", "team.size=2"]}


def test_an_unknown_method_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(TpawError, match=r"method 'spim': unknown; available: tpaw, spin, sft"):
        methods.find(["spim"])
