from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpaw_core import scoring, team
from tpaw_core.errors import TpawError
from tpaw_core.score_store import ScoreStore
from tpaw_core.scoring import Pair
from tpaw_core.template import Encoded

DIGEST = "a" * 64


class Scorer:
    """Scores with a formula and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Pair]] = []

    def __call__(self, pairs: list[Pair]) -> list[float]:
        self.asked.append(pairs)
        return [-sum(prompt) - 0.1 * sum(response) for prompt, response in pairs]


def test_each_pair_is_computed_once_also_after_reopening(tmp_path: Path) -> None:
    scorer = Scorer()
    first = ScoreStore(tmp_path, DIGEST, "float32")
    assert first.scores([([1], [2]), ([3], [4]), ([1], [2])], scorer) == ([-1.2, -3.4, -1.2], 2)
    assert first.scores([([3], [4])], scorer) == ([-3.4], 0)
    again = ScoreStore(tmp_path, DIGEST, "float32")
    assert again.scores([([5], [6]), ([1], [2])], scorer) == ([-5.6, -1.2], 1)
    assert ScoreStore(tmp_path, DIGEST, "float32").scores([([5], [6]), ([3], [4])], scorer) == ([-5.6, -3.4], 0)
    assert scorer.asked == [[([1], [2]), ([3], [4])], [([5], [6])]]


@pytest.mark.parametrize(
    ("one", "other"), [(([1, 2], [3]), ([1], [2, 3])), (([1], []), ([], [1])), (([1], [2]), ([2], [1]))]
)
def test_rows_with_the_same_ids_in_other_places_are_not_confused(one: Pair, other: Pair, tmp_path: Path) -> None:
    values = iter([-1.0, -2.0])
    found, new = ScoreStore(tmp_path, DIGEST, "float32").scores(
        [one, other], lambda pairs: [next(values) for _ in pairs]
    )
    assert (found, new) == ([-1.0, -2.0], 2)


@pytest.mark.parametrize(("digest", "settings"), [("b" * 64, "float32"), (DIGEST, "bfloat16")])
def test_another_checkpoint_or_setting_has_its_own_scores(digest: str, settings: str, tmp_path: Path) -> None:
    ScoreStore(tmp_path, DIGEST, "float32").scores([([1], [2])], lambda pairs: [-1.0])
    assert ScoreStore(tmp_path, digest, settings).scores([([1], [2])], lambda pairs: [-2.0]) == ([-2.0], 1)
    assert ScoreStore(tmp_path, DIGEST, "float32").scores([([1], [2])], lambda pairs: [-3.0]) == ([-1.0], 0)


def test_scores_come_back_exactly_as_they_were_computed(tmp_path: Path) -> None:
    value = -1 / 3 - 1e-12
    ScoreStore(tmp_path, DIGEST, "float32").scores([([1], [2])], lambda pairs: [value])
    assert ScoreStore(tmp_path, DIGEST, "float32").scores([([1], [2])], lambda pairs: [0.0])[0] == [value]


@pytest.mark.parametrize("damage", [b"", b"PAR1 and then nothing", None], ids=["empty", "garbage", "cut short"])
def test_a_damaged_file_is_named(damage: bytes | None, tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, DIGEST, "float32")
    store.scores([([1], [2])], Scorer())
    (file,) = store.folder.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(TpawError, match=f"{file}: is damaged .*delete it"):
        ScoreStore(tmp_path, DIGEST, "float32")
    file.unlink()
    assert ScoreStore(tmp_path, DIGEST, "float32").scores([([1], [2])], Scorer()) == ([-1.2], 1)


def test_a_file_taken_away_costs_its_own_rows_and_no_others(tmp_path: Path) -> None:
    """As the message above asks for: the next write must not take the place of a file that is still there."""
    for number in range(3):
        ScoreStore(tmp_path, DIGEST, "float32").scores([([number], [1])], Scorer())
    store = ScoreStore(tmp_path, DIGEST, "float32")
    min(store.folder.glob("*.parquet")).unlink()
    ScoreStore(tmp_path, DIGEST, "float32").scores([([7], [1])], Scorer())
    found, new = ScoreStore(tmp_path, DIGEST, "float32").scores([([n], [1]) for n in (1, 2, 7)], Scorer())
    assert (found, new) == ([-1.1, -2.1, -7.1], 0)


def test_a_scorer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail(pairs: list[Pair]) -> list[float]:
        raise RuntimeError("no memory")

    store = ScoreStore(tmp_path, DIGEST, "float32")
    with pytest.raises(RuntimeError):
        store.scores([([1], [2])], fail)
    assert list(tmp_path.rglob("*.parquet")) == []


def test_over_four_iterations_of_a_team_of_three_no_pair_is_scored_twice(
    make_model: Callable[[int], Any], tokenizer: Any, encoded: list[Encoded], tmp_path: Path
) -> None:
    rows = encoded[:5]
    models = [make_model(seed) for seed in range(4)]
    candidates = [team.Candidate(t, version=t + 1, digest=64 * f"{t}") for t in range(4)]
    targets = [(e.prompt_ids, e.chosen_ids) for e in rows]
    # The response that checkpoint t gave to row i: token ids that no other has.
    synthetic = {t: [(e.prompt_ids, [10 * t + i + 20, 50 + t]) for i, e in enumerate(rows)] for t in range(4)}
    computed: Counter[tuple[int, tuple[int, ...], tuple[int, ...]]] = Counter()
    new = []
    for iteration in range(1, 5):
        members = team.assemble(candidates, iteration=iteration, size=3)
        pairs = targets + [pair for member in members for pair in synthetic[member.iteration]]
        fresh = 0
        for member in members:

            def score(asked: list[Pair], player: int = member.iteration) -> list[float]:
                computed.update((player, tuple(prompt), tuple(response)) for prompt, response in asked)
                return scoring.score(models[player], asked, pad_id=tokenizer.pad_token_id)

            found, count = ScoreStore(tmp_path, member.digest, "float32").scores(pairs, score)
            fresh += count
            direct = scoring.score(models[member.iteration], pairs, pad_id=tokenizer.pad_token_id)
            assert found == pytest.approx(direct, abs=1e-4)
        new.append(fresh)
    assert set(computed.values()) == {1}
    # Blocks of rows that are new. Iteration 1: 1 target, 1 response. 2: the new player's target and 2 responses, the
    # old player on the new response. 3 (and, with a team of three, 4): the new player's target and 3 responses, the two
    # old players on the new response.
    assert new == [blocks * len(rows) for blocks in (2, 4, 6, 6)]
