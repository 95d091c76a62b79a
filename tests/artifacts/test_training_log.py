from __future__ import annotations

import pytest

from tpaw_core.artifacts.training_log import last_quarter, read_log, write_log
from tpaw_core.errors import TpawError
from tpaw_core.workspace.paths import Workspace


def test_a_log_comes_back_as_it_was_written(workspace: Workspace) -> None:
    log = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1 / 3}]
    write_log(workspace, 1, log)
    assert read_log(workspace, 1) == log
    assert read_log(workspace, 2) == []


def test_a_damaged_line_is_named(workspace: Workspace) -> None:
    write_log(workspace, 1, [{"step": 1}, {"step": 2}])
    path = workspace.training_log(1)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(TpawError, match=rf"{path}, line 2: is damaged"):
        read_log(workspace, 1)


@pytest.mark.parametrize(("entries", "loss"), [(1, 1.0), (3, 3.0), (8, 7.5), (11, 10.5)])
def test_the_last_quarter_is_where_an_iteration_ended(entries: int, loss: float, workspace: Workspace) -> None:
    """Of 8 entries the last two, of fewer than 8 the last one."""
    log = [
        {"step": n, "epoch": n / 4, "learning_rate": 0.1, "loss": float(n), "weights/player/0": 0.5}
        for n in range(1, entries + 1)
    ]
    write_log(workspace, 1, log)
    assert last_quarter(workspace, 1) == {"loss": loss, "player_0": 0.5}


def test_without_a_log_there_are_no_means(workspace: Workspace) -> None:
    assert last_quarter(workspace, 0) == {}
