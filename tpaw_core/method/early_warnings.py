"""Early warnings: from an iteration's figures, why more of the same will not help and what to do instead.

Numbers in, sentences out. The limits follow from docs/settings.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MOSTLY_EQUAL = 0.9
MOSTLY_KEPT = 0.9
NEWEST_TARGET = "players/0/rewards/chosen"


def of_answers(equal: float) -> str | None:
    """``equal``: the share of an iteration's answers that equal their target."""
    if equal <= MOSTLY_EQUAL:
        return None
    return (
        f"{equal:.0%} of the answers equal their target, so there is little left to learn from: lower "
        "sft.num_train_epochs, or use rows that the model has not memorised"
    )


def of_storage(kept: float, dtype: str) -> str | None:
    """``kept``: the share of its update that a checkpoint keeps when it is stored in ``dtype``."""
    if kept >= MOSTLY_KEPT:
        return None
    return (
        f"stored in {dtype}, the checkpoint keeps only {kept:.2g} of the training update; rounding loses the rest: "
        "set model.dtype=float32 and train again (generation.dtype decides what generation computes in)"
    )


def of_training(log: Sequence[Mapping[str, float]]) -> str | None:
    """``log``: an iteration's training log. Warns where targets have become less likely than before the iteration.

    The reward of targets under the newest player starts at 0; it has fallen where its mean over the last quarter of the
    log lies more than two standard errors below.
    """
    values = [entry[NEWEST_TARGET] for entry in log if NEWEST_TARGET in entry]
    values = values[-max(2, len(values) // 4) :]
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    if mean >= -2 * error:
        return None
    return (
        f"the target reward has fallen to {mean:.3g}: targets are less likely than before this iteration. Lower "
        "training.learning_rate or raise objective.eta, and use the previous checkpoint"
    )
