from __future__ import annotations

import pytest

from tpaw_core.method import early_warnings


def log(*rewards: float) -> list[dict[str, float]]:
    return [{early_warnings.NEWEST_TARGET: reward, "loss": 0.7} for reward in rewards]


@pytest.mark.parametrize(
    "entries",
    [
        log(0.0, -0.02, -0.05, -0.11, -0.2, -0.31, -0.32, -0.33),
        log(0.5, 0.4, -0.30, -0.31),
        log(-0.3, -0.31),
    ],
)
def test_a_falling_target_reward_is_reported_with_a_remedy(entries: list[dict[str, float]]) -> None:
    said = early_warnings.of_training(entries)
    assert said is not None
    assert "target reward has fallen" in said
    assert "training.learning_rate" in said


@pytest.mark.parametrize(
    "entries",
    [
        log(0.0, 0.01, 0.02, 0.03, 0.02, 0.03, 0.04, 0.04),
        log(0.0, -0.3, -0.2, -0.1, 0.0, 0.05, 0.06, 0.07),  # it came back
        log(0.0, 0.1, -0.2, 0.1, -0.1, 0.12, -0.1, 0.09),  # noise
        log(-0.3),  # one entry tells nothing
        [{"loss": 0.7}] * 8,  # fine-tuning has no rewards
        [],
    ],
)
def test_a_target_reward_that_holds_is_silent(entries: list[dict[str, float]]) -> None:
    assert early_warnings.of_training(entries) is None


@pytest.mark.parametrize(("equal", "reported"), [(0.0, False), (0.9, False), (0.91, True), (1.0, True)])
def test_answers_that_nearly_all_equal_their_targets_are_reported(equal: float, reported: bool) -> None:
    said = early_warnings.of_answers(equal)
    assert (said is not None) == reported
    if said:
        assert "sft.num_train_epochs" in said
