"""data: the rows that a recipe asks for."""

from __future__ import annotations

from tpaw_core.data import prepare
from tpaw_core.stages.context import Context


def data(context: Context) -> dict[str, int]:
    """Reads the recipe's rows. Writes data/. Refuses rows as `tpaw_core.data.prepare` says."""
    with context.workspace.exclusive("data"):
        return prepare.prepare(context.workspace, context.params.data, context.params.seed)
