"""The table from objective.name to the objective. `sft` is not listed: it trains on targets alone, not on triplets."""

from __future__ import annotations

from tpaw_core.method.objectives.base import Objective
from tpaw_core.method.objectives.dpo_nll import dpo_nll_loss
from tpaw_core.method.objectives.space import space_loss
from tpaw_core.method.objectives.spin import spin_loss
from tpaw_core.method.objectives.tpaw import tpaw_loss
from tpaw_core.method.objectives.tspin import tspin_loss

OBJECTIVES: dict[str, Objective] = {
    "tpaw": tpaw_loss,
    "spin": spin_loss,
    "tspin": tspin_loss,
    "space": space_loss,
    "dpo_nll": dpo_nll_loss,
}
